"""Sequence classification: one class a row, cross entropy over the head's outputs."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ingraft.train.objectives.base import HeadObjective


class ClassifyObjective(HeadObjective):
    """Cross entropy of the right class."""

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, reduction="sum")
