"""Several labels a row: for each class a yes or no of its own."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ingraft.train.objectives.base import HeadObjective


class MultiLabelObjective(HeadObjective):
    """Binary cross entropy, the mean over classes of each row."""

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1).sum()
