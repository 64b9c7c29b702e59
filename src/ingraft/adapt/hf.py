"""All that knows transformers' models: the root's class, checkpointing, generation, and where attention and input parts sit.

`ModelRoot` is laid over the model's class, which keeps its name, so that Trainer, `pipeline` and output capture go on working:

* `save_pretrained` writes adapters only; in a Trainer's `checkpoint-N` it also leaves the float32 tensors under the file name that the Trainer
  looks for when it resumes.
* Gradient checkpointing: whatever function transformers calls to checkpoint a block is wrapped in a `Carry`, which remembers the acting
  adapters of the forward pass and restores them for the recomputation.
* `generate`: a static cache gets room for virtual tokens, and masks stay two-dimensional where a prompt has to be put in front.

`settle` brings all of this in line with what is attached, and is called after every attach and detach.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft.adapt import prefixes
from ingraft.adapt.context import IGNORED_LABEL, before_answer, prompt_at_start
from ingraft.adapt.control import (
    HOST_ATTRIBUTE,
    STEP,
    Control,
    HostState,
    control_of,
    host_state,
    release,
    require_control,
    shared_of,
)
from ingraft.adapt.counting import COUNTING, UNEVEN, counting_of, names_of
from ingraft.adapt.roles import projects, sites_of_role
from ingraft.adapt.root import Root, outermost
from ingraft.adapt.swap import Forward, Mixin, beneath, is_swapped, original_class, swap, unswap
from ingraft.adapt.virtual import Decoder, Inner, behinds, lengths, reads_context
from ingraft.adapt.walk import path_of, walked
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError
from ingraft.methods.contract import AttentionPart, GatedPart, InputPart, Method, SiteFacts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Carry:
    """A checkpointing function that replays a block with the adapters its forward pass saw.

    What all sites share (a prefix encoder) was evaluated outside the block. Reentrant checkpointing runs a backward pass of its own for
    each block, and could go through that evaluation only once; there each replay evaluates it anew. Such checkpointing is known by its
    forward pass, which runs without grad.
    """

    control: Control
    function: Callable[..., Any]

    def __call__(self, block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        control = self.control
        call, shared = control.call, dict(control.shared)
        reentrant: bool | None = None

        def run(*inputs: Any, **named: Any) -> Any:
            nonlocal reentrant, shared
            if reentrant is None:
                reentrant = not torch.is_grad_enabled()
            elif reentrant:
                shared = {name: control.encoders[name]() for name in shared}
            before = control.call, control.replaying, control.shared
            control.call, control.replaying, control.shared = call, True, shared
            try:
                return block(*inputs, **named)
            finally:
                control.call, control.replaying, control.shared = before

        return self.function(run, *args, **kwargs)


class ModelRoot(Root):
    """A transformers model with adapters. Its functions are copied into the generated class (see `swap.Mixin`)."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        with _told_by_labels(module, kwargs):
            given = functools.partial(_given, module, args, kwargs)
            control = require_control(module)
            result = outermost(control, module, "", lambda: base(*args, **kwargs), args, kwargs, given)
        return _with_penalty(module, result, kwargs) if module.training and kwargs.get("labels") is not None else result

    _hf_peft_config_loaded = True  # what the Trainer asks before it trains over a quantised base

    def save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Write the adapters only: `default`, or a lone adapter, at the top; others in folders of their names.

        Raises:
            IngraftError: for `push_to_hub`; saving opens no socket.
        """
        from ingraft.adapt.files import save, save_resumable

        if options.get("push_to_hub"):
            raise IngraftError(
                "save_pretrained: adapters are written to this machine only; upload the folder with huggingface_hub."
            )
        if not is_main_process:
            return
        control = require_control(self)
        names = list(control.adapters)
        for name in names:
            top = name == "default" or len(names) == 1
            save(self, Path(save_directory) if top else Path(save_directory) / name, name, overwrite=True)
        if Path(save_directory).name.startswith(
            "checkpoint-"
        ):  # the Trainer's; it will look for the model's own file name
            save_resumable(self, Path(save_directory))

    def load_state_dict(self: Any, state_dict: dict[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """As in torch; a dictionary that holds adapters only may leave the base out, and says at which step dropout goes on."""
        if STEP in state_dict:
            control = require_control(self)
            control.call = control.call.at_step(state_dict[STEP], None)
            state_dict = {key: value for key, value in state_dict.items() if key != STEP}
        if any("adapter:" not in key for key in state_dict):
            return beneath(self, ModelRoot).load_state_dict(state_dict, strict, assign)
        result = beneath(self, ModelRoot).load_state_dict(state_dict, False, assign)
        missing = [key for key in result.missing_keys if "adapter:" in key]
        if strict and (missing or result.unexpected_keys):
            raise RuntimeError(
                f"adapters in the file and in the model differ: missing {missing}, unexpected {result.unexpected_keys}"
            )
        result.missing_keys[:] = missing
        return result

    def active_adapters(self: Any) -> list[str]:
        """Names of the adapters that act."""
        return list(require_control(self).call.active)

    def get_adapter_state_dict(
        self: Any, adapter_name: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """The trained tensors of one adapter, by the names of `ingraft.adapt.parameters`."""
        from ingraft.adapt.building import parameters

        del state_dict
        name = adapter_name or require_control(self).call.active[0]
        return {key: value.detach() for key, value in parameters(self, name).items()}

    def _set_gradient_checkpointing(self: Any, *args: Any, **kwargs: Any) -> None:
        beneath(self, ModelRoot)._set_gradient_checkpointing(*args, **kwargs)
        _carry(self, require_control(self))

    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; the tokens it is given are the prompt, unless `adapt.context` says which are."""
        control = require_control(self)
        context = control.call.context
        try:
            return beneath(self, ModelRoot).generate(*args, **kwargs)
        finally:
            control.call = replace(control.call, context=context)

    def _expand_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Take note of where the prompt ends: here `generate` has its inputs complete, and not yet repeated for beams."""
        control = require_control(self)
        if control.call.context.prompt is None and not self.config.is_encoder_decoder:
            below = beneath(self, ModelRoot)._expand_inputs_for_generation
            bound = inspect.signature(below).bind(*args, **kwargs).arguments
            named = {**bound, **bound.get("model_kwargs", {})}
            virtual = max(lengths(control, control.call, InputPart).values(), default=0)
            prompt = prompt_at_start(named, virtual)
            control.call = replace(control.call, context=replace(control.call.context, prompt=prompt))
        return beneath(self, ModelRoot)._expand_inputs_for_generation(*args, **kwargs)

    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Virtual tokens of prompts lie in the cache: make room for them."""
        control = require_control(self)
        room = max(lengths(control, control.call, InputPart).values(), default=0)
        below = beneath(self, ModelRoot)._prepare_cache_for_generation
        bound = inspect.signature(below).bind(*args, **kwargs)
        bound.arguments["max_cache_length"] += room
        return below(*bound.args, **bound.kwargs)

    def create_masks_for_generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Leave the mask two-dimensional where the inner model has a prompt to put in front."""
        from transformers.masking_utils import create_masks_for_generate

        control = require_control(self)
        if lengths(control, control.call, InputPart):
            return kwargs["attention_mask"]
        own = vars(original_class(self)).get("create_masks_for_generate")
        if own is not None:
            return beneath(self, ModelRoot).create_masks_for_generate(*args, **kwargs)
        signature = inspect.signature(create_masks_for_generate).parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in signature.values()):
            kwargs = {name: value for name, value in kwargs.items() if name in signature}
        return create_masks_for_generate(*args, **kwargs)


def _given(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Path of the encoder, where its outputs are handed to the model, as `generate` does."""
    named = {**dict(zip(names_of(original_class(model)), args, strict=False)), **kwargs}
    return None if named.get("encoder_outputs") is None else inner_path(model)


