"""LoRA: low-rank adaptation.

    W' = W + s B A,    s = lora_alpha / r,    A (r, in) random, B (out, r) zero

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685), equation 3.
Read against: Hugging Face PEFT's `lora` (initial values, dropout on the branch's input, scale).
What differs: no float32 copy of the input is made; for the backward pass only x and xA' are kept; dropout is a function of seed, step
and position.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh


@dataclass(frozen=True, kw_only=True)
class LoraConfig(MethodConfig):
    """LoRA's hyperparameters.

    Attributes:
        r: rank of the change, at least 1.
        lora_alpha: the change is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of the low-rank branch, in [0, 1).
        init_lora_weights: True: A Kaiming-uniform, B zero, so that the adapter starts as the identity; "gaussian": A normal with
            deviation 1 / r, B zero; False: B random too (tests).
    """

    method: ClassVar[str] = "lora"

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True

    def problems(self) -> list[str]:
        found: list[str] = []
        if self.r < 1:
            found.append(f"r must be at least 1, got {self.r}.")
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        if self.init_lora_weights not in (True, False, "gaussian"):
            found.append(f"init_lora_weights must be true, false or 'gaussian', got {self.init_lora_weights!r}.")
        return found

    @property
    def scale(self) -> float:
        """s in the equation."""
        return self.lora_alpha / self.r


class LowRank(ShortcutPart):
    """A and B with their initial values: the start that LoRA shares with its variants. Abstract."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(self, config: LoraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI = facts.matrix()
        self.scale, self.p = config.scale, config.lora_dropout
        self.lora_A = fresh(config.r, W_OI.shape[1], like=W_OI)
        self.lora_B = fresh(W_OI.shape[0], config.r, like=W_OI)
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

    def branch(self, x: Tensor, site: Site) -> Tensor:
        """s B A x, the way the layer applies its weight."""
        if x.is_floating_point():
            dtype, x = x.dtype, site.dropout(x, self.p)
        else:
            dtype = site.weight().dtype  # ids: an embedding
        u_R = site.op(x, self.lora_A.to(dtype))
        return site.mix(u_R * self.scale, self.lora_B.to(dtype))


class LoRA(LowRank):
    """See the file's header."""

    additive = True

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (W.float() + self.delta(W)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + self.branch(x, site)


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """r (in + out)."""
    assert isinstance(config, LoraConfig)
    return config.r * sum(facts.shape)


LORA_LAYOUT = PeftLayout(
    peft_type="LORA",
    constants={"use_dora": False, "use_rslora": False},
    accepted={"bias": ("none",)},
    off=(
        *("lora_bias", "rank_pattern", "alpha_pattern", "target_parameters", "trainable_token_indices"),
        *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config"),
        *("velora_config", "monteclora_config", "ensure_weight_tying"),
    ),
    written={"bias": "none"},
    ignored=(
        *("megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        "qalora_group_size",
    ),
    aliases={"init_lora_weights": {"eva": True, "orthogonal": True}},
    transposed_field="fan_in_fan_out",
    tensors={"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"},
    embedding_tensors={"lora_A": "lora_embedding_A", "lora_B": "lora_embedding_B"},
    shapes={"lora_A": {"conv2d": (0, "kernel")}, "lora_B": {"conv2d": (0, 0, 1, 1)}},
)
"""PEFT keeps LoRA and its variants under one type; a variant replaces what differs."""

METHOD = Method(
    name="lora",
    config=LoraConfig,
    part=LoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    peft=LORA_LAYOUT,
)
