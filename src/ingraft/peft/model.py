"""The incumbent's model: its methods, laid over the model the user already has.

Hugging Face PEFT wraps a model in a `PeftModel`, which is not the user's model any more: other class, other keys, some features lost. Here
`get_peft_model` returns the same object. Its class carries the methods below as one more mixin (`adapt.swap`) over the one that makes it a model
with adapters, and `isinstance(model, PeftModel)` asks whether that mixin is there. When the last adapter goes, so does the mixin.

Where a name means one thing in PEFT and another in transformers' own adapter support (`add_adapter`, `active_adapters`), both callers are
served. `base_model` stays what transformers means by it, which its own code relies on.

Trainability: PEFT freezes what is inactive and unfreezes what is activated, also what was never meant to be trained. Here switching
remembers, for each adapter, which of its tensors were trainable when it was switched off, and restores exactly that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ingraft.adapt import building, files, lifecycle, merging, summary
from ingraft.adapt.combining import combine
from ingraft.adapt.control import control_of, require_control
from ingraft.adapt.files.peft_format import base_name, task_of
from ingraft.adapt.hooks import after_step
from ingraft.adapt.swap import Forward, Mixin, beneath, is_swapped, original_class, swap
from ingraft.errors import IngraftError
from ingraft.methods.contract import InputPart
from ingraft.peft.configs import PeftConfig, PeftType, TaskType
from ingraft.peft.convert import DESCRIBED, describe, method_config
from ingraft.peft.hub import folder_of
from ingraft.peft.per_row import keeps_virtual, rows, with_room
from ingraft.peft.soft_configs import source_values

_RESTING = "resting"
_BEFORE_MERGE = "active before merge_adapter"
_DISABLED = "active before disable_adapters"


class Names(list[str]):
    """A list that may also be called: PEFT's `active_adapters` is a property, transformers' a method."""

    def __call__(self) -> list[str]:
        return list(self)


class PeftMethods(Mixin):
    """What PEFT's users call on a model. Copied into the model's generated class, so `self` is the model."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with rows(module, kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None), args, kwargs):
            return base(*args, **with_room(require_control(module), kwargs))

    def generate(
        self: Any,
        *args: Any,
        adapter_names: Sequence[str] | None = None,
        task_ids: Sequence[int] | Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """As in transformers; `adapter_names` gives each row its adapter, `task_ids` its task."""
        with rows(self, adapter_names, task_ids, args, kwargs):
            return beneath(self, PeftMethods).generate(*args, **kwargs)

    # -- what there is

    @property
    def peft_config(self: Any) -> dict[str, PeftConfig]:
        """The config of each adapter."""
        return {name: describe(self, adapter) for name, adapter in require_control(self).adapters.items()}

    @property
    def active_adapters(self: Any) -> Names:
        """Names of the adapters that act."""
        return Names(require_control(self).call.active)

    @property
    def active_adapter(self: Any) -> str | list[str]:
        """The adapter that acts, or the list of those that do."""
        active = list(require_control(self).call.active)
        return active[0] if len(active) == 1 else active

    @property
    def active_peft_config(self: Any) -> PeftConfig:
        """The config of the adapter that acts (the first, of several)."""
        control = require_control(self)
        return describe(self, control.require((*control.call.active, "default")[0]))

    @property
    def peft_type(self: Any) -> PeftType | None:
        """The method of the adapter that acts."""
        return self.active_peft_config.peft_type

    @property
    def base_model(self: Any) -> Any:
        """What transformers calls so (its own code relies on it); for another module, this very object."""
        own = getattr(original_class(self), "base_model", None)
        return own.fget(self) if isinstance(own, property) and own.fget is not None else self

    def get_base_model(self: Any) -> Any:
        """The base: this very object, whose adapters `disable_adapter` switches off and `unload` takes away."""
        return self

    def get_nb_trainable_parameters(self: Any) -> tuple[int, int]:
        """Numbers of trainable and of all parameters."""
        found = summary.status(self)
        return found.trainable, found.total

    def print_trainable_parameters(self: Any) -> None:
        """Print them in the incumbent's words."""
        trained, total = self.get_nb_trainable_parameters()
        sys.stdout.write(
            f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}\n"
        )

    # -- adapters come and go

    def add_adapter(self: Any, *args: Any, **kwargs: Any) -> None:
        """PEFT's `add_adapter(adapter_name, peft_config)`, which leaves what acts, or transformers' `(adapter_config, adapter_name)`, which
        lets the new one act."""
        given = [
            *args,
            *(value for key, value in kwargs.items() if key in ("adapter_name", "peft_config", "adapter_config")),
        ]
        configs = [value for value in given if isinstance(value, PeftConfig)]
        if len(configs) != 1:
            raise IngraftError("add_adapter: give a name and one of ingraft.peft's configs.")
        name = next((value for value in given if isinstance(value, str)), "default")
        before = require_control(self).call.active
        _add(self, configs[0], name)
        theirs = "adapter_config" in kwargs or (bool(args) and isinstance(args[0], PeftConfig))
        if before and not theirs:
            _switch(self, before)

    def load_adapter(
        self: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str | None = None,
        is_trainable: bool = False,
        **options: Any,
    ) -> None:
        """Load a further adapter; what acts stays so."""
        before = require_control(self).call.active
        _load(self, model_id, adapter_name, is_trainable, options)
        if before:
            _switch(self, before)

    def set_adapter(self: Any, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Let these adapters act, and be trained if they were meant to be."""
        names = (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name)
        _switch(self, names)
        if inference_mode:
            for name in names:
                _freeze(self, name)

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Take an adapter off; if it alone acted, the first of the others does then."""
        control = require_control(self)
        control.require(adapter_name)
        left = [name for name in control.adapters if name != adapter_name]
        acted = control.call.active == (adapter_name,)
        lifecycle.detach(self, adapter_name)
        if acted and left:
            _switch(self, (left[0],))

    def disable_adapter(self: Any) -> AbstractContextManager[None]:
        """Inside the block the base answers alone. Trainability is left as it is."""
        return lifecycle.disabled(self)

    def disable_adapters(self: Any) -> None:
        """transformers' switch: the base answers alone until `enable_adapters`."""
        control = require_control(self)
        control.restore[_DISABLED] = control.call.active
        lifecycle.activate(self)

    def enable_adapters(self: Any) -> None:
        """Undo `disable_adapters`."""
        control = require_control(self)
        lifecycle.activate(self, *(name for name in control.restore.pop(_DISABLED, ()) if name in control.adapters))

    disable_adapter_layers = disable_adapters
    enable_adapter_layers = enable_adapters

    def add_weighted_adapter(
        self: Any,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: Literal["total", "frequency"] = "total",
    ) -> None:
        """Add an adapter that mixes others: `ingraft.combine`, in the incumbent's words.

        As there, IA3 adapters sum their vectors, a single adapter is copied whatever the type, and `svd_rank` counts for the types that cut to a
        rank. How the singular values are computed (`svd_full_matrices`, `svd_driver`) changes nothing.
        """
        del svd_full_matrices, svd_driver
        before, flags = require_control(self).call.active, _trainability(self)
        kinds = {self.peft_config[name].peft_type for name in adapters}
        how = "linear" if len(adapters) == 1 else combination_type
        combine(
            self,
            dict(zip(adapters, weights, strict=True)),
            adapter_name,
            how="parameters" if kinds == {PeftType.IA3} else how,
            rank=svd_rank if how.endswith("svd") else None,
            density=density,
            majority_sign_method=majority_sign_method,
            clamp=svd_clamp if how.endswith("svd") else None,
        )
        _rest(self, flags)
        _switch(self, before)

    def update_and_allocate(self: Any, global_step: int) -> None:
        """AdaLoRA's word after an optimiser step, ahead of `zero_grad` (the incumbent has it on `model.base_model`)."""
        after_step(self, global_step)

    # -- merge, unload, save

    def merge_and_unload(
        self: Any, progressbar: bool = False, safe_merge: bool = False, adapter_names: Sequence[str] | None = None
    ) -> Any:
        """Write adapters (those that act, by default) into the base for good and take all off. Returns the same object, plain again."""
        control = require_control(self)
        names = tuple(adapter_names or control.call.active)
        if control.merged:
            merging.unmerge(self)
        if names:
            merging.merge(self, *names, safe=safe_merge, progress=progressbar, untie=True)
        return lifecycle.detach(self, keep_merged=True)

    def merge_adapter(self: Any, adapter_names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
        """Write adapters into the base until `unmerge_adapter`; until then they alone act."""
        control = require_control(self)
        before = control.call.active
        merging.merge(self, *(adapter_names or ()), safe=safe_merge, untie=True)
        lifecycle.activate(self, *control.merged)
        control.restore[_BEFORE_MERGE] = before

    def unmerge_adapter(self: Any) -> None:
        """Put the base's own weights back, bit for bit."""
        merging.unmerge(self)
        lifecycle.activate(self, *require_control(self).restore.pop(_BEFORE_MERGE, ()))

    def unload(self: Any) -> Any:
        """Take all adapters off. Returns the same object: the base as it was, trainability included."""
        return lifecycle.detach(self)

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: Sequence[str] | None = None,
        is_main_process: bool = True,
        **options: Any,
    ) -> None:
        """Write the adapters only: `default` at the top of the folder, others below it by name. Opens no socket.

        Raises:
            IngraftError: for `safe_serialization=False` (pickle) and for `push_to_hub`.
        """
        if not safe_serialization or options.get("push_to_hub"):
            raise IngraftError(
                "save_pretrained: adapters are saved as safetensors on this machine; upload the folder with huggingface_hub."
            )
        if not is_main_process:
            return
        folder = Path(save_directory)
        for name in selected_adapters or list(require_control(self).adapters):
            files.save(self, folder if name == "default" else folder / name, name, overwrite=True)
        if folder.name.startswith(
            "checkpoint-"
        ):  # the Trainer's: it looks for the model's own file name when it resumes
            files.save_resumable(self, folder)


# ------------------------------------------------------------------------------------------------------------------ functions


def get_peft_model(model: Any, peft_config: PeftConfig, adapter_name: str = "default", **options: Any) -> Any:
    """Graft an adapter onto a model. Returns the same object, which now has the methods of `PeftMethods`.

    Args:
        options: `mixed`, `autocast_adapter_dtype`, `low_cpu_mem_usage` are accepted for the habit: methods always mix, and adapters are always
            float32 and used in the base's dtype.

    Raises:
        IngraftError: everything in the config that this model or this library cannot honour.
    """
    _known(options, ("mixed", "autocast_adapter_dtype", "low_cpu_mem_usage", "revision"), "get_peft_model")
    _add(model, peft_config, adapter_name)
    return model


def inject_adapter_in_model(peft_config: PeftConfig, model: Any, adapter_name: str = "default", **options: Any) -> Any:
    """The incumbent's other name for `get_peft_model`."""
    return get_peft_model(model, peft_config, adapter_name, **options)


class _Attached(type):
    """`isinstance` for names that are no class of the model: they ask whether PEFT's methods are there."""

    def __instancecheck__(cls, instance: object) -> bool:
        task: TaskType | None = getattr(cls, "task", None)
        return (
            isinstance(instance, nn.Module)
            and is_swapped(instance, (PeftMethods,))
            and (task is None or task.value == task_of(instance))
        )

    def __call__(cls, model: Any, peft_config: PeftConfig, adapter_name: str = "default", **options: Any) -> Any:
        return get_peft_model(model, peft_config, adapter_name, **options)


class PeftModel(metaclass=_Attached):
    """Any model that adapters were attached to through this namespace. Never instantiated: calling it is `get_peft_model`."""

    task: TaskType | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: Any,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> Any:
        """Load an adapter into a base. Returns the same object, in evaluation mode unless `is_trainable`.

        Args:
            model_id: a folder, or the hub's id of an adapter.
            config: ignored; the file's own counts.
            options: see `hub.folder_of`, and `allow_base_mismatch`.

        Raises:
            IngraftError: everything in which file and model differ; the model is then unchanged.
        """
        del config
        _load(model, model_id, adapter_name, is_trainable, options)
        return model if is_trainable else model.eval()


class PeftModelForCausalLM(PeftModel):
    """Of a causal language model."""

    task = TaskType.CAUSAL_LM


class PeftModelForSeq2SeqLM(PeftModel):
    """Of an encoder-decoder."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForSequenceClassification(PeftModel):
    """Of a classifier."""

    task = TaskType.SEQ_CLS


class PeftModelForTokenClassification(PeftModel):
    """Of a tagger."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """Of an extractive question answerer."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """Of a model without a head."""


class LoraModel(PeftModel):
    """The incumbent's name for what `get_peft_model` makes of a LoRA config."""


# ------------------------------------------------------------------------------------------------------------------ inside


def _add(model: Any, config: PeftConfig, name: str) -> None:
    made, flags = method_config(model, config), _trainability(model)
    lifecycle.attach(model, made, name, strict=False, fill=source_values(config))
    _rest(model, flags)
    if config.base_model_name_or_path is None:
        config.base_model_name_or_path = base_name(model)
    _settle(model, name, config)
    if config.inference_mode:
        _freeze(model, name)


def _load(
    model: Any, model_id: str | os.PathLike[str], name: str | None, trainable: bool, options: dict[str, Any]
) -> None:
    allow = bool(options.pop("allow_base_mismatch", False))
    for habit in (
        "torch_device",
        "autocast_adapter_dtype",
        "low_cpu_mem_usage",
        "ephemeral_gpu_offload",
        "adapter_kwargs",
    ):
        options.pop(habit, None)
    _known(options, ("subfolder", "revision", "token", "cache_dir", "local_files_only"), "from_pretrained")
    folder = folder_of(model_id, **options)
    config, flags = PeftConfig.from_pretrained(folder), _trainability(model)
    config.inference_mode = not trainable
    name = files.load(model, folder, name, trainable=trainable, allow_base_mismatch=allow)
    _rest(model, flags)
    _settle(model, name, config)


def _settle(model: Any, name: str, config: PeftConfig) -> None:
    """Lay the methods over the model, and note what was asked for."""
    control = require_control(model)
    adapter = control.require(name)
    adapter.facts[DESCRIBED] = config
    if config.task_type is not None:
        adapter.facts["task_type"] = TaskType(config.task_type).value
    if issubclass(adapter.method.part, InputPart) and keeps_virtual(control, adapter.facts.get("task_type")):
        control.keep_virtual = True
    if not is_swapped(model, (PeftMethods,)):
        swap(model, PeftMethods)
        control.laid.append(PeftMethods)


def _switch(model: Any, names: Sequence[str]) -> None:
    """Let these act; what stops acting is frozen, what acts again is as trainable as it was."""
    control = require_control(model)
    for name in names:
        control.require(name)
    for name, flags in _trainability(model).items():
        if name not in names:
            _rest(model, {name: flags})
            _freeze(model, name)
    for name in names:
        resting: dict[str, bool] = control.adapters[name].facts.pop(_RESTING, {})
        for key, parameter in building.parameters(model, name).items():
            parameter.requires_grad_(resting.get(key, parameter.requires_grad))
    lifecycle.activate(model, *names)


Flags = dict[str, dict[str, bool]]


def _trainability(model: Any) -> Flags:
    """Which tensors of each adapter are trainable."""
    control = control_of(model)
    names = control.adapters if control is not None else ()
    return {name: {key: p.requires_grad for key, p in building.parameters(model, name).items()} for name in names}


def _rest(model: Any, flags: Flags) -> None:
    """Note what adapters are to be when they act again; what was noted when they stopped acting stands."""
    for name, own in flags.items():
        require_control(model).adapters[name].facts.setdefault(_RESTING, own)


def _freeze(model: Any, name: str) -> None:
    for parameter in building.parameters(model, name).values():
        parameter.requires_grad_(False)


def _known(options: dict[str, Any], names: Sequence[str], what: str) -> None:
    unknown = sorted(set(options) - set(names))
    if unknown:
        raise IngraftError(f"{what}: there is no option {', '.join(map(repr, unknown))}. Known: {', '.join(names)}.")
