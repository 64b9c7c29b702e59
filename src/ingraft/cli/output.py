"""What the verbs print: people read lines and tables, programs read one JSON document.

With `--json` the document is all that goes to standard output; the lines that accompany the work go to standard error. On a terminal tables
and colours come from rich, which is imported only then; elsewhere the same content is plain text that `cut` and `grep` can use.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import click


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a verb's words go."""

    as_json: bool = False

    @property
    def fancy(self) -> bool:
        """Whether a person looks at this output in a terminal."""
        return not self.as_json and sys.stdout.isatty()

    def say(self, *lines: str) -> None:
        """Lines for a person."""
        for line in lines:
            click.echo(line, err=self.as_json)

    def facts(self, values: Mapping[str, Any]) -> None:
        """Names and values, one pair a line, aligned; pairs without a value are left out, and with `--json` all are."""
        if self.as_json:
            return
        shown = {name: shorten(value) for name, value in values.items() if value is not None}
        width = max(map(len, shown), default=0)
        self.say(*(f"{name:<{width}}  {value}" for name, value in shown.items()))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; columns of numbers are aligned on the right."""
        if self.as_json:
            return
        cells = [[shorten(value) for value in row] for row in rows]
        if self.fancy:
            from rich import box
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text

            made = Table(box=box.SIMPLE, header_style="bold")
            for number, name in enumerate(header):
                made.add_column(name, justify="right" if _numeric(rows, number) else "left")
            for row in cells:
                made.add_row(*(Text(cell) for cell in row))
            Console().print(made)
            return
        widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
        for row in [list(header), *cells]:
            padded = (
                text.rjust(width) if _numeric(rows, i) else text.ljust(width)
                for i, (text, width) in enumerate(zip(row, widths, strict=True))
            )
            self.say("  ".join(padded).rstrip())

    def result(self, value: Mapping[str, Any] | Sequence[Any]) -> None:
        """The document for a program; nothing without `--json`."""
        if self.as_json:
            click.echo(json.dumps(jsonable(value), ensure_ascii=False, indent=2))


def _numeric(rows: Sequence[Sequence[Any]], column: int) -> bool:
    return any(isinstance(row[column], int | float) and not isinstance(row[column], bool) for row in rows)


def shorten(value: Any) -> str:
    """A value as a person wants to read it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and (abs(value) < 1e-3 or abs(value) >= 1e5) else f"{value:.4f}"
    if isinstance(value, list | tuple):
        return ", ".join(shorten(item) for item in cast(Sequence[Any], value))
    return str(value)


def jsonable(value: Any) -> Any:
    """`value` for strict JSON: numbers that JSON does not know (NaN, infinities) become null."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in cast(Sequence[Any], value)]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)
