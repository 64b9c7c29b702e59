"""SHiRA: a sparse change; a few of the weight's own entries are trained, at places drawn once.

    W' = W + S,    S has r (out + in) entries, as many as a LoRA of rank r has, and starts at zero

Paper: Bhardwaj et al., "Sparse High Rank Adapters", NeurIPS 2024 (arXiv:2406.13175), section 3; the random mask.
Read against: Hugging Face PEFT's `shira` (number of entries, draw and order of the places).
What differs: W' copies W once and changes the entries in place of a dense sum; the gradient reads those entries and makes no sparse tensor;
the same seed gives the same places without `random_seed` too.

Legend: O out, I in, N entries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, SiteFacts, WeightPart, fresh
from ingraft.methods.pieces import used


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(MethodConfig):
    """SHiRA's hyperparameters.

    Attributes:
        r: r (out + in) entries are trained; it does not bound the rank.
        mask_type: how the places are chosen: "random".
        random_seed: seed of the places, the same for all layers of one shape; None takes the adapter's own, another for every layer.
        init_weights: False starts the entries at random (tests).
    """

    method: ClassVar[str] = "shira"

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    init_weights: bool = True

    def problems(self) -> list[str]:
        found = [] if self.r >= 1 else [f"r must be at least 1, got {self.r}."]
        if self.mask_type != "random":
            found.append(f"mask_type must be 'random', got {self.mask_type!r}.")
        return found


class SHiRA(WeightPart):
    """See the file's header."""

    shira_indices: Tensor
    """Row and column of every entry, (2, N)."""

    def __init__(self, config: ShiraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI, n = facts.matrix(), count(config, facts)
        generator = None if config.random_seed is None else torch.Generator().manual_seed(config.random_seed)
        if facts.finished:  # the file tells
            chosen_N = torch.zeros(n, dtype=torch.int64)
        else:
            chosen_N = torch.randperm(W_OI.numel(), generator=generator)[:n].sort().values
        places = torch.stack([chosen_N // W_OI.shape[1], chosen_N % W_OI.shape[1]])
        self.register_buffer("shira_indices", places.to(W_OI.device, torch.int32))
        self.shira_weight = fresh(n, like=W_OI)
        (nn.init.zeros_ if config.init_weights else nn.init.normal_)(self.shira_weight)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        where = tuple(self.shira_indices.long())
        return W.index_put(where, (W[where].float() + used(self.shira_weight, W.dtype)).to(W.dtype)), b


def refuses(config: ShiraConfig, facts: SiteFacts) -> str | None:
    """More entries than the weight has."""
    high, wide = facts.shape
    if (most := high * wide // (high + wide)) >= config.r:
        return None
    return (
        f"shira: {facts.path}: r = {config.r} asks for {config.r * (high + wide)} entries of a weight of {high} x {wide}; "
        + (f"r must be at most {most}." if most else "leave this module out of target_modules.")
    )


def count(config: ShiraConfig, facts: SiteFacts) -> int:
    """r (out + in)."""
    return config.r * (facts.shape[0] + facts.shape[1])


METHOD = Method(
    name="shira",
    config=ShiraConfig,
    part=SHiRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="SHIRA",
        kinds=frozenset({"linear"}),
        transposed_field="fan_in_fan_out",
    ),
)
