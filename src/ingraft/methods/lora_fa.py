"""LoRA-FA: LoRA whose A stays as it was drawn; only B is trained.

    W' = W + s B A,    A (r, in) random and frozen, B (out, r) zero

For the gradient of B the backward pass needs A x, which is r wide, and not x: a layer keeps r numbers a token instead of the layer's width. That
saving is real on linear layers (a test counts the bytes); a convolution's own code keeps its input in any case, and so does dropout.

Paper: Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning", 2023 (arXiv:2308.03303), section 3.
Read against: Hugging Face PEFT's `create_lorafa_optimizer`.
What differs: A is no parameter at all, so no optimiser can touch it. B's gradient is used as it is (PEFT's optimiser follows the second version of
the paper and multiplies it by (A A')^-1 / s^2). On an embedding A is drawn and B is zero as well. What is trained is a LoRA, and its files are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ingraft.methods.as_lora import as_lora
from ingraft.methods.contract import Factors, Method, Site, SiteFacts
from ingraft.methods.lora import LoraConfig
from ingraft.methods.lowrank import LORA_LAYOUT, LowRank
from ingraft.methods.ranked import rank_above


@dataclass(frozen=True, kw_only=True)
class LoraFAConfig(LoraConfig):
    """LoRA's hyperparameters; see `LoraConfig`."""

    method: ClassVar[str] = "lora-fa"
    starts: ClassVar[str] = "true|gaussian"


class LoRAFA(LowRank):
    """See the file's header."""

    additive = True

    def __init__(self, config: LoraFAConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        A_RI, B_OR = self.lora_A.detach(), self.lora_B.detach()
        if facts.kind == "embedding":  # the side that LoRA would train from zero is the frozen one here
            nn.init.normal_(A_RI)
            nn.init.zeros_(B_OR)
        del self.lora_A
        self.register_buffer("lora_A", A_RI)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (W.float() + self.delta(W)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return site.low_rank(x, y, self.lora_A, self.lora_B, self.scale, self.p)

    def low_rank(self) -> Factors:
        return Factors(B_OR=self.lora_B, A_RI=self.lora_A, scale=self.scale)


def count(config: LoraFAConfig, facts: SiteFacts) -> int:
    """r out."""
    return config.r * facts.shape[0]


def compact(config: LoraFAConfig, parts: Mapping[str, LoRAFA]) -> tuple[LoraConfig, Mapping[str, Mapping[str, Tensor]]]:
    """The LoRA that it is."""
    return as_lora(config), {path: {"lora_A": p.lora_A, "lora_B": p.lora_B} for path, p in parts.items()}


def reopen(source: Mapping[str, LowRank], target: Mapping[str, LoRAFA]) -> None:
    """The same tensors, A frozen again."""
    for path, part in target.items():
        part.lora_A.copy_(source[path].lora_A)
        part.lora_B.copy_(source[path].lora_B)


METHOD = Method(
    name="lora-fa",
    config=LoraFAConfig,
    part=LoRAFA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=rank_above,
    compact=compact,
    reopen=reopen,
    peft=LORA_LAYOUT,
)
