"""LoftQ: LoRA over a quantised weight that starts from what quantising took away.

    W' = Q + s B A,    s B A starts as the best rank-r approximation of W - Q

Q is the quantised weight as the base holds it, W the one that it was made from. The adapted model starts nearer to the original than the
quantised base is, which counts where few bits are left.

Paper: Li et al., "LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models", ICLR 2024 (arXiv:2310.08659), algorithm 1.
Read against: Hugging Face PEFT's `replace_lora_weights_loftq`.
What differs: the blocks of the base stay as they are, so that it remains one base for every adapter; that is the paper's algorithm with T = 1
(its further rounds quantise W - B A anew).

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ingraft.methods.as_lora import copied, kept_as_lora
from ingraft.methods.contract import Method, SiteFacts
from ingraft.methods.lora import LoRA, LoraConfig, count
from ingraft.methods.lowrank import LORA_LAYOUT
from ingraft.methods.ranked import rank_above

ITERATIONS = 16
"""Of the subspace iteration for the singular vectors."""


@dataclass(frozen=True, kw_only=True)
class LoftQConfig(LoraConfig):
    """LoRA's hyperparameters; see `LoraConfig`. The start has one form only."""

    method: ClassVar[str] = "loftq"
    starts: ClassVar[str] = "true"


def start(missing_OI: Tensor, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """B (O, R) and A (R, I), the scale shared between them, whose product is nearest to what is missing."""
    U, S, V = torch.svd_lowrank(missing_OI, q=min(r + 8, *missing_OI.shape), niter=ITERATIONS)
    root_R = (S[:r] / scale).sqrt()
    return U[:, :r] * root_R, root_R[:, None] * V[:, :r].mT


class LoftQ(LoRA):
    """See the file's header."""

    def __init__(self, config: LoftQConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        if facts.original is None or facts.finished:
            return  # a file has the values
        missing_OI = facts.original().to(facts.matrix().device).float() - facts.matrix().float()
        with torch.no_grad():
            for own, value in zip((self.lora_B, self.lora_A), start(missing_OI, config.r, config.scale), strict=True):
                own.copy_(value)


def refuses(config: LoftQConfig, facts: SiteFacts) -> str | None:
    """A weight that nothing was taken from, or whose original is not at hand."""
    if facts.original is None and not facts.finished:
        return (
            f"{facts.path}: loftq starts from what quantising took from a weight, and this one is not quantised here, or its original is not at "
            "hand. Load the base with quantization nf4 or int8 (--quantization nf4), or use lora or pissa."
        )
    return rank_above(config, facts)


METHOD = Method(
    name="loftq",
    config=LoftQConfig,
    part=LoftQ,
    sites=("all-linear",),
    identity_at_init=False,
    count=count,
    refuses=refuses,
    hint="It needs a quantised base.",
    compact=kept_as_lora,
    reopen=copied,
    peft=LORA_LAYOUT,
)
