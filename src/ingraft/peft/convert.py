"""What one of the incumbent's configs means for a model: the native config, and the description a file would hold."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

from torch import nn

from ingraft.adapt.control import Adapter
from ingraft.adapt.files import peft_format
from ingraft.adapt.files.peft_heads import HEADS, heads_of
from ingraft.adapt.files.peft_tensors import layout_of
from ingraft.adapt.models import token_path
from ingraft.adapt.select import ALL_LINEAR, all_linear, base_modules, matches
from ingraft.errors import IngraftError, nearest
from ingraft.methods import registry
from ingraft.methods.contract import MethodConfig
from ingraft.peft import targets
from ingraft.peft.configs import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    from_dict,
)
from ingraft.peft.lora_configs import file_terms, variant
from ingraft.peft.table_configs import TableConfig

NEWEST = "0.21"
"""The incumbent's version whose meaning a script has."""

DESCRIBED = "peft"
"""Key of the user's config in an adapter's facts."""


def method_config(model: nn.Module, config: PeftConfig) -> MethodConfig:
    """The native config for this model.

    Raises:
        IngraftError: everything in the config that this model or this library cannot honour, by name.
    """
    raw = config.to_dict() | {"peft_version": NEWEST}
    where = type(config).__name__
    modules = base_modules(model)
    raw["modules_to_save"] = _whole(modules, config)
    if isinstance(config, LoraConfig | IA3Config | TableConfig):
        _fill_targets(model, modules, config, raw)
    if isinstance(config, TableConfig):
        _refuse_idle(config)
    if raw.get("prefix_projection") is False:
        raw["encoder_hidden_size"] = None  # the incumbent lets it stand without effect
    if isinstance(config, LoraConfig):
        file_terms(config, raw)
    made, _ = peft_format.read_config(model, raw, shared=True, ours=False, where=where)
    if isinstance(config, LoraConfig):
        made = variant(config, made)
        if config.ensure_weight_tying:
            _refuse_tied_targets(modules, made)
    if isinstance(config, PrefixTuningConfig) and config.init_weights is not None:
        made = dataclasses.replace(made, **_zero_prefix(config))  # pyright: ignore[reportArgumentType]
    if isinstance(config, PromptTuningConfig):
        made = dataclasses.replace(made, **_start(config))  # pyright: ignore[reportArgumentType]
    return made


def describe(model: nn.Module, adapter: Adapter) -> PeftConfig:
    """The config of an attached adapter in the incumbent's terms: the one it was made from, or what its file would say."""
    if DESCRIBED not in adapter.facts:
        raw = peft_format.write_config(model, adapter, layout_of(model, adapter.method, adapter.config, adapter.sites))
        adapter.facts[DESCRIBED] = from_dict(raw | {"inference_mode": False})
    return adapter.facts[DESCRIBED]


def _whole(modules: dict[str, nn.Module], config: PeftConfig) -> list[str]:
    """Paths of the modules to train in full: those named, and the head of the task."""
    given = getattr(config, "modules_to_save", None) or ()
    names = [given] if isinstance(given, str) else sorted(given)
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        hits = [path for path in modules if path and matches(name, path)]
        found += hits
        if not hits and not any(name in heads for heads in HEADS.values()):
            missing.append(
                f"modules_to_save: {name!r} matches no module{nearest(name, {p.rpartition('.')[2] for p in modules})}."
            )
    if missing and not found:
        raise IngraftError(*missing)
    for text in missing:
        warnings.warn(text, stacklevel=3)
    heads = heads_of(modules, TaskType(config.task_type).value) if config.task_type is not None else ()
    found += [path for path in modules if path in heads]
    return list(dict.fromkeys(found))


def _fill_targets(
    model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig | IA3Config | TableConfig, raw: dict[str, Any]
) -> None:
    """Write the targets that the incumbent works out itself into `raw`."""
    if isinstance(raw["target_modules"], str) and raw["target_modules"].lower() == ALL_LINEAR:
        raw["target_modules"] = peft_format.names_for(all_linear(model, modules), modules)
    if raw["target_modules"] is not None:
        return
    if config.kind == PeftType.TRAINABLE_TOKENS:
        raw["target_modules"] = [token_path(model)]
        return
    kind = str(getattr(getattr(model, "config", None), "model_type", ""))
    table: Any = targets.IA3 if isinstance(config, IA3Config) else targets.BY_TYPE.get(str(config.kind), targets.LORA)
    if kind not in table:
        raise IngraftError(
            f"{type(config).__name__}: target_modules is missing, and there is no usual choice for models of type {kind or 'unknown'!r}. "
            'Name the modules to adapt, or give "all-linear".'
        )
    if isinstance(config, IA3Config):
        plain, forward = targets.IA3[kind]
        raw["target_modules"], raw["feedforward_modules"] = [*plain, *forward], list(forward)
    else:
        chosen = table[kind]
        raw["target_modules"] = chosen if isinstance(chosen, str) else list(chosen)


def _refuse_idle(config: TableConfig) -> None:
    """Fields that say something about training, and that the method here does not have: a file may hold them, a script means them."""
    assert config.kind is not None
    layouts = (method.peft for method in registry.methods())
    idle = {
        name for layout in layouts if layout is not None and layout.peft_type == config.kind for name in layout.ignored
    }
    usual = registry.incumbents()[config.kind.value].defaults
    problems = [
        f"{type(config).__name__}: {name} = {value!r} has no effect here; leave it out."
        for name in sorted(idle)
        if (value := getattr(config, name, None)) != usual.get(name) and not config.inference_mode
    ]
    if problems:
        raise IngraftError(*problems)


def _refuse_tied_targets(modules: dict[str, nn.Module], made: MethodConfig) -> None:
    """The incumbent gives an embedding and a head that share a weight one adapter, turned over for one of them; here they would be two."""
    names = made.target_modules or ()
    first: dict[int, str] = {}
    for path in [path for path in modules if any(matches(name, path) for name in names)]:
        for p in modules[path]._parameters.values():
            if p is not None and (other := first.setdefault(id(p), path)) != path:
                raise IngraftError(
                    f"LoraConfig: ensure_weight_tying: {path} and {other} share a weight, and two adapters on them would be trained apart. Leave it off, "
                    "or train the embedding in full (modules_to_save) or some of its rows (trainable_token_indices), which stay tied here."
                )


def _zero_prefix(config: PrefixTuningConfig) -> dict[str, Any]:
    """A prefix that starts at zero, in native terms."""
    if config.init_weights != "zero" or config.prefix_projection:
        raise IngraftError(
            f"PrefixTuningConfig: init_weights must be None, or 'zero' without prefix_projection; got {config.init_weights!r}."
        )
    return {"init_std": 0.0}


def _start(config: PromptTuningConfig) -> dict[str, Any]:
    """How a prompt starts, in native terms."""
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return {"prompt_init": "sample"}
    if config.prompt_tuning_init != PromptTuningInit.TEXT:
        return {"prompt_init": "random"}
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **(config.tokenizer_kwargs or {}))
    return {"prompt_init_ids": tuple(tokenizer(config.prompt_tuning_init_text)["input_ids"])}
