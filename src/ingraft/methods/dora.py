"""DoRA: LoRA's direction, and a trained magnitude for every output.

    W' = m (W + s B A) / ||W + s B A||,    m starts as ||W||, the norm running over each output's inputs

Paper: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024 (arXiv:2402.09353), equation 5; the norm is held constant in the
backward pass (section 4.3).
Read against: Hugging Face PEFT's `lora` with `use_dora`.
What differs: dropout acts on the low-rank branch only; the base's product is not computed a second time under dropout.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, Site, SiteFacts
from ingraft.methods.layout import Foreign, Modules
from ingraft.methods.lora import count as count_lora
from ingraft.methods.lowrank import LORA_LAYOUT, LowRank
from ingraft.methods.lycoris import LYCORIS_LORA, dora_options
from ingraft.methods.ranked import rank_above
from ingraft.methods.rslora import EitherScaleConfig


@dataclass(frozen=True, kw_only=True)
class DoraConfig(EitherScaleConfig):
    """LoRA's hyperparameters and either scale; see `LoraConfig` and `EitherScaleConfig`."""

    method: ClassVar[str] = "dora"

    def problems(self) -> list[str]:
        found = super().problems()
        if self.lora_bias:
            found.append("lora_bias has no meaning beside DoRA's magnitudes; use lora, or leave it off.")
        return found


class DoRA(LowRank):
    """See the file's header."""

    def __init__(self, config: DoraConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        with torch.no_grad():
            self.magnitude = nn.Parameter(self._norm(facts.matrix()))

    def _norm(self, W_OI: Tensor) -> Tensor:
        """||W + s B A|| of each output (O), float32, without gradient."""
        with torch.no_grad():
            return torch.linalg.vector_norm(W_OI.float() + self.delta(W_OI), dim=1)

    def _factor(self, W_OI: Tensor) -> Tensor:
        return self.magnitude.to(W_OI.dtype).float() / self._norm(W_OI)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (self._factor(W)[:, None] * (W.float() + self.delta(W))).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        factor_O = self._factor(site.weight()).to(y.dtype)
        return site.out(factor_O) * site.low_rank(x, y, self.lora_A, self.lora_B, self.scale, self.p)


def count(config: DoraConfig, facts: SiteFacts) -> int:
    """LoRA's r (in + out), and a magnitude for every output."""
    return count_lora(config, facts) + facts.shape[0]


def read(modules: Modules) -> tuple[MethodConfig, Modules]:
    """From the tensors of a LyCORIS file."""
    options, tensors = dora_options(modules)
    return DoraConfig(**options), tensors


METHOD = Method(
    name="dora",
    config=DoraConfig,
    part=DoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=rank_above,
    foreign=Foreign(names=LYCORIS_LORA | {"lora_mid", "dora_scale"}, marks=LYCORIS_LORA | {"dora_scale"}, read=read),
    peft=replace(
        LORA_LAYOUT,
        experts={},
        constants={"use_dora": True},
        tensors={**LORA_LAYOUT.tensors, "magnitude": "lora_magnitude_vector"},
        embedding_tensors={**LORA_LAYOUT.embedding_tensors, "magnitude": "lora_magnitude_vector"},
        shapes={**LORA_LAYOUT.shapes, "magnitude": {"conv": (1, -1, "ones")}},
    ),
)
