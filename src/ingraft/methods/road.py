"""RoAd: pairs of outputs turned and stretched.

    W' = R W,  b' = R b;    of a pair (y_1, y_2):    y_1' = c_1 y_1 - d_1 y_2,    y_2' = c_2 y_2 + d_2 y_1,    c = a cos t,  d = a sin t

Angles t start at zero, lengths a at one. `road_1` has one t and one a for a pair, `road_2` one for an output, `road_4` one for each of c and d.

Paper: Liao and Monz, "3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability", NeurIPS 2024
(arXiv:2409.00119), equation 4.
Read against: Hugging Face PEFT's `road`, for what pairs with what: an output of the first half of a group with that of the second half.
What differs: embeddings and convolutions have outputs too.

Legend: O out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts
from ingraft.methods.rotation import divisors

SIZES = {"road_1": 1, "road_2": 2, "road_4": 4}
"""Angles for a pair of outputs, and as many lengths."""


@dataclass(frozen=True, kw_only=True)
class RoadConfig(MethodConfig):
    """RoAd's hyperparameters.

    Attributes:
        variant: "road_1", "road_2" or "road_4".
        group_size: outputs are paired inside groups of this many; even, and a divisor of the layer's outputs.
        init_weights: start as the identity; False starts at random (tests).
    """

    method: ClassVar[str] = "road"

    variant: str = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def problems(self) -> list[str]:
        found: list[str] = []
        if self.variant not in SIZES:
            found.append(f"variant must be one of {', '.join(SIZES)}, got {self.variant!r}.")
        if self.group_size < 2 or self.group_size % 2:
            found.append(f"group_size must be even and at least 2, got {self.group_size}.")
        return found


class Road(ShortcutPart):
    """See the file's header."""

    composition = "chain"
    kinds = frozenset({"linear", "conv1d-transposed", "embedding"})

    def __init__(self, config: RoadConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.variant, self.reach = config.variant, config.group_size // 2
        size = SIZES[config.variant] * facts.shape[0] // 2
        theta, alpha = torch.zeros(size), torch.ones(size)
        if not config.init_weights:
            nn.init.normal_(theta, std=0.5)
            nn.init.normal_(alpha, mean=1.0, std=0.5)
        device = facts.matrix().device
        self.road_theta, self.road_alpha = nn.Parameter(theta.to(device)), nn.Parameter(alpha.to(device))

    def turned(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        """R applied along the last dimension, from parameters as they are used beside tensors of `dtype`."""
        theta, alpha = (
            self._by_output(p.to(dtype).float()) for p in (self.road_theta, self.road_alpha)
        )  # each (2, groups, 2, half): for c and for d
        c, d = (alpha[0] * theta[0].cos()).to(y.dtype), (alpha[1] * theta[1].sin()).to(y.dtype)
        first, second = pairs = y.unflatten(-1, (y.shape[-1] // (2 * self.reach), 2, self.reach)).unbind(-2)
        crossed = torch.stack((-second, first), dim=-2)
        return (torch.stack(pairs, dim=-2) * c + crossed * d).reshape(y.shape)

    def _by_output(self, p: Tensor) -> Tensor:
        """The values by what they are for: (c or d, group, half of the group, place in the half)."""
        if self.variant == "road_4":
            return p.reshape(-1, 2, 2, self.reach).transpose(0, 1)
        return p.reshape(-1, 1 if self.variant == "road_1" else 2, self.reach).expand(2, -1, 2, -1)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turned(W.T.float(), W.dtype).T.to(W.dtype), self.bias(b)

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.turned(y, y.dtype)

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None else self.turned(b.float(), b.dtype).to(b.dtype)


def refuses(config: RoadConfig, facts: SiteFacts) -> str | None:
    """Groups that do not make up the outputs."""
    outputs = facts.shape[0]
    if outputs % config.group_size == 0:
        return None
    return f"road: {facts.path}: group_size = {config.group_size} does not divide the {outputs} outputs. Sizes that do: {divisors(outputs, of=2)}."


def count(config: RoadConfig, facts: SiteFacts) -> int:
    """Angles and lengths."""
    return SIZES[config.variant] * facts.shape[0]


METHOD = Method(
    name="road",
    config=RoadConfig,
    part=Road,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="ROAD",
        kinds=frozenset({"linear"}),
        tensors={"road_theta": "road_theta", "road_alpha": "road_alpha"},
    ),
)
