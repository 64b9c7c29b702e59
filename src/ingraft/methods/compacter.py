"""Compacter: bottlenecks whose matrices are sums of Kronecker products, with one small factor for all layers.

    y' = y + f(y),    f(h) = U a(D h + d) + u,    D^T = sum_i A_i (x) S_i T_i,    U^T likewise with factors of its own

A (n, n, n) is the rule, shared by every D and U of the adapter; S_i (width / n, rank) and T_i (rank, inner / n).

Paper: Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers", NeurIPS 2021 (arXiv:2106.04647), equations 4 to 6.
Read against: AdapterHub's `compacter` (places, options, initial values). `target_modules: [block]` is its `compacter++`.
What differs: S and T are drawn from Glorot's uniform distribution, which AdapterHub names and replaces by the normal one; a rule per site,
where it is not shared, starts as the shared one does; a bottleneck that n does not divide is rounded up, where theirs is refused.

Legend: N = n = phm_dim, F features in / n, G features out / n, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.bottleneck import ACTIVATIONS, NarrowConfig
from ingraft.methods.contract import AddingPart, Method, Site, SiteFacts, fresh


@dataclass(frozen=True, kw_only=True)
class CompacterConfig(NarrowConfig):
    """Compacter's hyperparameters, by AdapterHub's names; see `NarrowConfig` for the bottleneck's.

    Attributes:
        phm_dim: n, the number of Kronecker products; it must divide the width, and the bottleneck is rounded up to a multiple of it.
        phm_rank: rank of the second factors, at least 1.
        shared_phm_rule: one rule for the adapter; false gives every matrix its own.
        learn_phm: train the rule; false keeps it as it was drawn.
        phm_init_range: deviation of the rule's initial values. Small, so that a fresh adapter is the identity within rounding.
    """

    method: ClassVar[str] = "compacter"

    reduction_factor: float = 32.0
    non_linearity: str = "gelu"
    phm_dim: int = 4
    phm_rank: int = 1
    shared_phm_rule: bool = True
    learn_phm: bool = True
    phm_init_range: float = 0.0001

    def problems(self) -> list[str]:
        found = super().problems()
        for name in ("phm_dim", "phm_rank"):
            if getattr(self, name) < 1:
                found.append(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.phm_init_range <= 0:
            found.append(f"phm_init_range must be above 0, got {self.phm_init_range}.")
        return found

    def inner(self, width: int) -> int:
        return -(-super().inner(width) // self.phm_dim) * self.phm_dim


class Rule(nn.Module):
    """A in the equation."""

    def __init__(self, config: CompacterConfig, facts: SiteFacts) -> None:
        super().__init__()
        n = config.phm_dim
        rule = fresh(n, n, n, like=next(iter(facts.module.parameters()), None))
        nn.init.normal_(rule, std=config.phm_init_range)
        if config.learn_phm:
            self.phm_rule = rule
        else:
            self.register_buffer("phm_rule", rule.data)


class Product(nn.Module):
    """One matrix of the bottleneck with its bias."""

    def __init__(self, config: CompacterConfig, facts: SiteFacts, sizes: tuple[int, int]) -> None:
        super().__init__()
        like = next(iter(facts.module.parameters()), None)
        n, r = config.phm_dim, config.phm_rank
        self.left, self.right = fresh(n, sizes[0] // n, r, like=like), fresh(n, r, sizes[1] // n, like=like)
        for one in (*self.left, *self.right):
            nn.init.xavier_uniform_(one)
        self.bias = nn.Parameter(torch.zeros(sizes[1], device=self.left.device))
        self.rule = None if config.shared_phm_rule else Rule(config, facts)

    def forward(self, x: Tensor, shared: Rule | None) -> Tensor:
        """x D^T + d. The matrix is small and made in float32, from factors as they are used beside x."""
        rule = self.rule if shared is None else shared
        assert rule is not None
        A_NNN, S_NFR, T_NRG = (factor.to(x.dtype).float() for factor in (rule.phm_rule, self.left, self.right))
        matrix = torch.einsum("nab,nfg->afbg", A_NNN, S_NFR @ T_NRG).flatten(2).flatten(0, 1)
        return F.linear(x, matrix.T.to(x.dtype), self.bias.to(x.dtype))


class Compacter(AddingPart):
    """See the file's header."""

    def __init__(self, config: CompacterConfig, facts: SiteFacts) -> None:
        super().__init__()
        inner = config.inner(facts.width)
        self.bank = () if facts.shared is None else (facts.shared,)
        self.down = Product(config, facts, (facts.width, inner))
        self.up = Product(config, facts, (inner, facts.width))
        self.activation = ACTIVATIONS[config.non_linearity]
        self.scaling, self.p = config.scaling, config.dropout

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        rule = self.bank[0] if self.bank else None
        assert rule is None or isinstance(rule, Rule)
        return self.scaling * self.up(self.activation(self.down(site.dropout(y, self.p), rule)), rule)


def shared(config: CompacterConfig, sites: tuple[SiteFacts, ...]) -> nn.Module | None:
    """The rule, where all layers share one."""
    return Rule(config, sites[0]) if config.shared_phm_rule and sites else None


def refuses(config: CompacterConfig, facts: SiteFacts) -> str | None:
    """A width that n does not divide."""
    if facts.width % config.phm_dim == 0:
        return None
    return f"compacter: phm_dim={config.phm_dim} must divide the width {facts.width} of {facts.path}; choose another phm_dim."


def count(config: CompacterConfig, facts: SiteFacts) -> int:
    """Two matrices and their biases; a shared rule is counted by itself."""
    both = facts.width + config.inner(facts.width)
    own_rules = 0 if config.shared_phm_rule or not config.learn_phm else 2 * config.phm_dim**3
    return 2 * config.phm_rank * both + both + own_rules


METHOD = Method(
    name="compacter",
    config=CompacterConfig,
    part=Compacter,
    sites=("attention-out", "mlp-out"),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    shared=shared,
)
