"""What the loop asks of an objective, and nothing more: how much there is to learn in a row, and a summed loss.

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
from ingraft.evaluate.loss import device_of


class Objective(ABC):
    """One way to learn from examples. Abstract."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        self.model, self.pad_id = model, pad_id

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


class HeadObjective(Objective):
    """A loss of what a head of its own puts out. Abstract."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return self.of(self.model(**inputs).logits.float(), batch["labels"])

    @abstractmethod
    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The summed loss.

        Args:
            logits: in float32. labels: as `collate` makes them.
        """


def finite(x: Tensor) -> bool:
    """Whether a scalar is neither infinite nor NaN."""
    return bool(torch.isfinite(x).item())
