"""`learning_rate: auto`: a range test ahead of the first step (Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3).

The adapter takes steps at a rate that grows by a constant factor from one to the next, two powers of ten below the method's own rate to two above.
The textbook test watches the loss of the very batches it steps on. With 8 rows a step their differences drown what is looked for, so here the
loss is that of a few fixed rows, without dropout, and the curve is smooth. It is flat, falls, and explodes. Chosen is the rate at which it falls
fastest: where it is lowest the steps are as long as they can be, and a whole run at that rate does not end well.

Afterwards everything is as it was: tensors, moments, counters. The test costs up to `STEPS` steps and as many looks at the fixed rows; it ends as soon as
the loss has exploded. It depends on nothing but what the run depends on, so the same run finds the same rate, and its checkpoints hold it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ingraft.train.learner import Learner

STEPS = 40
DECADES = 2.0
"""Powers of ten on either side of the method's own rate."""

WATCHED = 16
"""Rows whose loss is looked at."""

EXPLODED = 0.5
"""The test ends where the loss is this much above its start, relatively."""


@dataclass(frozen=True, kw_only=True)
class Tested:
    """What a range test found.

    Attributes:
        rate: the one to train with.
        curve: (rate, loss of the watched rows after a step at that rate), in the order of the steps.
        falls: whether the loss fell anywhere; where not, `rate` is the method's own.
    """

    rate: float
    curve: list[tuple[float, float]]
    falls: bool


def rates(own: float) -> list[float]:
    """The rates of the test, rising, around the method's own."""
    return [own * 10 ** (DECADES * (2 * n / (STEPS - 1) - 1)) for n in range(STEPS)]


def range_test(
    learners: Sequence[Learner], own: float, step: Callable[[int, float], None], watched: Callable[[], float]
) -> Tested:
    """Test rates on adapters, which are left as they were.

    Args:
        own: the method's own rate.
        step: makes the step of this number (from 0) at this rate.
        watched: the loss of the fixed rows.
    """
    kept = [
        ({kind: {k: t.clone() for k, t in held.items()} for kind, held in one.tensors().items()}, one.numbers())
        for one in learners
    ]
    start = watched()
    curve: list[tuple[float, float]] = []
    try:
        for number, rate in enumerate(rates(own)):
            step(number, rate)
            loss = watched()
            if not math.isfinite(loss):
                break
            curve.append((rate, loss))
            if loss > (1 + EXPLODED) * start:
                break
    finally:
        for learner, (tensors, numbers) in zip(learners, kept, strict=True):
            learner.optimizer.state.clear()
            learner.restore(tensors, numbers)
    found = fastest(start, curve)
    return Tested(rate=own if found is None else found, curve=curve, falls=found is not None)


def fastest(start: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """The rate at which the loss falls fastest, over three steps; None where it is never below its start."""
    losses = [start, *(loss for _, loss in curve)]
    if min(losses) >= start:
        return None
    lowest = losses.index(min(losses))
    falls = {n: losses[max(0, n - 2)] - losses[min(len(losses) - 1, n + 1)] for n in range(1, lowest + 1)}
    return curve[max(falls, key=lambda n: falls[n]) - 1][0]
