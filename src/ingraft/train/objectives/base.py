"""What the loop asks of an objective, and nothing more: how much there is to learn in a row, a summed loss, an evaluation.

The loss is a sum and not a mean, because only the loop knows the whole effective batch that it has to be divided by. That is what makes
8 rows at once and 2 rows four times the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ingraft.data import collate
from ingraft.data.examples import Example
from ingraft.evaluate import Evaluation
from ingraft.evaluate.loss import Poll, device_of


class Objective(ABC):
    """One way to learn from examples. Abstract."""

    def __init__(self, model: nn.Module, pad_id: int, task: str) -> None:
        self.model, self.pad_id, self.task = model, pad_id, task

    def begin(self) -> None:  # noqa: B027 - most objectives need nothing
        """Called once when everything is attached, before the first loss."""

    def units(self, example: Example) -> int:
        """How many terms of the loss a row has; the loss is divided by their number over the effective batch."""
        return example.learned

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The tensors of a micro-batch, on the model's device."""
        device = device_of(self.model)
        return {name: value.to(device) for name, value in collate(examples, self.pad_id).items()}

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch in nats, a float32 scalar with a gradient."""

    @abstractmethod
    def evaluate(
        self, examples: Sequence[Example], batch_size: int, *, whole: bool, poll: Poll | None = None
    ) -> Evaluation:
        """Score the adapters that act.

        Args:
            whole: every metric of the task; False leaves out what takes further passes over the rows.
        """

    @property
    def cheap_metrics(self) -> tuple[str, ...]:
        """The metrics that an evaluation has even if it is not whole."""
        return ("loss",)

    @staticmethod
    def lower_is_better(metric: str) -> bool:
        """Losses fall, everything else rises."""
        return metric in ("loss", "perplexity")


def finite(x: Tensor) -> bool:
    """Whether a scalar is neither infinite nor NaN."""
    return bool(torch.isfinite(x).item())
