"""VB-LoRA: LoRA whose A and B are put together from pieces, each a mixture of a few vectors of one bank that all layers share.

    W' = W + B A,    piece = sum_t softmax(top-k of its logits)_t v_t

Paper: Li et al., "VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks", NeurIPS 2024 (arXiv:2405.15179), equations 2-4.
Read against: Hugging Face PEFT's `vblora` (shapes, start, selection).
What differs: vectors of 64 unless asked, which divide the layers of more models than PEFT's 256. The start is the paper's, random on both
sides and so not quite the identity. Files that keep the mixture's weights alone are read, not written.

Legend: O out, I in, R rank, V vectors in the bank, L their length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Factors, Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pieces import divisors, used
from ingraft.methods.ranked import above
from ingraft.methods.vblora_layout import reread


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(MethodConfig):
    """VB-LoRA's hyperparameters.

    Attributes:
        r: rank of the change, at least 1 and at most the weight's.
        num_vectors: vectors in the bank.
        vector_length: their length; divides inputs and outputs of every layer.
        topk: how many vectors mix into a piece.
        vblora_dropout: probability of dropping an input of the branch, in [0, 1).
        init_vector_bank_bound, init_logits_std: the bank starts uniform within the bound, logits normal with the deviation.
    """

    method: ClassVar[str] = "vblora"

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 64
    topk: int = 2
    vblora_dropout: float = 0.0
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def problems(self) -> list[str]:
        sizes = {name: getattr(self, name) for name in ("r", "num_vectors", "vector_length", "topk")}
        found = [f"{name} must be at least 1, got {size}." for name, size in sizes.items() if size < 1]
        if self.topk > self.num_vectors:
            found.append(f"topk = {self.topk} must be at most num_vectors = {self.num_vectors}.")
        if not 0.0 <= self.vblora_dropout < 1.0:
            found.append(f"vblora_dropout must lie in [0, 1), got {self.vblora_dropout}.")
        return found


class VectorBank(nn.Module):
    """The vectors (V, L), trained by all sites together."""

    def __init__(self, config: VBLoRAConfig, sites: tuple[SiteFacts, ...]) -> None:
        super().__init__()
        beside = next((p for site in sites for p in site.parameters.values() if not p.is_meta), None)
        self.vblora_vector_bank = fresh(config.num_vectors, config.vector_length, like=beside)
        nn.init.uniform_(self.vblora_vector_bank, -config.init_vector_bank_bound, config.init_vector_bank_bound)


class VBLoRA(ShortcutPart):
    """See the file's header."""

    additive = True

    def __init__(self, config: VBLoRAConfig, facts: SiteFacts) -> None:
        super().__init__()
        (high, wide), length = facts.matrix().shape, config.vector_length
        assert isinstance(facts.shared, VectorBank)
        self.bank, self.topk, self.p = (facts.shared,), config.topk, config.vblora_dropout
        self.vblora_logits_A = fresh(config.r, wide // length, config.num_vectors, like=facts.W)
        self.vblora_logits_B = fresh(high // length, config.r, config.num_vectors, like=facts.W)
        for logits in self.parameters():
            nn.init.normal_(logits, std=config.init_logits_std)

    def _factors(self, dtype: torch.dtype) -> Factors:
        """A and B in float32, from logits and vectors as they are used in this dtype."""
        (bank,) = self.bank
        vectors_VL = used(bank.get_parameter("vblora_vector_bank"), dtype).to(self.vblora_logits_A.device)

        def mixed(logits: Tensor) -> Tensor:
            largest, chosen = used(logits, dtype).topk(self.topk, dim=-1)
            return (largest.softmax(-1)[..., None] * vectors_VL[chosen]).sum(-2)

        B_OR = mixed(self.vblora_logits_B).transpose(1, 2).flatten(0, 1)
        return Factors(B_OR=B_OR, A_RI=mixed(self.vblora_logits_A).flatten(1))

    def factors(self) -> Factors:
        return self._factors(torch.float32)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        change = self._factors(W.dtype)
        return (W.float() + change.B_OR @ change.A_RI).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        change = self._factors(y.dtype)
        return site.low_rank(x, y, change.A_RI, change.B_OR, dropout=self.p)


def refuses(config: VBLoRAConfig, facts: SiteFacts) -> str | None:
    """Vectors that do not divide the layer, and a rank above its own."""
    high, wide = facts.shape
    if high % config.vector_length == 0 and wide % config.vector_length == 0:
        return above(facts, "r", config.r)
    sizes = divisors(math.gcd(high, wide))
    return f"vblora: {facts.path}: vector_length = {config.vector_length} does not divide a weight of {high} x {wide}. Lengths that do: {sizes}."


def count(config: VBLoRAConfig, facts: SiteFacts) -> int:
    """r num_vectors (in + out) / vector_length; the bank beside it, once."""
    return config.r * config.num_vectors * (sum(facts.shape) // config.vector_length)


METHOD = Method(
    name="vblora",
    config=VBLoRAConfig,
    part=VBLoRA,
    sites=("all-linear",),
    identity_at_init=False,
    count=count,
    refuses=refuses,
    shared=VectorBank,
    peft=PeftLayout(
        peft_type="VBLORA",
        kinds=frozenset({"linear", "conv1d-transposed"}),
        accepted={"bias": ("none",)},
        ignored=("save_only_topk_weights",),
        written={"bias": "none"},
        transposed_field="fan_in_fan_out",
        reread=reread,
        shared_tensors={"vblora_vector_bank": "vblora_vector_bank"},
    ),
)
