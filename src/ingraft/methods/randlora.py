"""RandLoRA: a change of full rank, summed up from frozen random ones of rank r that all layers share, with trained diagonals.

    W' = W + s sum_j B_j diag(l_j) A diag(g_j),    s = randlora_alpha / r,    n = min(out, in) / r terms,    l starts at zero

    A (r, min(out, in)), B_j (max(out, in), r), transposed where the layer is wider than high: the diagonals lie on the short side

Paper: Albert et al., "RandLoRA: Full-rank parameter-efficient fine-tuning of large models", ICLR 2025 (arXiv:2502.00987), equation 4.
Read against: Hugging Face PEFT's `randlora` (draws and sizes of the bases, the order of their columns, initial values, scale).
What differs: the bases are written once a file (PEFT writes them again for every layer); the scaled basis, as large as a weight, is made
again in backward instead of kept. Column p of B meets row p of A in PEFT's order (B: term by term, A: row by row), which files need.

Legend: O out, I in, R rank, N terms, S the short side, L the long one, Q = R N.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.config import no_scale
from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pieces import Bank, bank_of, frozen, largest, recomputed, used


@dataclass(frozen=True, kw_only=True)
class RandLoraConfig(MethodConfig):
    """RandLoRA's hyperparameters.

    Attributes:
        r: rank of one term; the smaller, the more terms and trained numbers.
        randlora_alpha: the change is scaled by randlora_alpha / r.
        randlora_dropout: probability of dropping an input of the branch, in [0, 1).
        projection_prng_key: seed of the shared bases.
        save_projection: keep the bases in the file; otherwise they are drawn again from their key.
        sparse, very_sparse: bases of -1, 0 and 1; -1 and 1 have a share of 1/6 each, of 1 / (2 sqrt(d)) with d the largest short side.
        init_weights: False starts l at random (tests).
    """

    method: ClassVar[str] = "randlora"

    r: int = 32
    randlora_alpha: float = 640
    randlora_dropout: float = 0.0
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    init_weights: bool = True

    def problems(self) -> list[str]:
        p, found = self.randlora_dropout, no_scale({"randlora_alpha": self.randlora_alpha})
        found += [] if self.r >= 1 else [f"r must be at least 1, got {self.r}."]
        return found if 0.0 <= p < 1.0 else [*found, f"randlora_dropout must lie in [0, 1), got {p}."]


def shared(config: RandLoraConfig, sites: tuple[SiteFacts, ...]) -> nn.Module:
    """The bases, as large as the largest layer wants them, of deviation one."""
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    short, long = sorted(largest(sites))
    n, r = -(-short // config.r), config.r
    if config.sparse or config.very_sparse:
        share = 0.5 / (math.sqrt(short) if config.very_sparse else 3)
        drawn = [torch.rand(shape, generator=generator) for shape in ((r, 1, short), (long, n, r))]
        A, B = ((u > 1 - share).float() - (u < share).float() for u in drawn)
    else:  # in bfloat16, as PEFT draws them

        def uniform(*shape: int) -> Tensor:
            values = torch.empty(*shape, dtype=torch.bfloat16)
            return nn.init.kaiming_uniform_(values, math.sqrt(5), generator=generator)

        A, B = uniform(r, 1, short), torch.cat([uniform(long, 1, r) for _ in range(n)], dim=1)
    return Bank({"randlora_A": A / A.std(), "randlora_B": B / B.std()}, sites, saved=config.save_projection)


class RandLoRA(ShortcutPart):
    """See the file's header."""

    additive = True

    def __init__(self, config: RandLoraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.scale, self.p, self.bank = config.randlora_alpha / config.r, config.randlora_dropout, bank_of(facts)
        self.short, self.long = min(W_OI.shape), max(W_OI.shape)
        self.high, n = W_OI.shape[1] == self.short, -(-self.short // config.r)
        self.randlora_lambda, self.randlora_gamma = fresh(config.r, n, like=W_OI), fresh(n, self.short, like=W_OI)
        nn.init.constant_(self.randlora_gamma, 1 / max(n, self.short))
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(self.randlora_lambda)

    def scaled(self, l_RN: Tensor, g_NS: Tensor, dtype: torch.dtype) -> Tensor:
        """s A between the diagonals, all terms under one another (Q, S), float32."""
        A_RS = frozen(self, "randlora_A", dtype, l_RN.device).float()[:, :, : self.short]
        return ((self.scale * used(l_RN, dtype))[:, :, None] * A_RS * used(g_NS, dtype)).flatten(0, 1)

    def fixed(self, dtype: torch.dtype) -> Tensor:
        """The B of all terms side by side (L, Q): a view of the bank."""
        B = frozen(self, "randlora_B", dtype, self.randlora_lambda.device)
        return B.flatten(1)[: self.long, : self.randlora_lambda.numel()]

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        delta_LS = self.fixed(W.dtype).float() @ self.scaled(self.randlora_lambda, self.randlora_gamma, W.dtype)
        return (W.float() + (delta_LS if self.high else delta_LS.T)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        x = site.dropout(x, self.p)
        diagonals, fixed_LQ = (self.randlora_lambda, self.randlora_gamma), self.fixed(y.dtype)

        def thin(x: Tensor, l_RN: Tensor, g_NS: Tensor) -> Tensor:
            scaled_QS = self.scaled(l_RN, g_NS, y.dtype).to(y.dtype)
            return site.op(x, scaled_QS) if self.high else site.mix(x, scaled_QS.T)

        if not self.high:
            return y + recomputed(thin, site.op(x, fixed_LQ.T), *diagonals)
        return site.plus(y, recomputed(thin, x, *diagonals), fixed_LQ)


def refuses(config: RandLoraConfig, facts: SiteFacts) -> str | None:
    """A rank above the layer's."""
    if facts.finished or config.r <= min(facts.shape):
        return None
    return f"randlora: {facts.path}: r = {config.r} is above the rank of a {facts.shape[0]} x {facts.shape[1]} weight; at most {min(facts.shape)}."


def count(config: RandLoraConfig, facts: SiteFacts) -> int:
    """n (r + min(out, in)) with n = min(out, in) / r terms, rounded up."""
    return -(-min(facts.shape) // config.r) * (config.r + min(facts.shape))


METHOD = Method(
    name="randlora",
    config=RandLoraConfig,
    part=RandLoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    shared=shared,
    peft=PeftLayout(
        peft_type="RANDLORA",
        kinds=frozenset({"linear", "conv1d-transposed"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
        transposed_field="fan_in_fan_out",
        shared_tensors={"randlora_A": "randlora_A", "randlora_B": "randlora_B"},
    ),
)
