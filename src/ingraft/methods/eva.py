"""EVA: LoRA that starts from data, and gives each layer the rank its inputs ask for.

    W' = W + s B A,    A = the leading right singular vectors of the layer's inputs X, B = 0

Of all starts with B = 0 this one gives B the largest gradients. The singular values say how much of its inputs' variance each direction
explains; the budget, r for each layer on average, goes to the directions that explain most, at most rho r of them in one layer.

Paper: Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", NeurIPS 2025 (arXiv:2410.07170), algorithm 1.
Read against: Hugging Face PEFT's `initialize_lora_eva_weights`.
What differs: every layer keeps one direction at least. The inputs are not centred. Real tokens of the prompt count as much as those of the
answer. The scale of each layer stays what it was at rank r. Until data have been seen (`ingraft.prepare`; `ingraft train` does it) it is
a LoRA; its files always are.

Legend: N inputs seen, I in, K components kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.as_lora import copied, kept_as_lora
from ingraft.methods.contract import Method, ObservingPart, Site, SiteFacts
from ingraft.methods.lora import LoRA, LoraConfig, count
from ingraft.methods.lowrank import LORA_LAYOUT
from ingraft.methods.ranked import rank_above

SPARE, ITERATIONS = 8, 4
"""Of the randomised decomposition that each batch costs."""


@dataclass(frozen=True, kw_only=True)
class EvaConfig(LoraConfig):
    """LoRA's hyperparameters; see `LoraConfig`.

    Attributes:
        rho: a layer's rank may grow to rho r; 1 leaves every rank at r.
        tau: a layer has seen enough once its directions of two batches in a row have this cosine.
    """

    method: ClassVar[str] = "eva"
    starts: ClassVar[str] = "true|gaussian"

    rho: float = 2.0
    tau: float = 0.99

    def problems(self) -> list[str]:
        found = super().problems()
        if self.rho < 1:
            found.append(f"rho must be at least 1, got {self.rho}.")
        if not 0 < self.tau <= 1:
            found.append(f"tau must lie in (0, 1], got {self.tau}.")
        return found


class EVA(LoRA, ObservingPart):
    """See the file's header. What was seen lives until `prepare` has used it."""

    def __init__(self, config: EvaConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        self.wanted, self.tau = min(int(config.r * config.rho), *facts.shape), config.tau
        self.seen_KI: Tensor | None = None  # the components, each times its singular value
        self.energy, self.settled = 0.0, False

    def observe(self, x: Tensor, site: Site) -> None:
        del site
        if self.settled:
            return
        x_NI = x.float()
        rows = x_NI if self.seen_KI is None else torch.cat([self.seen_KI, x_NI])
        k = min(self.wanted, *rows.shape)
        _, S_K, V_IK = torch.svd_lowrank(rows, q=min(k + SPARE, *rows.shape), niter=ITERATIONS)
        new_KI = V_IK[:, :k].mT
        if self.seen_KI is not None and self.seen_KI.shape == new_KI.shape:
            cosines_K = nn.functional.cosine_similarity(self.seen_KI, new_KI, dim=1).abs()
            self.settled = bool((cosines_K >= self.tau).all())
        self.seen_KI, self.energy = S_K[:k, None] * new_KI, self.energy + float(x_NI.square().sum())

    def explained(self) -> Tensor:
        """Each component's share of the inputs' squares (K)."""
        assert self.seen_KI is not None
        return self.seen_KI.square().sum(1) / max(self.energy, 1e-30)

    def start(self, r: int) -> None:
        """Take the r leading directions, and forget what was seen."""
        assert self.seen_KI is not None
        A_RI = nn.functional.normalize(self.seen_KI[:r], dim=1)
        self.lora_A = nn.Parameter(A_RI.contiguous(), requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(self.lora_B.new_zeros(self.lora_B.shape[0], r), self.lora_B.requires_grad)
        self.seen_KI = None


def prepare(config: EvaConfig, parts: Mapping[str, EVA]) -> EvaConfig:
    """Share the budget out, the largest shares first, and start every part."""
    shares = {path: part.explained() for path, part in parts.items() if part.seen_KI is not None}
    sites = {path: config.at(path) for path in parts}
    budget = sum(min(sites[path].r, len(share)) for path, share in shares.items())
    ranks = {path: 1 if path in shares else sites[path].r for path in parts}
    further = [(float(v), -n, path) for n, (path, share) in enumerate(shares.items()) for v in share[1:].tolist()]
    for _, _, path in sorted(further, reverse=True)[: budget - len(shares)]:
        ranks[path] += 1
    for path in shares:
        parts[path].start(ranks[path])
    alphas = {path: sites[path].scale * r for path, r in ranks.items()}
    return replace(
        config,
        rank_pattern={f"^{path}": r for path, r in ranks.items() if r != config.r},
        alpha_pattern={f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha},
    )


def refuses(config: EvaConfig, facts: SiteFacts) -> str | None:
    """Layers whose inputs are no vectors."""
    if facts.kind not in ("linear", "conv1d-transposed"):
        return f"{facts.path}: eva starts from the vectors that a linear layer gets, and this is none ({facts.kind}). Name linear layers, or use lora."
    return rank_above(config, facts)


METHOD = Method(
    name="eva",
    config=EvaConfig,
    part=EVA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    prepare=prepare,
    compact=kept_as_lora,
    reopen=copied,
    peft=replace(LORA_LAYOUT, fields={"rho": None, "tau": None}),
)
