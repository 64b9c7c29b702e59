"""Learning from answers that the model itself sampled: the policy of PPO and of GRPO, and PPO's value function.

A rollout (`train.rollouts`) has sampled the answers, scored them and worked out by token what they are worth; here only losses are left, of the tokens of the
answers. Policy and value function are two adapters over one base and learn from the same rows, each with an objective of its own (`role`).

Legend: B answers, T tokens; what is told of the token at t + 1 stands at t, as logits do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.examples import IGNORED, Example
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.judges import VALUE, Judge
from ingraft.evaluate.loss import device_of
from ingraft.recipe import Losses
from ingraft.train.objectives.base import Objective
from ingraft.train.objectives.policy_gradient import kl_of_samples, policy_loss, value_loss

TOLD = ("old", "reference", "advantages", "values", "returns")
"""What a rollout tells of each token of an answer: the log-probability when it was sampled, the reference's, what choosing it was worth, what the value function said
before it, and what that should have said. The last two only where there is a value function."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled(Example):
    """A prompt and an answer that was sampled to it.

    Attributes:
        told: by name, see `TOLD`, a number for each token of the sequence but the first, 0 outside of the answer.
    """

    told: dict[str, list[float]] = field(default_factory=dict[str, list[float]])


class SampledObjective(Objective):
    """What policy and value function share. Abstract."""

    beside: ClassVar[frozenset[str]] = frozenset({"labels", *TOLD})

    head: CausalHead | None = None

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:
        self.head = CausalHead(self.model)

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        batch = super().batch(examples)
        width = batch["input_ids"].shape[1]
        rows = [cast(Sampled, example).told for example in examples]
        told = {
            name: torch.stack([F.pad(torch.tensor(row[name]), (0, width - len(row[name]))) for row in rows])
            for name in rows[0]
        }
        return batch | {name: value_BT.to(device_of(self.model)) for name, value_BT in told.items()}

    def seen(self, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
        """What the model's forward is given, labels included, and (B, T) which tokens are answers'."""
        mask_BT = F.pad(batch["labels"][:, 1:] != IGNORED, (0, 1), value=False)
        return self.inputs(batch) | {"labels": batch["labels"]}, mask_BT

    def logps(self, seen: dict[str, Tensor]) -> Tensor:
        """(B, T) log-probabilities of the answers' tokens as the model stands, 0 elsewhere. Differentiable."""
        assert self.head is not None
        return -self.head.by_token(seen)


class PpoObjective(SampledObjective):
    """The clipped surrogate; the distance from the reference is in the advantages.

    Attributes:
        valued: whether a value function is trained along.
    """

    reference: ClassVar[bool] = True
    samples: ClassVar[bool] = True
    valued: ClassVar[bool] = True

    value: ValueObjective | None = None

    def role(self, adapter: str) -> Objective:
        return self.value if adapter == VALUE and self.value is not None else self

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:
        super().begin(together)
        if self.value is not None:
            self.value.head = self.head

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        seen, mask_BT = self.seen(batch)
        logps_BT, settings = self.logps(seen), self.losses.rl
        losses_BT = policy_loss(
            logps_BT, batch["old"], batch["advantages"], settings.clip_range, settings.clip_range_high
        )
        high = settings.clip_range if settings.clip_range_high is None else settings.clip_range_high
        ratio_BT = (logps_BT.detach() - batch["old"]).exp()
        outside_BT = (ratio_BT < 1 - settings.clip_range) | (ratio_BT > 1 + high)
        self.notice("clipped", (outside_BT & mask_BT).sum(), mask_BT.sum())
        return torch.where(mask_BT, losses_BT + self.penalty(logps_BT, batch), 0.0).sum()

    def penalty(self, logps_BT: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """What the loss has beside the surrogate, by token."""
        del batch
        return torch.zeros_like(logps_BT)


class GrpoObjective(PpoObjective):
    """The same with advantages among the answers to a prompt, and the distance from the reference as a term of the loss (Shao et al. 2024, equation 3).

    Averaged over the tokens of the step and not over answers first: short answers do not weigh more by the token (Yu et al. 2025, section 3.3)."""

    valued: ClassVar[bool] = False

    def penalty(self, logps_BT: Tensor, batch: dict[str, Tensor]) -> Tensor:
        return self.losses.rl.kl_coef * kl_of_samples(logps_BT - batch["reference"])


class ValueObjective(SampledObjective):
    """What an answer will still earn, told before each of its tokens."""

    def __init__(self, model: nn.Module, pad_id: int, judge: Judge, losses: Losses) -> None:
        super().__init__(model, pad_id, losses)
        self.judge = judge

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        seen, mask_BT = self.seen(batch)
        assert self.head is not None
        values_BT = self.judge.numbers(self.head.states(seen))
        losses_BT = value_loss(values_BT, batch["values"], batch["returns"], self.losses.rl.clip_range_value)
        total = torch.where(mask_BT, losses_BT, 0.0).sum()
        self.notice("value_loss", total, mask_BT.sum())
        return total
