"""LoRA's variants under the incumbent's names: AdaLoRA's config, and the starts that `init_lora_weights` names.

The incumbent has one config with switches where natively each variant is a method of its own; `variant` says which is meant.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ingraft.adapt.hooks import prepare
from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig
from ingraft.methods.registry import load
from ingraft.peft.configs import CLASSES, LoraConfig, PeftType


@dataclass(kw_only=True)
class AdaLoraConfig(LoraConfig):
    """AdaLoRA. Fields as in the incumbent; `r` has no effect, and `total_step` may be left to the trainer."""

    kind: ClassVar[PeftType | None] = PeftType.ADALORA

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None


@dataclass(kw_only=True)
class EvaConfig:
    """How `init_lora_weights="eva"` starts. Fields as in the incumbent; which tokens count does not depend on labels here."""

    rho: float = 2.0
    tau: float = 0.99
    use_label_mask: bool = True
    label_mask_value: int = -100
    whiten: bool = False
    adjust_scaling_factors: bool = True


@dataclass(kw_only=True)
class LoftQConfig:
    """How `init_lora_weights="loftq"` starts. The bits are those of the base, and there is one iteration: its blocks stay."""

    loftq_bits: int = 4
    loftq_iter: int = 1


CLASSES[PeftType.ADALORA.value] = AdaLoraConfig


def file_terms(config: LoraConfig, raw: dict[str, Any]) -> None:
    """Write the start in the terms of a file, which do not tell a start that the trained tensors no longer show."""
    start = str(config.init_lora_weights).lower()
    if start.startswith("pissa_niter_"):
        raw["init_lora_weights"] = "pissa"
    elif start in ("eva", "loftq"):
        raw["init_lora_weights"] = True


def variant(config: LoraConfig, made: MethodConfig) -> MethodConfig:
    """The native config with the start that was asked for.

    Raises:
        IngraftError: a start that cannot be combined with the other switches, or an option of it that has no effect here.
    """
    start = str(config.init_lora_weights).lower()
    if start.startswith("pissa_niter_") and made.method == "pissa":
        return dataclasses.replace(made, init_lora_weights=start)  # type: ignore[call-arg]
    if start not in ("eva", "loftq"):
        return made
    if made.method != "lora":
        raise IngraftError(f"init_lora_weights = {start!r} goes with plain LoRA, not with {made.method}.")
    more: dict[str, Any] = {}
    if start == "eva":
        eva = _fields(config.eva_config, EvaConfig)
        if eva.whiten or not eva.adjust_scaling_factors:
            raise IngraftError(
                "eva_config: whiten and adjust_scaling_factors=False have no effect here; leave them out."
            )
        more = {"rho": eva.rho, "tau": eva.tau}
    elif _fields(config.loftq_config, LoftQConfig).loftq_iter != 1:
        raise IngraftError("loftq_config: loftq_iter must be 1; more iterations would change the base's blocks.")
    return load(start).config(**made.options(), **more)


def _fields(given: Any, cls: type[Any]) -> Any:
    """A nested config, which may be given as a dictionary."""
    known = {f.name for f in dataclasses.fields(cls)}
    if isinstance(given, Mapping):
        if unknown := sorted(set(given) - known):
            raise IngraftError(f"{cls.__name__} has no fields {', '.join(unknown)}.")
        return cls(**given)
    return cls() if given is None else given


def initialize_lora_eva_weights(
    model: nn.Module, dataloader: Iterable[Mapping[str, Any]], adapter_name: str = "default"
) -> None:
    """The incumbent's name for `ingraft.prepare`; labels in the batches are left out."""
    prepare(model, adapter_name, ({key: x for key, x in batch.items() if key != "labels"} for batch in dataloader))
