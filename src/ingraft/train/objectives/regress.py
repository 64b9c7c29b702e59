"""Regression: the square of the error, in standard deviations of the training labels, so that one learning rate suits prices and stars alike."""

from __future__ import annotations

from torch import Tensor

from ingraft.bases.heads import scale_of
from ingraft.train.objectives.base import HeadObjective


class RegressObjective(HeadObjective):
    """Squared error of the one output against the standardised label."""

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        mean, deviation = scale_of(self.model)
        return (logits - (labels - mean) / deviation).square().sum()