@contextmanager
def _told_by_labels(model: nn.Module, kwargs: dict[str, Any]) -> Iterator[None]:
    """Inside the block, adapters that ask where the prompt ends know it from the labels of the batch, where nobody told."""
    control = require_control(model)
    kept, labels, mask = control.call.context, kwargs.get("labels"), kwargs.get("attention_mask")
    asked = reads_context(control, control.call) or behinds(control, control.call)
    # Labels of an encoder mark no answer.
    if (
        not asked
        or kept.prompt is not None
        or not control.causal
        or not isinstance(labels, Tensor)
        or labels.dim() != 2
    ):
        yield
        return
    if mask is not None and mask.shape != labels.shape:
        mask = None
    control.call = replace(control.call, context=replace(kept, prompt=before_answer(labels, mask)))
    try:
        yield
    finally:
        control.call = replace(control.call, context=kept)


def _with_penalty(model: nn.Module, result: Any, kwargs: dict[str, Any]) -> Any:
    """The loss with what methods add to it. Of a Trainer's step in several batches, each carries its share."""
    from ingraft.adapt.hooks import penalty

    extra = penalty(model)
    if extra is None:
        return result
    if (items := kwargs.get("num_items_in_batch")) is not None:
        extra = extra * (kwargs["labels"].ne(IGNORED_LABEL).sum() / items).clamp(max=1.0)
    if isinstance(result, tuple):
        return (result[0] + extra, *result[1:])
    result.loss = result.loss + extra
    return result


