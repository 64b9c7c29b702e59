"""HiRA: the weight itself, multiplied entry by entry with a low-rank matrix; the change has the weight's rank.

    W' = W + W * (B A),    A (r, in) random, B (out, r) zero

Paper: Huang et al., "HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models", ICLR 2025 (openreview TwJrTz9cRS),
equation 4.
Read against: Hugging Face PEFT's `hira`.
What differs: ranks may differ from site to site (in PEFT only for a model's second adapter and later ones); one product with W' instead of one
with W and one with the change; grouped convolutions; no dropout, which would need both.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ingraft.methods.contract import Method, PeftLayout, SiteFacts, WeightPart, fresh
from ingraft.methods.layout import Tensors
from ingraft.methods.pattern import PatternedConfig
from ingraft.methods.pieces import used
from ingraft.methods.ranked import above


@dataclass(frozen=True, kw_only=True)
class HiraConfig(PatternedConfig):
    """HiRA's hyperparameters.

    Attributes:
        r: rank of the factor, at least 1 and at most the weight's.
        rank_pattern: other ranks by the end of the module's path (a regular expression), the first that matches.
        init_weights: True: A Kaiming-uniform, B zero; "gaussian": A normal with deviation 1 / r; False: B random too (tests).
    """

    method: ClassVar[str] = "hira"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r"}

    r: int = 32
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    init_weights: bool | str = True

    def problems(self) -> list[str]:
        found = super().problems() + self.below_one("rank_pattern")
        if self.init_weights not in (True, False, "gaussian"):
            found.append(f"init_weights must be true, false or 'gaussian', got {self.init_weights!r}.")
        return found


class HiRA(WeightPart):
    """See the file's header."""

    def __init__(self, config: HiraConfig, facts: SiteFacts) -> None:
        super().__init__()
        high, wide = facts.matrix().shape
        self.hira_A, self.hira_B = fresh(config.r, wide, like=facts.W), fresh(high, config.r, like=facts.W)
        lookup = facts.kind == "embedding"  # there A is the side that is looked up; PEFT starts it at zero
        start, other = (self.hira_B, self.hira_A) if lookup else (self.hira_A, self.hira_B)
        if lookup or config.init_weights == "gaussian":
            nn.init.normal_(start, std=1.0 if lookup else 1.0 / config.r)
        else:
            nn.init.kaiming_uniform_(start, a=math.sqrt(5))
        nn.init.zeros_(other)
        if config.init_weights is False:
            nn.init.normal_(other, std=0.02)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A_RI, B_OR = used(self.hira_A, W.dtype), used(self.hira_B, W.dtype)
        return (W.float() * (1 + B_OR @ A_RI)).to(W.dtype), b


def refuses(config: HiraConfig, facts: SiteFacts) -> str | None:
    """A rank above the layer's."""
    return above(facts, "r", config.r)


def count(config: HiraConfig, facts: SiteFacts) -> int:
    """r (in + out)."""
    return config.r * (facts.shape[0] + facts.shape[1])


def reread(fields: Mapping[str, Any], tensors: Tensors) -> tuple[Mapping[str, Any], Tensors, None]:
    """Without the pattern where all ranks are one: PEFT passed over it, or all sites matched it."""
    ranks = {A.shape[0] for key, A in tensors.items() if key.endswith(("hira_A", "hira_embedding_A")) and A.dim() > 1}
    if not fields.get("rank_pattern") or len(ranks) != 1:
        return fields, tensors, None
    return {**fields, "rank_pattern": None, "r": ranks.pop()}, tensors, None


METHOD = Method(
    name="hira",
    config=HiraConfig,
    part=HiRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="HIRA",
        ignored=("hira_dropout",),
        only={"rank_pattern": {}},  # their first adapter would have other ranks than its file
        reread=reread,
        transposed_field="fan_in_fan_out",
        tensors={"hira_A": "hira_A", "hira_B": "hira_B"},
        embedding_tensors={"hira_A": "hira_embedding_A", "hira_B": "hira_embedding_B"},
        shapes={"hira_A": {"conv": (0, "kernel")}, "hira_B": {"conv": (0, 0, "ones")}},
    ),
)
