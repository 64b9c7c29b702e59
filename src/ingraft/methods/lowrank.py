"""What LoRA and its variants share: A and B with their initial values, their product, and the place PEFT keeps them in.

A variant that only starts elsewhere changes the start and nothing else; one that computes otherwise imports the product.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torch import Tensor, nn

from ingraft.methods.contract import PeftLayout, ShortcutPart, SiteFacts, fresh

if TYPE_CHECKING:
    from ingraft.methods.lora import LoraConfig


class LowRank(ShortcutPart):
    """A and B with their initial values: the start that LoRA shares with its variants. Abstract."""

    def __init__(self, config: LoraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.scale, self.p = config.scale, config.lora_dropout
        self.lora_A = fresh(config.r, W_OI.shape[1], like=W_OI)
        self.lora_B = fresh(W_OI.shape[0], config.r, like=W_OI)
        if facts.finished:
            return
        lookup = isinstance(facts.module, nn.Embedding)  # there A is the side that is looked up; PEFT starts it at zero
        start, other = (self.lora_B, self.lora_A) if lookup else (self.lora_A, self.lora_B)
        if lookup or config.init_lora_weights == "gaussian":
            nn.init.normal_(start, std=1.0 if lookup else 1.0 / config.r)
        else:
            nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        nn.init.zeros_(other)
        if config.init_lora_weights is False:
            nn.init.normal_(other, std=0.02)

    def delta(self, W_OI: Tensor) -> Tensor:
        """s B A in float32, from A and B as they are used beside W."""
        A_RI, B_OR = self.lora_A.to(W_OI.dtype).float(), self.lora_B.to(W_OI.dtype).float()
        return self.scale * (B_OR @ A_RI)


LORA_LAYOUT = PeftLayout(
    peft_type="LORA",
    constants={"use_dora": False, "use_rslora": False},
    accepted={"bias": ("none",)},
    off=(
        *("layer_replication", "alora_invocation_tokens"),
        *("use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
        *("velora_config", "monteclora_config"),
    ),
    written={"bias": "none"},
    ignored=(
        *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "qalora_group_size",
    ),
    # A file holds what training made of the start. LoftQ's is the start over the base as nf4 has it, which one iteration leaves as it is.
    aliases={"init_lora_weights": {"eva": True, "orthogonal": True, "loftq": True}},
    unreadable={
        "init_lora_weights": dict.fromkeys(
            ("corda", "lora_ga", "mica"),
            "that start changed the base's weights, which the file does not hold. Save it as an ordinary LoRA first: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...).",
        )
    },
    transposed_field="fan_in_fan_out",
    ties="ensure_weight_tying",
    tokens="trainable_token_indices",
    experts={"lora_A": 0, "lora_B": -1},
    twice=("lora_B",),
    tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "lora_bias": "lora_B.bias"},
    embedding_tensors={"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    shapes={"lora_A": {"conv": (0, "kernel")}, "lora_B": {"conv": (0, 0, "ones")}},
)
"""PEFT keeps LoRA and its variants under one type; a variant replaces what differs."""