def inner_path(model: nn.Module) -> str:
    """Path of the model that embeds tokens: the encoder of an encoder-decoder, else the base model."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        inner = model.get_encoder()  # type: ignore[operator]
    else:
        whole: Any = model
        inner = getattr(whole, whole.base_model_prefix, None)
        if inner is None:  # a model without a head, or one whose prefix names something else (Llama 4)
            tokens = whole.get_input_embeddings()
            models = [child for child in whole.children() if hasattr(child, "base_model_prefix")]
            inner = next((child for child in models if any(m is tokens for m in child.modules())), whole)
        while (
            inner is not model
            and getattr(inner, "decoder", None) is not None
            and "input_ids" in inspect.signature(inner.decoder.forward).parameters
        ):
            inner = inner.decoder  # OPT nests the stack that works out masks once more
    path = path_of(model, inner)
    assert path is not None, "it was reached from the model"
    return path


def check_method(model: nn.Module, method: Method) -> None:
    """Refuse attention and input parts where the model has no place for them.

    Raises:
        IngraftError: naming the model's class and the reason.
    """
    what = original_class(model).__name__
    text: Any = getattr(model.config, "text_config", None)
    if issubclass(method.part, AttentionPart | InputPart) and "mrope_section" in (
        getattr(text, "rope_parameters", None) or {}
    ):
        raise IngraftError(
            f"{method.name}: {what} gives pictures positions along several axes, which virtual tokens would shift by one. Choose a weight method or "
            "a bottleneck."
        )
    if (
        issubclass(method.part, AttentionPart | InputPart)
        and counting_of(model.get_submodule(inner_path(model)), control_of(model)) is None
    ):
        raise IngraftError(
            f"{method.name}: {what} counts positions in a way that is not known here, and virtual tokens move them. Choose a weight method or a "
            "bottleneck."
        )
    if issubclass(method.part, InputPart):
        parameters = inspect.signature(original_class(model.get_submodule(inner_path(model))).forward).parameters
        if "inputs_embeds" not in parameters or not _embeds(model.get_submodule(inner_path(model))):
            raise IngraftError(
                f"{method.name}: {what} embeds no tokens (its forward takes no inputs_embeds, or it has no layer that makes them), so there is nothing to put a prompt in front of."
            )
    if issubclass(method.part, AttentionPart):
        outside = [
            path for path in sites_of_role(model, "attention") if not prefixes.uses_registry(model.get_submodule(path))
        ]
        if outside:
            raise IngraftError(
                f"{method.name}: {what} does not take its attention from transformers' registry ({outside[0]}), so a prefix cannot join it."
            )
        implementation = prefixes.implementation(model)
        if implementation not in (*prefixes.OURS, *prefixes.OURS.values()):
            raise IngraftError(
                f"{method.name}: works with the attention implementations {' and '.join(prefixes.OURS)}, and {what} uses {implementation}. "
                "Load it with attn_implementation='sdpa'."
            )
    _tell_of_windows(model, method)


def why_no_packing(model: Any) -> str | None:
    """See `models.why_no_packing`."""
    what = original_class(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        return f"{what} is an encoder-decoder, whose decoder looks at rows of its encoder."
    inner = model.get_submodule(inner_path(model))
    if "position_ids" not in names_of(original_class(inner)) or counting_of(inner, control_of(model)) is None:
        return f"{what} cannot be told positions, and would count on from row to row."
    try:
        attentions = sites_of_role(model, "attention")
    except IngraftError as error:
        return error.problems[0].split(". ")[0] + "."
    if outside := [path for path in attentions if not prefixes.uses_registry(model.get_submodule(path))]:
        return f"{what} does not take its attention from transformers' registry ({outside[0]})."
    name = prefixes.implementation(model)
    if name not in (*prefixes.NAMES, *prefixes.NAMES.values()) and not name.startswith("flash_attention"):
        return f"{what} uses the attention {name}; {', '.join(prefixes.NAMES)} and flash attention are known."
    return None


def _tell_of_windows(model: nn.Module, method: Method) -> None:
    """Say that virtual tokens and windows get into each other's way, where the model has windows."""
    if not issubclass(method.part, AttentionPart | InputPart) or issubclass(method.part, GatedPart):
        return
    configs = [config for config in prefixes.configs(model) if getattr(config, "use_sliding_window", True)]
    windows = {w for config in configs if isinstance(w := getattr(config, "sliding_window", None), int)}
    if windows:
        log.warning(
            "%s: %s has layers with a sliding window of %d tokens. A prompt moves out of it as the text grows, and with left padding the padding "
            "takes part of it; a prefix stays in view, which in PEFT it does not beyond the window.",
            method.name,
            original_class(model).__name__,
            min(windows),
        )


