"""An adapter's tensors under the incumbent's names, and the preparation of a quantised base for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.control import part_of, require_control, shared_of
from ingraft.adapt.files.peft_tensors import Entry, entries, layout_of
from ingraft.errors import IngraftError


@dataclass(frozen=True)
class Loaded:
    """What `set_peft_model_state_dict` found, as torch reports it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def _entries(model: nn.Module, name: str) -> list[Entry]:
    adapter = require_control(model).require(name)
    parts = {path: part for path in adapter.sites if (part := part_of(model.get_submodule(path), name)) is not None}
    layout = layout_of(model, adapter.method, adapter.config, adapter.sites)
    return entries(model, adapter.method, adapter.sites, parts, shared_of(model, name), layout)


def get_peft_model_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default", **options: Any
) -> dict[str, Tensor]:
    """An adapter's tensors by their names on disk, float32.

    Args:
        state_dict: ignored; the model's own tensors count.
        options: `save_embedding_layers`, `unwrap_compiled`: accepted for the habit.
    """
    del state_dict, options
    return {entry.key: entry.take().clone() for entry in _entries(model, adapter_name)}


def set_peft_model_state_dict(
    model: nn.Module, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default", **options: Any
) -> Loaded:
    """Give an attached adapter the tensors of `get_peft_model_state_dict`.

    Raises:
        IngraftError: for shapes that differ; nothing is then changed.
    """
    del options
    known = {entry.key: entry for entry in _entries(model, adapter_name)}
    given = {key: value for key, value in peft_model_state_dict.items() if key in known}
    problems = [
        f"{key} has shape {list(value.shape)}; the adapter needs {list(known[key].shape)}."
        for key, value in given.items()
        if tuple(value.shape) != known[key].shape
    ]
    if problems:
        raise IngraftError(*problems)
    for key, value in given.items():
        known[key].put(value)
    return Loaded(sorted(set(known) - set(given)), sorted(set(peft_model_state_dict) - set(given)))


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> Any:
    """Freeze a base, put what is not quantised into float32, and switch gradient checkpointing on where the base is quantised."""
    quantised = getattr(model, "quantization_method", None) is not None or any(
        getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit")
    )
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        if parameter.dtype in (torch.float16, torch.bfloat16) and type(parameter).__name__ != "Params4bit":
            parameter.data = parameter.data.float()
    if quantised and use_gradient_checkpointing:
        options = gradient_checkpointing_kwargs or {}
        if options.get("use_reentrant", True):
            model.enable_input_require_grads()
        # The second is the older name of the first.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(options)
    return model
