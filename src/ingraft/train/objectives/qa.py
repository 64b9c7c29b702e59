"""Extractive answers: cross entropy of the answer's first and last token among the tokens of the window."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from ingraft.evaluate.spans import window_logits
from ingraft.train.objectives.base import Objective


class QaObjective(Objective):
    """The mean of both cross entropies, a term a window."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        ends_B2 = batch["labels"]
        start_BT, end_BT = window_logits(self.model, {name: x for name, x in batch.items() if name != "labels"})
        first = F.cross_entropy(start_BT, ends_B2[:, 0], reduction="sum")
        return (first + F.cross_entropy(end_BT, ends_B2[:, 1], reduction="sum")) / 2
