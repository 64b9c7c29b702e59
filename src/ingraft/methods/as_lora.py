"""Variants of LoRA that differ in their start or their training alone: on disk they are a LoRA, which every reader has.

Our own manifest says what they were, so that they can be trained further as that (`Method.reopen`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from torch import Tensor, nn

from ingraft.methods.layout import Modules
from ingraft.methods.lora import LoRA, LoraConfig
from ingraft.methods.rslora import EitherScaleConfig, RsLoraConfig


def as_lora(config: LoraConfig, times: int = 1) -> LoraConfig:
    """A variant's options as those of a LoRA of the same scale, whichever of the two it has, with `times` its rank."""
    own: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(LoraConfig)}
    stabilised = isinstance(config, EitherScaleConfig) and config.use_rslora
    more = math.sqrt(times) if stabilised else times
    own |= {"r": times * config.r, "lora_alpha": more * config.lora_alpha, "init_lora_weights": True}
    for name, factor in (("rank_pattern", times), ("alpha_pattern", more)):
        own[name] = {key: factor * value for key, value in own[name].items()}
    return (RsLoraConfig if stabilised else LoraConfig)(**own)


def kept_as_lora(config: LoraConfig, parts: Mapping[str, LoRA]) -> tuple[LoraConfig, Modules]:
    """`Method.compact` of a variant that differs in its start or its training alone."""
    return as_lora(config), tensors_of(parts)


def tensors_of(parts: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Parts' trained tensors by path and name."""
    return {path: dict(part.named_parameters()) for path, part in parts.items()}


def copied(source: Mapping[str, nn.Module], target: Mapping[str, nn.Module]) -> None:
    """Give parts the values of others that have tensors of the same names."""
    for path, part in target.items():
        for name, parameter in part.named_parameters():
            parameter.copy_(source[path].get_parameter(name))
