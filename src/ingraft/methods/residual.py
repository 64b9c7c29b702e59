"""What PiSSA and OLoRA share: a LoRA whose start is taken from the weight, and taken off it again.

    W' = W + s (B A - B0 A0),    A and B start at A0 and B0

The reference implementations write W - s B0 A0 into the base. Here the base never changes: the start is part of the adapter, so that adapters of
other methods, merging and taking off mean what they always mean. On disk it is a LoRA of twice the rank, [B, -B0] and [A; A0], which is right in
every reader; `reopen` makes it trainable as what it is.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from ingraft.methods.as_lora import as_lora
from ingraft.methods.contract import Factors, Site, SiteFacts
from ingraft.methods.lora import LoraConfig
from ingraft.methods.lowrank import LowRank


class Residual(LowRank):
    """See the file's header. Abstract."""

    additive = True
    start_A: Tensor
    start_B: Tensor

    def __init__(self, config: LoraConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        with torch.no_grad():
            for own, start in zip((self.lora_B, self.lora_A), self.start(config, facts), strict=True):
                own.copy_(start)
        # Not in the adapter's tensors by name: seed and base tell them, and `compact` keeps them.
        self.register_buffer("start_A", self.lora_A.detach().clone(), persistent=False)
        self.register_buffer("start_B", self.lora_B.detach().clone(), persistent=False)

    @abstractmethod
    def start(self, config: LoraConfig, facts: SiteFacts) -> tuple[Tensor, Tensor]:
        """B0 (O, R) and A0 (R, I), float32."""

    def delta(self, W_OI: Tensor) -> Tensor:
        start = self.start_B.to(W_OI.dtype).float() @ self.start_A.to(W_OI.dtype).float()
        return super().delta(W_OI) - self.scale * start

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (W.float() + self.delta(W)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if site.drops(x, self.p):  # the start comes off what the base made of the whole input
            y = site.low_rank(x, y, self.lora_A, self.lora_B, self.scale, self.p)
            return site.low_rank(x, y, self.start_A, -self.start_B, self.scale)
        change = self.low_rank()
        return site.low_rank(x, y, change.A_RI, change.B_OR, change.scale)

    def low_rank(self) -> Factors:
        B_OR, A_RI = torch.cat([self.lora_B, -self.start_B], 1), torch.cat([self.lora_A, self.start_A])
        return Factors(B_OR=B_OR, A_RI=A_RI, scale=self.scale)


def compact(config: LoraConfig, parts: Mapping[str, Residual]) -> tuple[LoraConfig, Mapping[str, Mapping[str, Tensor]]]:
    """The LoRA of twice the rank that computes the same."""
    changes = {path: part.low_rank() for path, part in parts.items()}
    return as_lora(config, 2), {path: {"lora_A": c.A_RI, "lora_B": c.B_OR} for path, c in changes.items()}


def reopen(source: Mapping[str, LowRank], target: Mapping[str, Residual]) -> None:
    """The halves of that LoRA, each where it belongs."""
    for path, part in target.items():
        for own, half in zip((part.lora_A, part.start_A), source[path].lora_A.chunk(2), strict=True):
            own.copy_(half)
        for own, half in zip((part.lora_B, part.start_B), source[path].lora_B.chunk(2, dim=1), strict=True):
            own.copy_(half)
        part.start_B.neg_()
