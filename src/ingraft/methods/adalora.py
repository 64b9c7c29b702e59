"""AdaLoRA: the rank is spent where it counts, and is moved there during training.

    W' = W + s P diag(e) Q,    s = lora_alpha / init_r,    P (out, r) = lora_B, e = lora_E, Q (r, in) = lora_A

P and Q are held near orthonormal by a penalty, so that e are like singular values. A direction's importance is that of its e and the mean of
those of its entries of P and Q: |w dL/dw|, smoothed, times how much it fluctuates, smoothed. From `tinit` on the number of directions with e
other than zero falls along a cubic curve from init_r to target_r a layer on average; for the last `tfinal` steps it stays there.

Paper: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", ICLR 2023 (arXiv:2303.10512), equations 4-12.
Read against: Hugging Face PEFT's `adalora`.
What differs: the budget is met exactly (ties are broken by order; PEFT drops all that tie). Of a schedule that is not given, a tenth of
the steps goes before the budget falls, and three tenths after. Saved are the directions that are left.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.adalora_layout import ADALORA_LAYOUT
from ingraft.methods.allocation import TENSORS, compact, no_time, penalty, schedule_problems, update
from ingraft.methods.contract import Factors, Method, MethodConfig, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.ranked import above


@dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(MethodConfig):
    """AdaLoRA's hyperparameters.

    Attributes:
        init_r: rank of every layer at first. target_r: of a layer on average in the end, at most init_r.
        lora_alpha: the change is scaled by lora_alpha / init_r. lora_dropout: of the inputs of the branch.
        tinit, tfinal: steps before the budget falls, and after; None: a tenth and three tenths of all.
        deltaT: steps from one allocation to the next.
        beta1, beta2: smoothing of importance and of its fluctuation.
        orth_reg_weight: of the penalty that holds P and Q near orthonormal.
        total_step: steps of the training; None: as the trainer says.
        rank_pattern: ranks that were found, by path.
    """

    method: ClassVar[str] = "adalora"

    init_r: int = 12
    target_r: int = 8
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    tinit: int | None = None
    tfinal: int | None = None
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)

    def problems(self) -> list[str]:
        found = [
            f"{n} must be at least 1, got {v}." for n in ("init_r", "target_r", "deltaT") if (v := getattr(self, n)) < 1
        ]
        found += [
            f"{n} must lie in (0, 1), got {v}." for n in ("beta1", "beta2") if not 0 < (v := getattr(self, n)) < 1
        ]
        if not 0.0 <= self.lora_dropout < 1.0:
            found.append(f"lora_dropout must lie in [0, 1), got {self.lora_dropout}.")
        if self.orth_reg_weight < 0:
            found.append(f"orth_reg_weight must not be negative, got {self.orth_reg_weight}.")
        return found + schedule_problems(self)

    def in_steps(self, total: int) -> list[str]:
        reason = no_time(self, self.total_step or total)
        return [] if reason is None else [reason]

    def idle(self, paths: Iterable[str]) -> list[str]:
        known = tuple(paths)
        return super().idle(known) + [
            f"rank_pattern: {key!r} is none of the adapted modules; its keys are their whole paths."
            for key in self.rank_pattern
            if not any(f"{key}.".startswith(path + ".") for path in known)  # a module may hold several matrices
        ]

    def rank(self, path: str) -> int:
        """The rank of a site as it is now."""
        return self.rank_pattern.get(path, self.init_r)


class AdaLoRA(ShortcutPart):
    """See the file's header."""

    additive = True
    training_state = ("kept", *(f"{kind}_{name}" for kind in ("importance", "fluctuation") for name in TENSORS))
    kept: Tensor

    def __init__(self, config: AdaLoraConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI, r = facts.matrix(), config.rank(facts.path)
        self.scale, self.p = config.lora_alpha / (config.init_r + 1e-5), config.lora_dropout
        self.lora_A = nn.init.normal_(fresh(r, W_OI.shape[1], like=W_OI), std=0.02)
        self.lora_B = nn.init.normal_(fresh(W_OI.shape[0], r, like=W_OI), std=0.02)
        self.lora_E = nn.init.zeros_(fresh(r, 1, like=W_OI))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=W_OI.device))
        for name in self.training_state[1:]:
            self.register_buffer(name, torch.zeros_like(self.get_parameter(name.partition("_")[2])))

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        A_RI, B_OR, E_R1 = (p.to(W.dtype).float() for p in (self.lora_A, self.lora_B, self.lora_E))
        return (W.float() + self.scale * (B_OR @ (A_RI * E_R1))).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not self.lora_E.numel():
            return y
        dtype = x.dtype if x.is_floating_point() else site.weight().dtype
        A_RI = self.lora_A.to(dtype) * (
            self.scale * self.lora_E.to(dtype)
        )  # on A's side: a grouped convolution has more channels
        return site.low_rank(x, y, A_RI, self.lora_B, dropout=self.p)

    def low_rank(self) -> Factors:
        return Factors(B_OR=self.lora_B, A_RI=self.lora_A * self.lora_E, scale=self.scale)


def refuses(config: AdaLoraConfig, facts: SiteFacts) -> str | None:
    """A rank above the layer's."""
    return above(facts, "init_r", config.init_r)


def count(config: AdaLoraConfig, facts: SiteFacts) -> int:
    """r (in + out + 1)."""
    return config.rank(facts.path) * (sum(facts.shape) + 1)


METHOD = Method(
    name="adalora",
    config=AdaLoraConfig,
    part=AdaLoRA,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    penalty=penalty,
    update=update,
    compact=compact,
    peft=ADALORA_LAYOUT,
)
