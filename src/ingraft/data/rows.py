"""A row of a user's file together with the place it came from.

Every complaint about data names a file and a line, so the place travels with the row from the first byte read to the
last check; nothing downstream has to search for it again. Problems are collected and raised at once, but only the
first few are listed: ten examples show a pattern, ten thousand bury it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from ingraft.errors import IngraftError

LISTED = 10
"""How many problems of one kind a message spells out before it says "... and N more"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it stands in its source.

    Attributes:
        values: the fields of the row, as parsed; for a line of plain text `{"text": line}`.
        file: the source as the user named it (a path, a `datasets` folder or a hub id).
        line: 1-based line at which the row begins; for sources without lines (parquet, `datasets`, pictures) the 1-based
            row number.
        reader: the kind of source: jsonl, json, csv, tsv, parquet, txt, datasets, npz, folder or picture.
    """

    values: Mapping[str, Any] = field(hash=False)
    file: str
    line: int
    reader: str = "jsonl"

    @property
    def place(self) -> str:
        """`file:line`, as editors and terminals understand it."""
        return f"{self.file}:{self.line}"


class RowProblem(ValueError):
    """What is wrong with one row, without its place; caught where the place is known. Never reaches a user by
    itself.
    """


def refuse(problems: Sequence[str], *, summary: str = "") -> NoReturn:
    """Raise an `IngraftError` that lists `problems` (the first ten of them), after `summary` when there is one."""
    listed = list(problems[:LISTED])
    if len(problems) > LISTED:
        listed.append(f"... and {len(problems) - LISTED} more")
    raise IngraftError(*([summary] if summary else []), *listed)
