"""What the loop asks of an objective, and nothing more: how much there is to learn in a row, and a summed loss.

The loss is a sum and not a mean, because only the loop knows the whole effective batch that it has to be divided by. That is what makes
8 rows at once and 2 rows four times the same step.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from ingraft.data import collate
from ingraft.data.examples import Example
from ingraft.evaluate.loss import Poll, as_computed, device_of
from ingraft.recipe import Losses

if TYPE_CHECKING:
    from ingraft.train.roofline import Meter


class Objective(ABC):
    """One way to learn from examples. Abstract.

    Attributes:
        beside: what a batch holds that the model is not given.
        reference: whether a policy is compared with what it was at first.
        samples: whether it learns from answers that the model itself samples, several times from the same ones.
    """

    beside: ClassVar[frozenset[str]] = frozenset({"labels"})
    reference: ClassVar[bool] = False
    samples: ClassVar[bool] = False

    def __init__(self, model: nn.Module, pad_id: int, losses: Losses | None = None) -> None:
        """Args:
        losses: settings that only some objectives have; None for the usual ones.
        """
        self.model, self.pad_id, self.losses = model, pad_id, losses or Losses()
        self._noticed: dict[str, list[Tensor]] = {}

    def role(self, adapter: str) -> Objective:
        """The objective of one of several adapters that are trained together."""
        del adapter
        return self

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:  # noqa: B027 - most objectives need nothing
        """Called once when everything is attached, before the first loss.

        Args:
            together: all training rows, in groups that are the same in every process of a run; given where there is a reference.
        """

    def ready(  # noqa: B027 - most objectives need nothing
        self, rows: Sequence[Example], size: int, meter: Meter | None = None, poll: Poll | None = None
    ) -> None:
        """Called with the rows of a step ahead of their micro-batches, dropout standing at the step.

        Args:
            size: rows that go through at once. meter: counts the work. poll: may raise to stop.
        """

    def sequences(self, examples: Sequence[Example]) -> list[Example]:
        """What goes through the model for these rows, in the batch's order."""
        return [sequence for example in examples for sequence in example.sequences]

    def units(self, example: Example) -> int:
        """How many terms of the loss a row has; the loss is divided by their number over the effective batch."""
        return example.learned

    def batch(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """The tensors of a micro-batch, on the model's device."""
        device = device_of(self.model)
        return {name: value.to(device) for name, value in collate(self.sequences(examples), self.pad_id).items()}

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the model is given of a batch."""
        return as_computed(self.model, {name: value for name, value in batch.items() if name not in self.beside})

    def notice(self, name: str, total: Tensor, count: Tensor) -> None:
        """Add to a mean that the next line of the log tells, beside the loss."""
        was = self._noticed.get(name)
        now = [total.detach().cpu(), count.detach().cpu()]
        self._noticed[name] = now if was is None else [a + b for a, b in zip(was, now, strict=True)]

    def taken(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of what was noticed since the last call."""
        noticed, self._noticed = self._noticed, {}
        return {name: (float(total), float(count)) for name, (total, count) in noticed.items()}

    @abstractmethod
    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        """The summed loss of a micro-batch in nats, a float32 scalar with a gradient."""


class HeadObjective(Objective):
    """A loss of what a head of its own puts out. Abstract."""

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        return self.of(self.model(**self.inputs(batch)).logits.float(), batch["labels"])

    @abstractmethod
    def of(self, logits: Tensor, labels: Tensor) -> Tensor:
        """The summed loss.

        Args:
            logits: in float32. labels: as `collate` makes them.
        """


def finite(x: Tensor) -> bool:
    """Whether a scalar is neither infinite nor NaN."""
    return bool(torch.isfinite(x).item())
