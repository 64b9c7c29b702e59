"""VeRA: one pair of frozen random matrices for all layers, and two trained vectors for each.

    W' = W + diag(b) B diag(d) A,    b (out) starts at zero, d (r) at d_initial;    A and B are the first columns and rows of the shared pair

Paper: Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation", ICLR 2024 (arXiv:2310.11454), equation 2.
Read against: Hugging Face PEFT's `vera` (sizes and draws of the pair, initial values, dropout on the branch's input).
What differs: each adapter has a pair of its own key, whatever else is attached; the pair lies in the base's dtype, so that no layer casts it;
any layer with a matrix.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Factors, Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pieces import Bank, bank_of, frozen, groups_of, largest, used


@dataclass(frozen=True, kw_only=True)
class VeraConfig(MethodConfig):
    """VeRA's hyperparameters.

    Attributes:
        r: rank of the shared pair, at least 1; large, since it costs one number a layer. It may exceed the layer's:
            the pair is random, and each of its r directions has a trained number of its own in d.
        projection_prng_key: seed of the shared pair.
        save_projection: keep the pair in the file; otherwise it is drawn again from its key.
        vera_dropout: probability of dropping an input of the branch, in [0, 1).
        d_initial: where d starts.
        init_weights: False starts b at one and d at random (tests).
    """

    method: ClassVar[str] = "vera"

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = [] if self.r >= 1 else [f"r must be at least 1, got {self.r}."]
        if not 0.0 <= self.vera_dropout < 1.0:
            found.append(f"vera_dropout must lie in [0, 1), got {self.vera_dropout}.")
        return found


def shared(config: VeraConfig, sites: tuple[SiteFacts, ...]) -> nn.Module:
    """The pair, as large as the largest layer wants it."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    high, wide = largest(sites)

    def drawn(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(6.0 / columns)
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)

    pair = {"vera_A": drawn(config.r, wide), "vera_B": drawn(high, config.r)}
    return Bank(pair, sites, saved=config.save_projection)


class VeRA(ShortcutPart):
    """See the file's header."""

    additive = True

    def __init__(self, config: VeraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.shape, self.p, self.bank = W_OI.shape, config.vera_dropout, bank_of(facts)
        self.groups = groups_of(facts)
        self.vera_lambda_b, self.vera_lambda_d = fresh(W_OI.shape[0], like=W_OI), fresh(config.r, like=W_OI)
        if config.init_weights:
            nn.init.zeros_(self.vera_lambda_b)
            nn.init.constant_(self.vera_lambda_d, config.d_initial)
        else:
            nn.init.ones_(self.vera_lambda_b)
            nn.init.normal_(self.vera_lambda_d)

    def pair(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """This layer's part of the shared matrices, A (R, I) and B (O, R)."""
        A_RI, B_OR = (frozen(self, name, dtype, self.vera_lambda_b.device) for name in ("vera_A", "vera_B"))
        return A_RI[:, : self.shape[1]], B_OR[: self.shape[0]]

    def low_rank(self) -> Factors:
        A_RI, B_OR = self.pair(torch.float32)
        return Factors(B_OR=self.vera_lambda_b[:, None] * B_OR, A_RI=self.vera_lambda_d[:, None] * A_RI)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A_RI, B_OR = (matrix.float() for matrix in self.pair(W.dtype))
        b_O, d_R = (used(vector, W.dtype) for vector in (self.vera_lambda_b, self.vera_lambda_d))
        return (W.float() + (b_O[:, None] * B_OR) @ (d_R[:, None] * A_RI)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        A_RI, B_OR = self.pair(y.dtype)
        d_R = self.vera_lambda_d.to(y.dtype).repeat(self.groups)  # every group of a convolution passes through A
        return y + site.mix(site.op(x, A_RI, self.p) * site.out(d_R), B_OR) * site.out(self.vera_lambda_b.to(y.dtype))


def count(config: VeraConfig, facts: SiteFacts) -> int:
    """out + r."""
    return facts.shape[0] + config.r


METHOD = Method(
    name="vera",
    config=VeraConfig,
    part=VeRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    shared=shared,
    peft=PeftLayout(
        peft_type="VERA",
        kinds=frozenset({"linear", "conv1d-transposed"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
        transposed_field="fan_in_fan_out",
        shared_tensors={"vera_A": "vera_A", "vera_B": "vera_B"},
    ),
)
