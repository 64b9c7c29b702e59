"""The bottleneck that Houlsby, Pfeiffer and parallel adapters share: down, a nonlinearity, up.

    f(h) = U a(D h + d) + u,    D (width / reduction, width), U zero at the start, so that a fresh adapter is the identity

Read against: AdapterHub's `adapters` (weights, nonlinearities, where the residual is added). What differs: AdapterHub draws U from a normal
distribution of deviation 0.02 ("bert" initialisation); here it is zero unless `init_weights` asks for theirs.

Legend: W width, K bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import AddingPart, MethodConfig, Site, SiteFacts, fresh

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


@dataclass(frozen=True, kw_only=True)
class NarrowConfig(MethodConfig):
    """Hyperparameters of a bottleneck, however its two matrices are made.

    Attributes:
        reduction_factor: the bottleneck is width / reduction_factor wide (at least 1).
        non_linearity: relu, gelu, swish (silu) or tanh.
        dropout: probability of dropping an input of the bottleneck, in [0, 1).
        scaling: factor on what the bottleneck adds.
    """

    reduction_factor: float = 16.0
    non_linearity: str = "relu"
    dropout: float = 0.0
    scaling: float = 1.0

    def problems(self) -> list[str]:
        found: list[str] = []
        if self.reduction_factor <= 0:
            found.append(f"reduction_factor must be above 0, got {self.reduction_factor}.")
        if self.non_linearity not in ACTIVATIONS:
            found.append(f"non_linearity must be one of {', '.join(ACTIVATIONS)}, got {self.non_linearity!r}.")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout must lie in [0, 1), got {self.dropout}.")
        return found

    def inner(self, width: int) -> int:
        """Width of the bottleneck."""
        return max(int(width // self.reduction_factor), 1)


@dataclass(frozen=True, kw_only=True)
class BottleneckConfig(NarrowConfig):
    """Hyperparameters of a bottleneck with two matrices of its own.

    Attributes:
        init_weights: "identity" (U zero) or "bert" (all normal with deviation 0.02, AdapterHub's default).
    """

    init_weights: str = "identity"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.init_weights not in ("identity", "bert"):
            found.append(f"init_weights must be 'identity' or 'bert', got {self.init_weights!r}.")
        return found


class Bottleneck(AddingPart):
    """f in the equation. Abstract: the three methods say what it sees."""

    stacks: ClassVar[Mapping[str, int | None] | None] = {"down": 0, "down_bias": 0, "up": 1, "up_bias": None}

    def __init__(self, config: BottleneckConfig, facts: SiteFacts) -> None:
        super().__init__()
        inner = config.inner(facts.width)
        like = next(iter(facts.module.parameters()), None)
        self.down = fresh(inner, facts.width, like=like)
        self.down_bias = nn.Parameter(torch.zeros(inner, device=self.down.device))
        self.up = fresh(facts.width, inner, like=like)
        self.up_bias = nn.Parameter(torch.zeros(facts.width, device=self.down.device))
        nn.init.normal_(self.down, std=0.02)
        nn.init.normal_(self.up, std=0.02 if config.init_weights == "bert" else 0.0)
        self.activation = ACTIVATIONS[config.non_linearity]
        self.scaling, self.p = config.scaling, config.dropout

    def through(self, h: Tensor, site: Site) -> Tensor:
        """scaling f(h), in the dtype of h."""
        # Of another layout, torch folds it in another way where a weight requires grad than where none does.
        h = site.dropout(h, self.p).contiguous()
        inner_K = site.own(self.activation(F.linear(h, self.down.to(h.dtype), self.down_bias.to(h.dtype))))
        up, bias = self.up.to(h.dtype), self.up_bias.to(h.dtype)
        own = bias.dim() > 1  # each row has its own (`stacks`)
        return self.scaling * (F.linear(inner_K, up) + site.out(bias) if own else F.linear(inner_K, up, bias))


def count(config: BottleneckConfig, facts: SiteFacts) -> int:
    """Two matrices and their biases."""
    inner = config.inner(facts.width)
    return 2 * inner * facts.width + inner + facts.width
