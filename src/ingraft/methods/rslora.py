"""rsLoRA: LoRA with a scale that keeps its step size at every rank.

    W' = W + s B A,    s = lora_alpha / sqrt(r)

With LoRA's alpha / r the branch learns the less the higher its rank; with the root of the rank in its place, activations and gradients keep
their size as r grows, so that a higher rank is worth its cost.

Paper: Kalajdzievski, "A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA", 2023 (arXiv:2312.03732), theorem 3.2.
Read against: Hugging Face PEFT's `lora` with `use_rslora`.
What differs: everything that reads the scale (combining, converting, merging) reads it from the part, so no place can fall back to alpha / r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar

from ingraft.methods.contract import Method
from ingraft.methods.lora import LoRA, LoraConfig, count, refuses
from ingraft.methods.lowrank import LORA_LAYOUT


@dataclass(frozen=True, kw_only=True)
class EitherScaleConfig(LoraConfig):
    """What variants share that take either scale.

    Attributes:
        use_rslora: the scale s is rsLoRA's lora_alpha / sqrt(r).
    """

    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """s in the equation."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True, kw_only=True)
class RsLoraConfig(LoraConfig):
    """LoRA's hyperparameters; see `LoraConfig`. The change is scaled by lora_alpha / sqrt(r)."""

    method: ClassVar[str] = "rslora"

    @property
    def scale(self) -> float:
        """s in the equation."""
        return self.lora_alpha / math.sqrt(self.r)


METHOD = Method(
    name="rslora",
    config=RsLoraConfig,
    part=LoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=replace(LORA_LAYOUT, constants={**LORA_LAYOUT.constants, "use_rslora": True}),
)
