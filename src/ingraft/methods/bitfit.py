"""BitFit: the biases alone.

    b' = b + d,    d starts at zero

Paper: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models", ACL 2022
(arXiv:2106.10199).
What differs: models without biases (Llama) are refused unless `add_bias` grafts a zero bias onto every linear layer.

Legend: O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods.contract import Method, MethodConfig, ShortcutPart, Site, SiteFacts


@dataclass(frozen=True, kw_only=True)
class BitFitConfig(MethodConfig):
    """BitFit's hyperparameters.

    Attributes:
        add_bias: graft a bias onto layers that have none (all linear layers, unless target_modules says which).
    """

    method: ClassVar[str] = "bitfit"

    add_bias: bool = False

    def __post_init__(self) -> None:
        if self.add_bias and self.target_modules is None:
            object.__setattr__(self, "target_modules", ("biases", "all-linear"))
        super().__post_init__()


class BitFit(ShortcutPart):
    """See the file's header."""

    additive = True
    needs_matrix = False

    def __init__(self, config: BitFitConfig, facts: SiteFacts) -> None:
        super().__init__()
        if facts.b is None and not config.add_bias:
            raise IngraftError(f"bitfit: {facts.path} has no bias. Pass add_bias=true to graft one onto it.")
        if facts.b is None and not facts.takes_bias:
            raise IngraftError(
                f"bitfit: {facts.path} is a layer that knows no bias, so one grafted onto it would do nothing. Leave it out."
            )
        W = facts.matrix()
        self.d = nn.Parameter(torch.zeros(W.shape[0], device=W.device))

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        d = self.d.to(W.dtype)
        return W, d if b is None else b + d

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + site.out(self.d.to(y.dtype))

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b  # `after` has added d already


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """One number for every output."""
    del config
    return facts.shape[0]


METHOD = Method(
    name="bitfit",
    config=BitFitConfig,
    part=BitFit,
    sites=("biases",),
    identity_at_init=True,
    count=count,
    hint="This model has no biases; pass add_bias=true (--method-config.add-bias true) to graft a zero bias onto every linear layer.",
)
