"""Gain: one trained factor for every output of a layer. A method of one's own, as CONTRIBUTING.md explains it.

    W' = diag(1 + g) W,  b' = (1 + g) b,    g starts at zero

Legend: O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, ShortcutPart, Site, SiteFacts
from ingraft.methods.registry import MethodRecord


@dataclass(frozen=True, kw_only=True)
class GainConfig(MethodConfig):
    """Gain has no hyperparameters of its own."""

    method: ClassVar[str] = "gain"


class Gain(ShortcutPart):
    """See the file's header."""

    composition = "chain"

    def __init__(self, config: GainConfig, facts: SiteFacts) -> None:
        del config
        super().__init__()
        self.g = nn.Parameter(torch.zeros(facts.matrix().shape[0], device=facts.matrix().device))

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return W * (1 + self.g.to(W.dtype))[:, None], self.bias(b)

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y * site.out(1 + self.g.to(y.dtype))

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else b * (1 + self.g.to(b.dtype))


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """One number for every output."""
    del config
    return facts.shape[0]


METHOD = Method(name="gain", config=GainConfig, part=Gain, sites=("all-linear",), identity_at_init=True, count=count)

RECORD = MethodRecord(
    name="gain",
    target="ingraft_gain:METHOD",
    config="GainConfig",
    family="weight",
    summary="one trained factor for every output",
    equation="W' = diag(1 + g) W",
    paper="an example",
    mergeable=True,
    learning_rate=1e-2,
)