def _embeds(inner: Any) -> bool:
    """Whether a model has a layer that embeds its tokens; one of pictures may take embeddings all the same (DETR)."""
    try:
        return isinstance(inner.get_input_embeddings(), nn.Module)
    except NotImplementedError:
        return False


def text_path(model: Any) -> str:
    """Path of the decoder of text, if the config has one of its own beside others."""
    if "text_config" not in getattr(model.config, "sub_configs", {}):
        return ""
    inner = model.get_decoder()
    return path_of(model, inner) or ""


def output_head(model: Any) -> nn.Module | None:
    """The layer over the vocabulary."""
    return model.get_output_embeddings()


def site_facts(model: nn.Module, path: str, module: nn.Module, role: str) -> SiteFacts:
    """Sizes of an attention's keys and values, or of the input embedding."""
    if role == "input":
        tokens = module.get_input_embeddings()  # type: ignore[operator]
        return SiteFacts(path=path, role=role, module=module, width=_embedding_width(tokens), tokens=tokens)
    width = next(
        (
            value
            for name in ("head_dim", "attention_head_size", "key_value_proj_dim")
            if isinstance(value := getattr(module, name, None), int)
        ),
        None,
    )
    what = f"{path} ({original_class(module).__name__})"
    if not prefixes.uses_registry(module):
        raise IngraftError(
            f"{what} does not take its attention from transformers' registry, so a prefix cannot join it."
        )
    config: Any = module.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    if not isinstance(heads, int):
        raise IngraftError(
            f"{path} ({original_class(module).__name__}): the number of heads differs from stage to stage, so one prefix cannot join them all. "
            "Choose a weight method or a bottleneck."
        )
    if width is None:
        width = config.hidden_size // config.num_attention_heads
    if any(getattr(module, name, width) != width for name in ("qk_head_dim", "v_head_dim")):
        raise IngraftError(
            f"{what}: its keys are made of pieces and are not as wide as its values, so a prefix cannot join them. Choose a weight method, a "
            "bottleneck or a prompt."
        )
    return SiteFacts(
        path=path,
        role=role,
        module=module,
        heads=heads,
        head_width=width,
        width=config.hidden_size,
        projects=projects(module, heads * width),
    )


