"""Routing: several adapters, attached already and frozen, each with a trained weight that depends on the token.

    y' = y + sum_i p_i c_i,    p = softmax(G y + g),    c_i what adapter i adds here

G and g start at zero: an even mixture.

Paper: Wu et al., "Mixture of LoRA Experts", ICLR 2024 (arXiv:2404.13628), section 3.2; a weight for each token and layer is also what X-LoRA
trains (Buehler and Buehler, 2024, arXiv:2402.07148).
What differs: the gate sees the layer's own output, where MoLE's sees the members' outputs side by side and X-LoRA's a second pass through the
model; no balancing loss, since members are trained already and none can starve.

Legend: N adapters, B rows, T tokens, W width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import AddingPart, Method, Site, SiteFacts, fresh
from ingraft.methods.over import OverConfig, members


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(OverConfig):
    """A router's hyperparameters; the modules are those of the adapters it weighs.

    Attributes:
        temperature: the gate's scores are divided by it; above 1 the mixture is more even.
    """

    method: ClassVar[str] = "routing"

    temperature: float = 1.0

    def problems(self) -> list[str]:
        found = super().problems()
        if self.temperature <= 0.0:
            found.append(f"temperature must be above 0, got {self.temperature}.")
        return found


class Router(AddingPart):
    """See the file's header."""

    def __init__(self, config: RoutingConfig, facts: SiteFacts) -> None:
        super().__init__()
        like = next(iter(facts.module.parameters()), None)
        self.adapters, self.temperature = config.adapters, config.temperature
        self.gate = fresh(len(config.adapters), facts.width, like=like)
        self.gate_bias = nn.Parameter(torch.zeros(len(config.adapters), device=self.gate.device))
        nn.init.zeros_(self.gate)

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        scores_BTN = F.linear(y, self.gate.to(y.dtype), self.gate_bias.to(y.dtype)).float() / self.temperature
        p_BTN = torch.softmax(scores_BTN, -1).to(y.dtype)
        c_BTNW = torch.stack(site.others(self.adapters, x, y), -2)
        return (p_BTN[..., None, :] @ c_BTNW).squeeze(-2)


def count(config: RoutingConfig, facts: SiteFacts) -> int:
    """G and g."""
    return len(config.adapters) * (facts.width + 1)


METHOD = Method(
    name="routing",
    config=RoutingConfig,
    part=Router,
    sites=(),
    identity_at_init=False,
    count=count,
    over=members,
)
