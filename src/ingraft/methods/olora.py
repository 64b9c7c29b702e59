"""OLoRA: LoRA that starts from orthonormal directions of the weight.

    W' = W + s (B A - B0 A0),    B0 = Q_r (the first r columns of Q),  A0 = R_r (the first r rows of R),  W = Q R

B starts orthonormal, which keeps the first steps well conditioned.

Paper: Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models", 2024 (arXiv:2406.01775), algorithm 1.
Read against: Hugging Face PEFT's `lora` with `init_lora_weights="olora"`.
What differs: the base keeps its weight (see `residual.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ingraft.methods.contract import Method, SiteFacts
from ingraft.methods.lora import LoraConfig, count
from ingraft.methods.lowrank import LORA_LAYOUT
from ingraft.methods.ranked import rank_above
from ingraft.methods.residual import Residual, compact, reopen
from ingraft.methods.rslora import EitherScaleConfig


@dataclass(frozen=True, kw_only=True)
class OloraConfig(EitherScaleConfig):
    """LoRA's hyperparameters and either scale; see `LoraConfig` and `EitherScaleConfig`. The start has one form only."""

    method: ClassVar[str] = "olora"
    starts: ClassVar[str] = "olora"

    init_lora_weights: bool | str = "olora"


class OLoRA(Residual):
    """See the file's header."""

    def start(self, config: LoraConfig, facts: SiteFacts) -> tuple[Tensor, Tensor]:
        # Only the first r columns enter: QR of those gives Q_r, and R_r is what Q_r makes of the rest.
        Q_OR, _ = torch.linalg.qr(facts.matrix().detach().float()[:, : config.r])
        return Q_OR, Q_OR.mT @ facts.matrix().detach().float()


METHOD = Method(
    name="olora",
    config=OloraConfig,
    part=OLoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=rank_above,
    compact=compact,
    reopen=reopen,
    peft=replace(LORA_LAYOUT, constants={"use_dora": False, "use_rslora": (False, True), "init_lora_weights": "olora"}),
)
