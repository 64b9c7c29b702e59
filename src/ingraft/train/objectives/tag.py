"""Tags of words: cross entropy at the first token of each word."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ingraft.train.objectives.base import HeadObjective


class TagObjective(HeadObjective):
    """Cross entropy of the right tag; the other tokens of a word have the label that cross entropy passes over."""

    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
