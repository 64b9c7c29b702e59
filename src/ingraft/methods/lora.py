"""LoRA: low-rank adaptation.

    W' = W + s B A,    s = lora_alpha / r,    A (r, in) random, B (out, r) zero

Paper: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022 (arXiv:2106.09685), equation 3.
Read against: Hugging Face PEFT's `lora` (initial values, dropout on the branch's input, scale).
What differs: no float32 copy of the input is made; for the backward pass only x and xA' are kept; dropout is a function of seed, step
and position.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ingraft.methods.adapterhub import factored
from ingraft.methods.contract import Factors, Method, MethodConfig, Site, SiteFacts
from ingraft.methods.layout import Foreign, HubLayout, Modules
from ingraft.methods.lowrank import LORA_LAYOUT, LowRank
from ingraft.methods.lycoris import LYCORIS_LORA, lora_options
from ingraft.methods.ranked import RankedConfig, rank_above


@dataclass(frozen=True, kw_only=True)
class LoraConfig(RankedConfig):
    """LoRA's hyperparameters; see `RankedConfig` for r and its patterns.

    Attributes:
        lora_alpha: the change is scaled by lora_alpha / r.
        lora_dropout: probability of dropping an input of the low-rank branch, in [0, 1).
        init_lora_weights: True: A Kaiming-uniform, B zero, so that the adapter starts as the identity; "gaussian": A normal with
            deviation 1 / r, B zero; False: B random too (tests).
        lora_bias: train a bias of the branch as well, scaled like the rest of it: b' = b + s c.
    """

    method: ClassVar[str] = "lora"
    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    starts: ClassVar[str] = "true|false|gaussian"
    """What `init_lora_weights` may be, as a regular expression."""

    lora_alpha: float = 16
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    lora_bias: bool = False

    def problems(self) -> list[str]:
        found = super().problems()
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        if not re.fullmatch(self.starts, str(self.init_lora_weights), re.IGNORECASE):
            known = self.starts.replace("|", ", ")
            found.append(f"init_lora_weights must be one of {known}, got {self.init_lora_weights!r}.")
        if self.lora_bias and self.starts != LoraConfig.starts:
            found.append(f"lora_bias is an option of lora's; {self.method} has none.")
        return found

    @property
    def scale(self) -> float:
        """s in the equation."""
        return self.lora_alpha / self.r


class LoRA(LowRank):
    """See the file's header."""

    additive = True
    stacks: ClassVar[Mapping[str, int | None] | None] = {"lora_A": 0, "lora_B": 1, "scale": 0}

    def __init__(self, config: LoraConfig, facts: SiteFacts) -> None:
        super().__init__(config, facts)
        self.lora_bias = nn.Parameter(self.lora_B.new_zeros(self.lora_B.shape[0])) if config.lora_bias else None

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.lora_bias is not None:
            c_O = self.scale * self.lora_bias.to(W.dtype).float()
            b = (c_O if b is None else b.float() + c_O).to(W.dtype)
        return (W.float() + self.delta(W)).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        y = site.low_rank(x, y, self.lora_A, self.lora_B, self.scale, self.p)
        return y if self.lora_bias is None else y + site.out(self.scale * self.lora_bias.to(y.dtype))

    def low_rank(self) -> Factors:
        bias = None if self.lora_bias is None else self.scale * self.lora_bias
        return Factors(B_OR=self.lora_B, A_RI=self.lora_A, scale=self.scale, bias=bias)


def refuses(config: LoraConfig, facts: SiteFacts) -> str | None:
    """A rank above the layer's; a bias where a lookup could have none."""
    if config.lora_bias and not facts.takes_bias:
        return f"{facts.path}: lora_bias has no meaning for a layer that adds no bias; leave it off, or this module out of target_modules."
    return rank_above(config, facts)


def count(config: LoraConfig, facts: SiteFacts) -> int:
    """r (in + out), and out once more for a bias."""
    return config.r * sum(facts.shape) + config.lora_bias * facts.shape[0]


def of_factors(changes: Mapping[str, Factors]) -> tuple[LoraConfig, dict[str, dict[str, Tensor]]]:
    """The adapter of these changes, its scale 1 throughout."""
    ranks = {path: change.A_RI.shape[0] for path, change in changes.items()}
    r = max(ranks.values())
    other = {f"^{path}": rank for path, rank in ranks.items() if rank != r}
    bias = any(change.bias is not None for change in changes.values())
    tensors = {path: {"lora_A": change.scale * change.A_RI, "lora_B": change.B_OR} for path, change in changes.items()}
    for path, change in changes.items() if bias else ():
        tensors[path]["lora_bias"] = change.B_OR.new_zeros(change.B_OR.shape[0]) if change.bias is None else change.bias
    return LoraConfig(r=r, lora_alpha=r, rank_pattern=other, alpha_pattern=other, lora_bias=bias), tensors


def read(modules: Modules) -> tuple[MethodConfig, Modules]:
    """From the tensors of a file of kohya-ss, LyCORIS or diffusers."""
    options, tensors = lora_options(modules)
    return LoraConfig(**options), tensors


def read_hub(settings: Mapping[str, Any]) -> LoraConfig | None:
    """From AdapterHub's settings."""
    if not factored(settings, "add"):
        return None
    return LoraConfig(r=settings["r"], lora_alpha=settings["alpha"], lora_dropout=settings.get("dropout", 0.0))


METHOD = Method(
    name="lora",
    config=LoraConfig,
    part=LoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=LORA_LAYOUT,
    of_factors=of_factors,
    hub=HubLayout(read=read_hub, tensors={"lora_A": "lora_A", "lora_B": "lora_B"}, by_module=True),
    foreign=Foreign(names=LYCORIS_LORA | {"lora_mid"}, marks=LYCORIS_LORA, read=read),
)
