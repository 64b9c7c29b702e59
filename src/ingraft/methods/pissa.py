"""PiSSA: LoRA that starts from the largest singular values of the weight.

    W' = W + s (B A - B0 A0),    s B0 A0 = U_r S_r V_r',    B0 = U_r sqrt(S_r / s),  A0 = sqrt(S_r / s) V_r'

What is trained are the weight's principal directions themselves, instead of noise and zeros beside it.

Paper: Meng et al., "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", NeurIPS 2024
(arXiv:2404.02948), equations 2-4.
Read against: Hugging Face PEFT's `lora` with `init_lora_weights="pissa"`.
What differs: the base keeps its weight (see `residual.py`). The singular vectors are approximated by default, which costs nothing: whatever B0 A0
is, it comes off exactly.
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
class PissaConfig(EitherScaleConfig):
    """LoRA's hyperparameters and either scale; see `LoraConfig` and `EitherScaleConfig`.

    Attributes:
        init_lora_weights: "pissa_niter_N": N subspace iterations for the singular vectors (16 find them in a fraction of a second); "pissa":
            an exact decomposition, which takes seconds for a large weight.
    """

    method: ClassVar[str] = "pissa"
    starts: ClassVar[str] = r"pissa(_niter_\d+)?"

    init_lora_weights: bool | str = "pissa_niter_16"

    @property
    def iterations(self) -> int | None:
        """How many subspace iterations; None for an exact decomposition."""
        _, _, number = str(self.init_lora_weights).partition("_niter_")
        return int(number) if number else None


class PiSSA(Residual):
    """See the file's header."""

    def start(self, config: LoraConfig, facts: SiteFacts) -> tuple[Tensor, Tensor]:
        assert isinstance(config, PissaConfig)
        if facts.finished and config.iterations is not None:
            return self.lora_B, self.lora_A  # the file has them
        W_OI = facts.matrix().detach().float()
        if config.iterations is None:
            U, S, Vh = torch.linalg.svd(W_OI, full_matrices=False)
        else:
            U, S, V = torch.svd_lowrank(W_OI, q=config.r, niter=config.iterations)
            Vh = V.mT
        root_R = (S[: config.r] / self.scale).sqrt()
        return U[:, : config.r] * root_R, root_R[:, None] * Vh[: config.r]


METHOD = Method(
    name="pissa",
    config=PissaConfig,
    part=PiSSA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=rank_above,
    compact=compact,
    reopen=reopen,
    # Their own files hold A and B alone, and mean the exact decomposition of the base they are put into.
    peft=replace(
        LORA_LAYOUT,
        constants={"use_dora": False, "use_rslora": (False, True), "init_lora_weights": "pissa"},
        nearly={
            "init_lora_weights": (
                r"pissa_niter_\d+",
                "pissa",
                "what came off the base's weights was found approximately and is not in the file; the exact decomposition is taken in its place. "
                "Measure the adapter before you trust it.",
            )
        },
    ),
)
