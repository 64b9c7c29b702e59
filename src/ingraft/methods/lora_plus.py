"""LoRA+: LoRA whose B learns faster than its A.

    W' = W + s B A;    learning rate of A: eta, of B: loraplus_lr_ratio * eta

In a wide network B's entries have to move further than A's for both to take part in learning; one rate for both cannot be right for either.

Paper: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", ICML 2024 (arXiv:2402.12354), section 4; it finds a ratio of about
2^4 best, with a rate for A below LoRA's usual one.
Read against: Hugging Face PEFT's `create_loraplus_optimizer`.
What differs: the ratio is part of the method, not of an optimiser made by hand (`ingraft.param_groups` gives its groups to a trainer of your
own). Embeddings get no third rate. What is trained is a LoRA, and its files are a LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from ingraft.methods.as_lora import copied, kept_as_lora
from ingraft.methods.contract import Method
from ingraft.methods.lora import LoRA, LoraConfig, count, refuses
from ingraft.methods.lowrank import LORA_LAYOUT


@dataclass(frozen=True, kw_only=True)
class LoraPlusConfig(LoraConfig):
    """LoRA's hyperparameters; see `LoraConfig`.

    Attributes:
        loraplus_lr_ratio: learning rate of B over that of A, at least 1.
    """

    method: ClassVar[str] = "lora-plus"

    loraplus_lr_ratio: float = 16.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.loraplus_lr_ratio < 1:
            found.append(f"loraplus_lr_ratio must be at least 1, got {self.loraplus_lr_ratio}.")
        return found


def rates(config: LoraPlusConfig, tensor: str) -> float:
    """B's factor on the learning rate; the bias of the branch, behind B, goes with it."""
    return 1.0 if tensor == "lora_A" else config.loraplus_lr_ratio


METHOD = Method(
    name="lora-plus",
    config=LoraPlusConfig,
    part=LoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    rates=rates,
    compact=kept_as_lora,
    reopen=copied,
    peft=replace(LORA_LAYOUT, fields={"loraplus_lr_ratio": None}),
)
