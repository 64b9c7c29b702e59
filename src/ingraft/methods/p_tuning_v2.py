"""P-tuning v2: learned keys and values in every layer, trained as they are, with a classification head beside them.

    softmax(q [K_p; K]') [V_p; V]        in every attention, K_p and V_p trained directly

Paper: Liu et al., "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally Across Scales and Tasks", ACL 2022
(arXiv:2110.07602), section 3.
Read against: Hugging Face PEFT's `prefix_tuning` without projection, under which its files are kept.
What differs from `prefix`: never a re-parametrisation (the paper finds it to help on some tasks and to harm on others); the length is a matter
of the task: about 20 for classification, about 100 for tagging and question answering. On a classifier the head is trained as well
(`modules_to_save`). The paper's multi-task start is a run that starts from another run's adapter (`--init-adapter`).

Legend: P prefix length, H key-value heads, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ingraft.methods.contract import AttentionPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts
from ingraft.methods.prefix import drawn


@dataclass(frozen=True, kw_only=True)
class PTuningV2Config(MethodConfig):
    """P-tuning v2's hyperparameters.

    Attributes:
        num_virtual_tokens: P, at least 1.
        init_std: deviation of the initial keys and values.
    """

    method: ClassVar[str] = "p-tuning-v2"

    num_virtual_tokens: int = 20
    init_std: float = 0.02

    def problems(self) -> list[str]:
        if self.num_virtual_tokens >= 1:
            return []
        return [f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}."]


class DeepPrompt(AttentionPart):
    """See the file's header."""

    def __init__(self, config: PTuningV2Config, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.num_virtual_tokens
        self.key, self.value = drawn(facts, self.length, config.init_std)

    def keys_values(self, shared: Any, rows: RowsAtHand) -> tuple[Tensor, Tensor]:
        del shared, rows
        return self.key, self.value


def count(config: PTuningV2Config, facts: SiteFacts) -> int:
    """Keys and values of one site."""
    return 2 * config.num_virtual_tokens * facts.heads * facts.head_width


METHOD = Method(
    name="p-tuning-v2",
    config=PTuningV2Config,
    part=DeepPrompt,
    sites=("attention",),
    identity_at_init=False,
    count=count,
    peft=PeftLayout(
        peft_type="PREFIX_TUNING",
        fields={"init_std": None},
        accepted={"num_transformer_submodules": (None, 1), "prefix_projection": (None, False)},
        written={"num_transformer_submodules": 1, "prefix_projection": False, "encoder_hidden_size": None},
        ignored=("token_dim", "num_attention_heads", "num_layers", "init_weights"),
        tensors={"key": "key", "value": "value"},
        stacked="prompt_embeddings",
    ),
)
