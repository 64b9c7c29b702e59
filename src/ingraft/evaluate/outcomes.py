"""What a model did with rows, kept row by row: metrics of any multiset of these rows, without asking the model again.

An interval asks what a metric would have been with other rows of the same kind, a paired test what it would have been had two models changed places on some of
them. Both want a metric of thousands of multisets of the rows that there are. So a scorer's forward passes end in columns with an entry a row, and `metrics` is
a function of these columns, computed by the libraries that everybody checks against.

That function is the definition. Asking scikit-learn thousands of times takes minutes, so there is a way round it: nearly every metric is a quotient of two sums over
rows (a mean is one, F1 is one), which for all multisets at once is a product of two matrices (`ratios`), and what is left is arithmetic on such sums or on ranks
(`others`). A law holds both against the definition; whatever has neither is computed by the definition, which is slow and right.

Rows are the independent units. What belongs together by making (the windows of a context, the answers to one question, the pairs of a ranking) is one entry.

Legend: N rows, R multisets.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self, cast

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Ratio = tuple[Floats, Floats]
"""By row what is summed above the line and below it, (N,) each."""

_BY_ROW = "by_row"


def column() -> Any:
    """A field with an entry for each row: an array whose first dimension is N, or a sequence of N things."""
    return dataclasses.field(metadata={_BY_ROW: True})


@dataclass(frozen=True, kw_only=True, eq=False)
class Outcomes(ABC):
    """Of one task. Fields made by `column()` have an entry a row; the others are the same for all rows. Abstract.

    Attributes:
        yes_or_no: metrics among the ratios that a row counts for or not, unless it counts in part.
        together: metrics that say something of how many rows stand together, so that rows drawn again tell nothing about them.
    """

    yes_or_no: ClassVar[frozenset[str]] = frozenset()
    together: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        lengths = {name: len(getattr(self, name)) for name in self._columns()}
        if len(set(lengths.values())) != 1:
            raise ValueError(f"columns of different lengths: {lengths}")

    @classmethod
    def _columns(cls) -> list[str]:
        return [one.name for one in dataclasses.fields(cls) if _BY_ROW in one.metadata]

    @property
    def count(self) -> int:
        """N."""
        return len(getattr(self, self._columns()[0]))

    def taken(self, rows: Sequence[int] | NDArray[np.int64]) -> Self:
        """These rows, each as often as it is named."""
        return dataclasses.replace(self, **{name: _picked(getattr(self, name), rows) for name in self._columns()})

    def joined(self, other: Self) -> Self:
        """The rows of both, one behind the other; what is the same for all rows is taken from the first."""
        both = {name: _behind(getattr(self, name), getattr(other, name)) for name in self._columns()}
        return dataclasses.replace(self, **both)

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Every metric of these rows, by name. The order of the rows does not matter."""

    @cached_property
    def names(self) -> tuple[str, ...]:
        """What the metrics are called."""
        return tuple(self.metrics())

    def bounds(self) -> dict[str, float]:
        """Ends of intervals that cost nothing, for the log of a run: metrics' names with `_low` and `_high`."""
        return {}

    def ratios(self) -> Mapping[str, Ratio]:
        """The metrics that are quotients of sums over rows; one without anything below the line is 0."""
        return {}

    def others(self, times_RN: Floats) -> Mapping[str, Floats]:
        """Further metrics (R,) that have a way round their definition, as in `resampled`."""
        del times_RN
        return {}

    def resampled(self, times_RN: Floats) -> dict[str, Floats]:
        """Every metric (R,) of many multisets.

        Args:
            times_RN: how often each row is in each multiset, whole numbers; no multiset is empty.
        """
        found = {name: quotient(times_RN @ top, times_RN @ bottom) for name, (top, bottom) in self.ratios().items()}
        found |= self.others(times_RN)
        if lacking := [name for name in self.names if name not in found]:
            rows = np.arange(self.count)
            each = [self.taken(np.repeat(rows, times.astype(np.int64))).metrics() for times in times_RN]
            found |= {name: np.array([metrics[name] for metrics in each]) for name in lacking}
        return {name: found[name] for name in self.names}

    def shares(self) -> dict[str, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
        """The metrics that are shares of rows, here and now: by row whether it counts for, and whether it counts at all, (N,) each."""
        return {
            name: (top > 0, bottom > 0)
            for name, (top, bottom) in self.ratios().items()
            if name in self.yes_or_no
            and np.isin(top, (0, 1)).all()
            and np.isin(bottom, (0, 1)).all()
            and bool((top <= bottom).all())
        }


def mean(values: Sequence[float] | NDArray[Any]) -> Ratio:
    """Of one number a row."""
    top = np.asarray(values, dtype=np.float64)
    return top, np.ones_like(top)


def floats(values: Sequence[float] | Sequence[Sequence[float]] | NDArray[Any]) -> Floats:
    """As an array in double precision."""
    return np.asarray(values, dtype=np.float64)


def quotient(top: Floats, bottom: Floats) -> Floats:
    """top / bottom, 0 where that is 0."""
    return np.divide(top, bottom, out=np.zeros(np.broadcast_shapes(top.shape, bottom.shape)), where=bottom != 0)


def _picked(values: Any, rows: Sequence[int] | NDArray[np.int64]) -> Any:
    if isinstance(values, np.ndarray):
        return cast(Any, values[np.asarray(rows, dtype=np.int64)])
    return [values[row] for row in rows]


def _behind(first: Any, second: Any) -> Any:
    return np.concatenate([first, second]) if isinstance(first, np.ndarray) else [*first, *second]
