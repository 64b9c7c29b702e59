"""MiSS: one small matrix, shared by all shards of the layer's inputs.

    W'[o, i] = W[o, i] + D[i mod r, o],    D (r, out) starts at zero
    "mini":    ... + D[i mod r, o mod mini_r],    D (r, mini_r)
    "bat":     W'_pq = W_pq + W_pq D_p + D_p    for every block (p, q) of r x r,    D (out / r, r, r)

Paper: Kang and Yin, "MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure", arXiv:2409.15371 (formerly Bone).
Read against: Hugging Face PEFT's `miss` (which names the variants by `init_weights`).
What differs: several "bat" adapters each act on the base's weight, and add up.

Legend: O out, I in, R rank, M mini_r.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pieces import divisors, used


@dataclass(frozen=True, kw_only=True)
class MissConfig(MethodConfig):
    """MiSS's hyperparameters.

    Attributes:
        r: length of a shard of the inputs.
        mini_r: length of a shard of the outputs, for "mini"; divides the outputs.
        miss_dropout: probability of dropping an input of the branch, in [0, 1); not with "bat", which has none.
        init_weights: True: the first form, starting at zero; "mini", "bat": the others; False: the first, at random (tests).
    """

    method: ClassVar[str] = "miss"

    r: int = 64
    mini_r: int = 1
    miss_dropout: float = 0.0
    init_weights: bool | str = True

    def problems(self) -> list[str]:
        found = [
            f"{name} must be at least 1, got {n}." for name, n in (("r", self.r), ("mini_r", self.mini_r)) if n < 1
        ]
        if not 0.0 <= self.miss_dropout < 1.0:
            found.append(f"miss_dropout must lie in [0, 1), got {self.miss_dropout}.")
        if self.init_weights not in (True, False, "bat", "mini"):
            found.append(f"init_weights must be true, false, 'bat' or 'mini', got {self.init_weights!r}.")
        return found

    def shape(self, facts: SiteFacts) -> tuple[int, ...]:
        """The shape of D at a site."""
        high = facts.shape[0]
        return {"bat": (high // self.r, self.r, self.r), "mini": (self.r, self.mini_r)}.get(
            str(self.init_weights), (self.r, high)
        )


class MiSS(ShortcutPart):
    """See the file's header."""

    additive = True

    def __init__(self, config: MissConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.shape, self.p, self.r = W_OI.shape, config.miss_dropout, config.r
        self.flat = facts.kind in ("linear", "conv1d-transposed")
        self.miss_block = fresh(*config.shape(facts), like=W_OI)
        if config.init_weights is False:
            nn.init.kaiming_uniform_(self.miss_block, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.miss_block)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        block, (high, wide) = used(self.miss_block, W.dtype), self.shape
        if block.dim() == 3:
            W_PRQR = W.float().unflatten(1, (-1, self.r)).unflatten(0, (-1, self.r))
            changed = W_PRQR + torch.einsum("paqc,pcd->paqd", W_PRQR, block) + block[:, :, None]
            return changed.reshape(W.shape).to(W.dtype), b
        tiled_OI = block.repeat(-(-wide // self.r), high // block.shape[1])[:wide].T
        return (W.float() + tiled_OI).to(W.dtype), b

    def holds(self, kind: str) -> bool:
        return self.miss_block.dim() == 2

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        block_RM, (high, wide) = self.miss_block.to(y.dtype), self.shape
        x = site.dropout(x, self.p)
        block_OR = block_RM.repeat(1, high // block_RM.shape[1]).T
        if self.flat:
            # The sum of the shards, times D repeated: a product with D alone would give all shards of "mini" the same error of rounding.
            return site.plus(y, F.pad(x, (0, -wide % self.r)).unflatten(-1, (-1, self.r)).sum(-2), block_OR)
        shards_RI = torch.eye(self.r, dtype=y.dtype, device=y.device).repeat(1, -(-wide // self.r))[:, :wide]
        return site.low_rank(x, y, shards_RI, block_OR)


def refuses(config: MissConfig, facts: SiteFacts) -> str | None:
    """Shards that do not fit the layer."""
    high, wide = facts.shape
    if config.r > wide:
        return f"miss: {facts.path}: r = {config.r} is longer than its {wide} inputs."
    if config.init_weights == "mini" and high % config.mini_r:
        return f"miss: {facts.path}: mini_r = {config.mini_r} does not divide its {high} outputs. Sizes that do: {divisors(high)}."
    if config.init_weights == "bat" and (high % config.r or wide % config.r):
        sizes = divisors(math.gcd(high, wide))
        return f"miss: {facts.path}: 'bat' cuts a weight of {high} x {wide} into squares; r = {config.r} does not divide it. Sizes that do: {sizes}."
    return None


def count(config: MissConfig, facts: SiteFacts) -> int:
    """r out; r mini_r for "mini"; r out for "bat"."""
    return math.prod(config.shape(facts))


METHOD = Method(
    name="miss",
    config=MissConfig,
    part=MiSS,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="MISS",
        kinds=frozenset({"linear"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
    ),
)
