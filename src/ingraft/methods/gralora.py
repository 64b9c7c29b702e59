"""GraLoRA: a low-rank change of its own for every block of the weight.

    W'_jn = W_jn + s (A_n[:, j] B_j[n])^T,    k x k blocks, each of rank r / k;    s = alpha / (r + hybrid_r)
    with hybrid_r: + s B A, a LoRA of that rank beside the blocks;    B starts at zero

Paper: Jung et al., "GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning", NeurIPS 2025 (arXiv:2505.20355).
Read against: Hugging Face PEFT's `gralora` (layout of the blocks, scale).
What differs: no dropout.

Legend: O out, I in, R rank, N and J blocks of inputs and outputs (k each), Q = R / k, X the inputs of a block, Y its outputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.config import no_scale
from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pieces import divisors, used
from ingraft.methods.ranked import above


@dataclass(frozen=True, kw_only=True)
class GraloraConfig(MethodConfig):
    """GraLoRA's hyperparameters.

    Attributes:
        r: rank of a row of blocks; a block has r / gralora_k, at most its shorter side.
        gralora_k: the weight is cut into gralora_k x gralora_k blocks.
        alpha: the change is scaled by alpha / (r + hybrid_r).
        hybrid_r: rank of an ordinary LoRA beside the blocks; 0 for none.
        init_weights: False starts B at random too (tests).
    """

    method: ClassVar[str] = "gralora"

    r: int = 32
    gralora_k: int = 2
    alpha: float = 64
    hybrid_r: int = 0
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = [
            f"{name} must be at least 1, got {getattr(self, name)}."
            for name in ("r", "gralora_k")
            if getattr(self, name) < 1
        ]
        if self.hybrid_r < 0:
            found.append(f"hybrid_r must be at least 0, got {self.hybrid_r}.")
        found += no_scale({"alpha": self.alpha})
        if not found and self.r % self.gralora_k:
            found.append(f"gralora_k = {self.gralora_k} must divide r = {self.r}. Numbers that do: {divisors(self.r)}.")
        return found


class GraLoRA(ShortcutPart):
    """See the file's header."""

    additive = True
    kinds = frozenset({"linear", "conv1d-transposed"})

    def __init__(self, config: GraloraConfig, facts: SiteFacts) -> None:
        super().__init__()
        (high, wide), k, r = facts.matrix().shape, config.gralora_k, config.r
        self.scale, self.k = config.alpha / (r + config.hybrid_r), k
        self.gralora_A, self.gralora_B = fresh(k, wide // k, r, like=facts.W), fresh(k, r, high // k, like=facts.W)
        hybrid = config.hybrid_r > 0
        self.gralora_A_general = fresh(config.hybrid_r, wide, like=facts.W) if hybrid else None
        self.gralora_B_general = fresh(high, config.hybrid_r, like=facts.W) if hybrid else None
        for name, parameter in self.named_parameters():
            if config.init_weights and "_B" in name:
                nn.init.zeros_(parameter)
            else:  # as wide as the inputs of the side
                bound = 1 / math.sqrt(parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A_NXJQ = used(self.gralora_A, W.dtype).unflatten(2, (self.k, -1))
        B_JNQY = used(self.gralora_B, W.dtype).unflatten(1, (self.k, -1))
        delta = torch.einsum("nxjq,jnqy->jynx", A_NXJQ, B_JNQY).reshape(W.shape)
        if self.gralora_A_general is not None and self.gralora_B_general is not None:
            delta = delta + used(self.gralora_B_general, W.dtype) @ used(self.gralora_A_general, W.dtype)
        return (W.float() + self.scale * delta).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        k, A_NXR, B_JRY = self.k, self.gralora_A.to(y.dtype), self.gralora_B.to(y.dtype)
        u_NJQ = torch.einsum("...nx,nxr->...nr", x.unflatten(-1, (k, -1)), A_NXR).unflatten(-1, (k, -1))
        change = torch.einsum("...jr,jry->...jy", u_NJQ.transpose(-3, -2).flatten(-2), B_JRY).flatten(-2)
        if self.gralora_A_general is not None and self.gralora_B_general is not None:
            u_R = F.linear(x, self.gralora_A_general.to(y.dtype))
            change = change + F.linear(u_R, self.gralora_B_general.to(y.dtype))
        return y + self.scale * change


def refuses(config: GraloraConfig, facts: SiteFacts) -> str | None:
    """Blocks that do not make up the layer, and ranks above theirs or, beside them, the layer's."""
    high, wide = facts.shape
    if high % config.gralora_k == 0 and wide % config.gralora_k == 0:
        return above(facts, "r", config.r) or above(facts, "hybrid_r", config.hybrid_r)
    sizes = divisors(math.gcd(high, wide))
    return f"gralora: {facts.path}: gralora_k = {config.gralora_k} does not cut a weight of {high} x {wide} into blocks. Numbers that do: {sizes}."


def count(config: GraloraConfig, facts: SiteFacts) -> int:
    """(r + hybrid_r) (in + out)."""
    return (config.r + config.hybrid_r) * (facts.shape[0] + facts.shape[1])


METHOD = Method(
    name="gralora",
    config=GraloraConfig,
    part=GraLoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="GRALORA",
        kinds=frozenset({"linear", "conv1d-transposed"}),
        accepted={"bias": ("none",)},
        ignored=("gralora_dropout",),
        written={"bias": "none"},
        transposed_field="fan_in_fan_out",
        tensors={f"gralora_{side}_general": f"gralora_{side}_general.weight" for side in "AB"},
    ),
)
