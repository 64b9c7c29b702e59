"""LN tuning: the scales and shifts of the norms.

    w' = M_w,  b' = M_b,    each starting as a float32 copy of a norm's own

Paper: Zhao et al., "Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning", ICLR 2024 (arXiv:2312.11420).
Read against: Hugging Face PEFT's `ln_tuning`.
What differs: every norm of the model is found by what it is (LayerNorm, any RMSNorm, GroupNorm, BatchNorm's scale and shift), not by a list of
names for each family; several adapters act together; merging swaps no modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, SiteFacts
from ingraft.methods.full import Full
from ingraft.methods.full import count as count_full


@dataclass(frozen=True, kw_only=True)
class LNTuningConfig(MethodConfig):
    """LN tuning has no hyperparameters; `target_modules` chooses norms (default: all)."""

    method: ClassVar[str] = "ln-tuning"


def refuses(config: LNTuningConfig, facts: SiteFacts) -> str | None:
    """Anything but a norm."""
    del config
    if facts.kind == "norm":
        return None
    return f"ln-tuning: {facts.path} is no norm. Name norms, or train this module with the method full."


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """The norm's own parameters."""
    return count_full(config, facts)


METHOD = Method(
    name="ln-tuning",
    config=LNTuningConfig,
    part=Full,
    sites=("norms",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    hint="It has no norms with parameters of their own.",
    peft=PeftLayout(
        peft_type="LN_TUNING",
        tensors={"weight": "ln_tuning_layers.weight", "bias": "ln_tuning_layers.bias"},
    ),
)
