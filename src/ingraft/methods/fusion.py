"""AdapterFusion: a trained attention over what several adapters, attached already and frozen, would add.

    y' = y + sum_i p_i V c_i,    p = softmax_i((Q y + q) . (K c_i + k)),    c_i what adapter i adds here

Where the fused adapters change the sum under a block's last norm, so does the fusion.

Paper: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021 (arXiv:2005.00247), equation 4.
Read against: AdapterHub's fusion layer ("dynamic" and, with `value` false, "static"; places, initial values, regularisation).
What differs: the fused adapters drop out as they do alone; no temperature, which is off in AdapterHub; queries, keys and values are always
those of the equation (their `query_before_ln`, `residual_before` and `value_before_softmax` at their defaults).

Legend: N adapters, B rows, T tokens, W width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import AddingPart, Method, Site, SiteFacts, fresh
from ingraft.methods.over import OverConfig, members

REGULARIZATION = 0.01


@dataclass(frozen=True, kw_only=True)
class FusionConfig(OverConfig):
    """A fusion's hyperparameters; the modules are those of the adapters it fuses.

    Attributes:
        value: train V, which starts as the identity; false leaves it out.
        regularization: keep V near the identity by a penalty of 0.01 ||V - 1||^2.
        dropout: probability of dropping a score of the attention, in [0, 1).
    """

    method: ClassVar[str] = "fusion"

    value: bool = True
    regularization: bool = True
    dropout: float = 0.0

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout must lie in [0, 1), got {self.dropout}.")
        return found


class Fusion(AddingPart):
    """See the file's header."""

    def __init__(self, config: FusionConfig, facts: SiteFacts) -> None:
        super().__init__()
        like = next(iter(facts.module.parameters()), None)
        W = facts.width
        self.adapters, self.p = config.adapters, config.dropout
        self.query, self.key = fresh(W, W, like=like), fresh(W, W, like=like)
        self.query_bias, self.key_bias = (nn.Parameter(torch.zeros(W, device=self.query.device)) for _ in range(2))
        for matrix in (self.query, self.key):
            nn.init.normal_(matrix, std=0.02)
        if config.value:
            self.value = fresh(W, W, like=like)
            nn.init.constant_(self.value, 1e-6).detach().fill_diagonal_(1.0)
        else:
            self.value = None

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        c_BTNW = torch.stack(site.others(self.adapters, x, y), -2)
        query = F.linear(y, self.query.to(y.dtype), self.query_bias.to(y.dtype))
        key = F.linear(c_BTNW, self.key.to(y.dtype), self.key_bias.to(y.dtype))
        scores = site.dropout((key @ query[..., None]).squeeze(-1), self.p)
        weights = torch.softmax(scores.float(), -1).to(y.dtype)
        # V is the same for all: applied to the one sum instead of to each.
        mixed = (weights[..., None, :] @ c_BTNW).squeeze(-2)
        return mixed if self.value is None else F.linear(mixed, self.value.to(y.dtype))


def penalty(config: FusionConfig, parts: Mapping[str, Fusion]) -> Tensor:
    """How far the Vs are from the identity."""
    values = [part.value for part in parts.values() if part.value is not None and config.regularization]
    if not values:
        return torch.zeros(())
    return (
        REGULARIZATION
        * torch.stack([(V - torch.eye(V.shape[0], device=V.device)).square().sum() for V in values]).sum()
    )


def count(config: FusionConfig, facts: SiteFacts) -> int:
    """Q and K with biases, and V."""
    return (3 if config.value else 2) * facts.width**2 + 2 * facts.width


METHOD = Method(
    name="fusion",
    config=FusionConfig,
    part=Fusion,
    sites=(),
    identity_at_init=False,
    count=count,
    penalty=penalty,
    over=members,
)
