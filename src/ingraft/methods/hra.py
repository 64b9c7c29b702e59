"""HRA: the weight reflected r times.

    W' = W (I - 2 u_1 u_1') ... (I - 2 u_r u_r'),    every u_i of length one

The vectors start in equal pairs, whose reflections cancel. The product is used in its compact form I - U K U', K (r, r), so x is multiplied
twice by a (D, r) matrix however many reflections there are.

Paper: Yuan et al., "Bridging the Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation", NeurIPS 2024
(arXiv:2405.17484), equations 3 and 6.
Read against: Hugging Face PEFT's `hra`.
What differs: nothing in (D, D) is formed; `apply_GS` starts from independent vectors (of equal pairs no basis can be made, and PEFT normalises
rounding errors there).

Legend: D the width that is turned, R number of reflections.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, SiteFacts, fresh
from ingraft.methods.rotation import Rotation, turned_width, uneven_kernel


@dataclass(frozen=True, kw_only=True)
class HRAConfig(MethodConfig):
    """HRA's hyperparameters.

    Attributes:
        r: number of reflections. Even, or the adapter cannot start as the identity.
        apply_GS: make the vectors orthogonal to each other. The adapter then never is the identity, not at its start either.
        init_weights: start in equal pairs; False starts at random (tests).
    """

    method: ClassVar[str] = "hra"

    r: int = 8
    apply_GS: bool = False
    init_weights: bool = True

    def problems(self) -> list[str]:
        return [] if self.r >= 1 else [f"r must be at least 1, got {self.r}."]


class HRA(Rotation):
    """See the file's header."""

    def __init__(self, config: HRAConfig, facts: SiteFacts) -> None:
        super().__init__(facts)
        self.orthogonal = config.apply_GS
        self.hra_u = fresh(turned_width(facts), config.r, like=facts.matrix())
        nn.init.kaiming_uniform_(self.hra_u, a=math.sqrt(5))
        if config.init_weights and config.r % 2 == 0 and not config.apply_GS:
            with torch.no_grad():
                self.hra_u[:, 1::2] = self.hra_u[:, ::2]

    def turn(self, x: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
        u_DR = self.hra_u.to(dtype)
        gram_RR = u_DR.float().T @ u_DR.float()
        # Of the product of reflections K^-1 is the upper half of U'U with its diagonal halved; orthogonal vectors span the same as these.
        inverse_RR = gram_RR / 2 if self.orthogonal else gram_RR.triu() - gram_RR.diag().diag() / 2
        K_RR = torch.linalg.inv(inverse_RR)  # of W's own product; T is its transpose
        u_DR, along_R = u_DR.to(x.dtype), (x @ u_DR.to(x.dtype)).float()
        return x - (along_R @ (K_RR if back else K_RR.T)).to(x.dtype) @ u_DR.T


def refuses(config: HRAConfig, facts: SiteFacts) -> str | None:
    """More vectors than dimensions cannot be orthogonal."""
    width = turned_width(facts)
    if config.r <= width:
        return None
    return f"hra: {facts.path}: r = {config.r} is more than the {width} dimensions that are reflected. Take at most {width}."


def count(config: HRAConfig, facts: SiteFacts) -> int:
    """A vector for every reflection."""
    return config.r * turned_width(facts)


METHOD = Method(
    name="hra",
    config=HRAConfig,
    part=HRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="HRA",
        kinds=frozenset({"linear", "conv2d"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
        tensors={"hra_u": "hra_u"},
        otherwise=uneven_kernel,
    ),
)
