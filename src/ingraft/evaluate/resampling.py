"""How far a metric can be trusted, and whether two models differ in it: the rows that were scored, drawn again.

*Intervals.* A share of rows (accuracy, exact match) has Wilson's interval (1927), which is right near 0 and 1 too, where resampling sees no spread: 20 rows of 20 are no
proof of 100 %. Everything else has the bootstrap's (Efron 1979) over rows, bias-corrected and accelerated (BCa, Efron 1987): its ends are quantiles of the metric over
multisets of as many rows, moved by how far the metric itself lies from the middle of these and by how its spread changes with its height. So it fits crooked
metrics (a correlation of 0.98, a perplexity) and never leaves the metric's own range. The acceleration is taken from leaving out the rows in at most `FOLDS` parts.
A few metrics are moved by resampling itself, a calibration error upwards for one, as few rows move them: nearly all multisets then lie on one side of the metric,
and the interval is their spread turned round about it (the basic bootstrap), since the metric lies from the truth as they lie from the metric. Every interval is
stretched to hold its metric. How often they hold the truth was measured (docs/lab-notes.md).

*Differences* of two models on the same rows: the interval of the difference, both resampled by the same rows, and p, how often chance alone would make as large a
difference. For shares that is McNemar's exact test (1947): among the rows that only one of them gets right, each is as likely as the other. Else it is the
permutation test over rows (approximate randomisation, Noreen 1989): were the models alike, each row's two outcomes might as well have changed places. It holds for
any metric, F1 and BLEU among them, and its p is at least 1 / (R + 1).

Nothing here says that other rows would come from where these do, and p is of one metric, whatever others were looked at beside it.

Legend: N rows, R multisets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ingraft.errors import IngraftError
from ingraft.evaluate.outcomes import Floats, Outcomes
from ingraft.evaluate.preference import wilson

ROOM = 2**22
"""Numbers in the largest array of multisets, 32 MB."""

FOLDS = 200
"""Parts in which rows are left out to see how the spread changes."""

FAR = 1.0
"""Standard deviations of a normal variable beyond which a metric lies too far from the middle of its multisets for BCa."""

MCNEMAR, PERMUTATION = "mcnemar", "permutation"

Interval = tuple[float, float]

_Resampled = Callable[[Floats], Mapping[str, Floats]]


@dataclass(frozen=True, kw_only=True)
class Resampling:
    """How to resample.

    Attributes:
        confidence: the share of such intervals that hold what they are about. count: multisets, R. seed: of their rows.
    """

    confidence: float = 0.95
    count: int = 2000
    seed: int = 42

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise IngraftError(f"confidence: {self.confidence} is not from 0.5 to below 1; 0.95 is usual.")


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of two models in a metric.

    Attributes:
        value: the first's less the second's. interval: of it, if the metric has one. p: see above. test: which one p is of.
    """

    value: float
    interval: Interval | None
    p: float
    test: str


def intervals(outcomes: Outcomes, how: Resampling) -> dict[str, Interval | None]:
    """By metric its interval; None where the rows tell nothing of its spread: a single row, or rows that are all alike in it."""
    metrics = outcomes.metrics()
    found: dict[str, Interval | None] = dict.fromkeys(metrics)
    if outcomes.count > 1:
        resampled = _bootstrapped(metrics, outcomes.resampled, outcomes.count, how)
        found |= {name: ends for name, ends in resampled.items() if ends[0] < ends[1] and name not in outcomes.together}
    z = NormalDist().inv_cdf((1 + how.confidence) / 2)
    for name, (for_N, counts_N) in outcomes.shares().items():
        if name in found and (rows := int(counts_N.sum())):
            found[name] = wilson(int(for_N.sum()) / rows, rows, z)
    return found


def compared(one: Outcomes, other: Outcomes, how: Resampling) -> dict[str, Difference]:
    """By metric how the first differs from the second, on the same rows in the same order.

    Raises:
        IngraftError: they are not as many rows, or fewer than two.
    """
    if type(one) is not type(other) or one.count != other.count:
        raise IngraftError(
            f"Two models can be compared only on the same rows; these were scored on {one.count} and {other.count}."
        )
    if one.count < 2:
        raise IngraftError("A comparison needs at least two rows.")
    ours, theirs = one.metrics(), other.metrics()
    differences = {name: ours[name] - theirs[name] for name in ours if name in theirs}

    def resampled(times_RN: Floats) -> dict[str, Floats]:
        first, second = one.resampled(times_RN), other.resampled(times_RN)
        return {name: first[name] - second[name] for name in differences}

    ends = _bootstrapped(differences, resampled, one.count, how)
    chances = _swapped(differences, one, other, how)
    found = {
        name: Difference(
            value=value, interval=None if name in one.together else ends[name], p=chances[name], test=PERMUTATION
        )
        for name, value in differences.items()
    }
    first, second = one.shares(), other.shares()
    for name in found.keys() & first.keys() & second.keys():
        both_N = first[name][1] & second[name][1]
        a_N, b_N = first[name][0] & both_N, second[name][0] & both_N
        p = mcnemar(int((a_N & ~b_N).sum()), int((b_N & ~a_N).sum()))
        found[name] = Difference(value=found[name].value, interval=found[name].interval, p=p, test=MCNEMAR)
    return found


