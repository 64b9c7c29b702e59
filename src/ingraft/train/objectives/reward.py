"""A reward model: one number for prompt and answer, larger for the answer that people prefer (Bradley-Terry over all pairs of a row)."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from ingraft.evaluate.preference import bradley_terry
from ingraft.train.objectives.preference import PairsObjective


class RewardObjective(PairsObjective):
    """What the better answer's number lacks to being above the worse one's for sure."""

    told: ClassVar[tuple[str, str, str, str]] = ("chosen", "rejected", "accuracy", "margin")

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        scores_S = self.model(**self.inputs(batch)).logits.float()[:, 0]
        pairs = self.compared(scores_S, batch)
        return pairs.total(bradley_terry(pairs.margins(scores_S)))