def _embedding_width(tokens: nn.Module) -> int:
    kind = kind_of(tokens)
    return kind.shape_of(tokens)[0] if kind is not None else cast(Tensor, tokens.weight).shape[1]


def carries_rows(module: nn.Module, path: str) -> bool:
    """T5's relative bias is looked up by (query, key), once for all rows."""
    del module
    return path.rpartition(".")[2] != "relative_attention_bias"


def settle(model: nn.Module) -> None:
    """Bring checkpointing, attention names and the inner model's class in line with what is attached."""
    control = control_of(model)
    assert control is not None
    kinds = [adapter.method.part for adapter in control.adapters.values()]
    _carry(model, control if kinds else None)
    packing = control.packing and bool(kinds)
    prefixes.name_attention(model, control, packing or any(issubclass(kind, AttentionPart) for kind in kinds))
    if packing or prefixes.LAID in control.restore:
        attentions = {path: model.get_submodule(path) for path in sites_of_role(model, "attention")}
        prefixes.know_attention(attentions, control, packing)
    control.encoders = {
        name: shared
        for name, adapter in control.adapters.items()
        if issubclass(adapter.method.part, AttentionPart | InputPart) and (shared := shared_of(model, name)) is not None
    }
    inside = any(issubclass(kind, AttentionPart | InputPart) or kind.reads_context for kind in kinds)
    _lay_inner(model, control, inside or packing)


def _carry(model: nn.Module, control: Control | None) -> None:
    """Wrap (or unwrap) the checkpointing functions that blocks hold."""
    for module in walked(model).modules.values():
        function = module.__dict__.get("_gradient_checkpointing_func")
        if function is None:
            continue
        plain = function.function if isinstance(function, Carry) else function
        module.__dict__["_gradient_checkpointing_func"] = plain if control is None else Carry(control, plain)


def _lay_inner(model: nn.Module, control: Control, wanted: bool) -> None:
    """Swap the class of the model that embeds tokens (and of the decoder beside an encoder), or back."""
    places: list[tuple[str, type[Mixin]]] = [(inner_path(model), Inner)]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        decoder = model.get_decoder()  # type: ignore[operator]
        places.append((path_of(model, decoder) or "", Decoder))
    for path, mixin in places:
        module = model.get_submodule(path)
        if wanted and not is_swapped(module, (mixin,)):
            if host_state(module) is None:
                module.__dict__[HOST_ATTRIBUTE] = HostState(control=control, path=path, kind=None, known_forward=False)
            names_of(original_class(module))
            if mixin is Inner:
                module.__dict__[COUNTING] = counting_of(module, control)
            swap(module, mixin)
            control.causal = _is_causal(model, module)
        elif not wanted and is_swapped(module, (mixin,)):
            unswap(module, mixin)
            for remembered in (COUNTING, UNEVEN):
                module.__dict__.pop(remembered, None)
            release(module)


def _is_causal(model: nn.Module, inner: nn.Module) -> bool:
    """Whether no token sees what comes after it: the attention says so, or the model writes text without an encoder."""
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return model.can_generate() or any(getattr(module, "is_causal", False) is True for module in inner.modules())  # type: ignore[operator]


def in_use(module: nn.Module) -> bool:
    """Whether a module needs its host state although no part lies in it."""
    return is_swapped(module, (Inner, Decoder)) or prefixes.LAID in module.__dict__