def mcnemar(first: int, second: int) -> float:
    """How likely the rows that only one of two is right on are shared out at least as unevenly, by chance alone (exact, two-sided).

    Args:
        first, second: rows on which only the first is right, and only the second.
    """
    count, ways, tail = first + second, 1, 0
    for k in range(min(first, second) + 1):
        tail += ways
        ways = ways * (count - k) // (k + 1)
    return min(1.0, 2 * (tail / 2**count))


def _bootstrapped(metrics: dict[str, float], resampled: _Resampled, rows: int, how: Resampling) -> dict[str, Interval]:
    parts = [resampled(times_RN) for times_RN in _draws(rows, how)]
    without = resampled(_left_out(rows))
    return {
        name: bca(value, np.concatenate([part[name] for part in parts]), without[name], how.confidence)
        for name, value in metrics.items()
    }


def bca(value: float, drawn_R: Floats, without_F: Floats, confidence: float) -> Interval:
    """The interval of a metric, bias-corrected and accelerated (or turned round, see above), and stretched to hold the metric.

    Args:
        value: the metric. drawn_R: what it was over multisets. without_F: and with a part of the rows left out.
    """
    normal, count = NormalDist(), len(drawn_R)
    near = 1e-9 * max(1.0, abs(value))  # equal but for rounding
    below = (drawn_R < value - near).sum() + 0.5 * (np.abs(drawn_R - value) <= near).sum()
    bias = normal.inv_cdf(float(np.clip(below / count, 0.5 / count, 1 - 0.5 / count)))
    if abs(bias) > FAR:
        low, high = np.quantile(drawn_R, [(1 - confidence) / 2, (1 + confidence) / 2])
        ends = [float(2 * value - high), float(2 * value - low)]
        if drawn_R.min() >= 0:  # what is never negative stays so
            ends = [max(0.0, end) for end in ends]
        return min(*ends, value), max(*ends, value)
    apart_F = without_F.mean() - without_F
    apart_F[np.abs(apart_F) <= near * 1e-3] = 0.0
    squares = float(np.square(apart_F).sum())
    acceleration = float((apart_F**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
    ends = []
    for share in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(share)
        at = normal.cdf(bias + z / max(1e-3, 1 - acceleration * z))
        ends.append(float(np.quantile(drawn_R, at)))
    return min(*ends, value), max(*ends, value)


def _swapped(differences: dict[str, float], one: Outcomes, other: Outcomes, how: Resampling) -> dict[str, float]:
    """By metric the share of exchanges that leave at least as large a difference."""
    both, rng = one.joined(other), np.random.default_rng([how.seed, 1])
    as_large = dict.fromkeys(differences, 1)  # the one that was seen
    for size in _blocks(2 * one.count, how.count):
        swapped_RN = rng.integers(0, 2, (size, one.count)).astype(np.float64)
        first = both.resampled(np.concatenate([1 - swapped_RN, swapped_RN], axis=1))
        second = both.resampled(np.concatenate([swapped_RN, 1 - swapped_RN], axis=1))
        for name, value in differences.items():
            least = abs(value) - 1e-9 * max(1.0, abs(value))
            as_large[name] += int((np.abs(first[name] - second[name]) >= least).sum())
    return {name: count / (how.count + 1) for name, count in as_large.items()}


def _draws(rows: int, how: Resampling) -> Iterator[Floats]:
    """Multisets of as many rows, some at a time: (r, N), how often each row is in each."""
    rng = np.random.default_rng([how.seed, 0])
    for size in _blocks(rows, how.count):
        drawn_RN = rng.integers(0, rows, (size, rows)) + rows * np.arange(size)[:, None]
        yield np.bincount(drawn_RN.ravel(), minlength=size * rows).reshape(size, rows).astype(np.float64)


def _left_out(rows: int) -> Floats:
    """(F, N) all rows but a part, for each part."""
    folds = min(rows, FOLDS)
    part_N = cast("NDArray[np.int64]", np.arange(rows)) % folds
    return (part_N != np.arange(folds)[:, None]).astype(np.float64)


def _blocks(width: int, count: int) -> Iterator[int]:
    step = max(1, ROOM // width)
    for start in range(0, count, step):
        yield min(step, count - start)
