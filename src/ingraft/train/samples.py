"""Which rows are shown, answered before and after training, because a number does not show what changed."""

from __future__ import annotations

from collections.abc import Sequence

from ingraft.data.examples import Example

COUNT = 3
"""Rows that a report shows at least."""

LONGEST_PROMPT = 400
"""In tokens; a longer one fills the report without telling more."""


def choose(examples: Sequence[Example], count: int = COUNT) -> list[Example]:
    """Rows to show, one example each: spread over the data, short enough to read, the first of their kind of answer where there are kinds."""
    fitting = [example for example in examples if len(example) <= LONGEST_PROMPT] or list(examples)
    spread = (
        [fitting[i * len(fitting) // (4 * count)] for i in range(4 * count)] if len(fitting) > 4 * count else fitting
    )
    found: list[Example] = []
    for wish in (True, False):  # first rows whose answers differ, then any
        for example in spread:
            rows, answers = {other.row_id for other in found}, {other.answer for other in found}
            if len(found) < count and example.row_id not in rows and (not wish or example.answer not in answers):
                found.append(example)
    return found
