"""Metrics of each file of an evaluation, beside those of all rows: a mean over several tasks hides the one that was forgotten.

A file is scored as if there were no other, so its metrics are those of an evaluation of that file alone. That is a second pass over the rows: metrics such as F1 are
no means over rows, so those of the whole cannot be had from the parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingraft.evaluate.loss import Poll

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet
    from ingraft.evaluate.scorer import Scorer


def of_files(
    scorer: Scorer, data: DataSet, part: str, batch_size: int, *, whole: bool = True, poll: Poll | None = None
) -> dict[str, float]:
    """The metrics of each file of a part, as `metric@file`; none where it has one file."""
    found: dict[str, float] = {}
    origins = data.parts[part].origins
    for origin in origins if len(origins) > 1 else ():
        if not origin.examples:
            continue
        metrics = scorer.evaluate(data.of(part, origin), part, batch_size, whole=whole, poll=poll)
        found |= {f"{name}@{origin.name}": value for name, value in metrics.items()}
    return found


def plain_name(metric: str) -> str:
    """What is measured, whichever file it is measured on."""
    return metric.partition("@")[0]
