"""What a form of row is, and how its fields are read: a text, a label, a number, each refused by name where it is something else."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from ingraft.data.records import Record
from ingraft.data.rows import Row, RowProblem

Values = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class Format:
    """A recognised form of row.

    Attributes:
        name: what `--data.format` and messages call it.
        fields: the fields a row must have.
        read: the row's meaning; raises `RowProblem` for what it cannot use.
        meaning: the kind of record that `read` returns.
        opens: what the record only names, found beside the row's file; raises `RowProblem` for what is not there. None where a row holds all.
        detected: whether rows are taken for it by their fields; if not, it is asked for by name or by a task.
    """

    name: str
    fields: tuple[str, ...]
    read: Callable[[Values], Record]
    meaning: type[Record]
    opens: Callable[[Any, Row], Record] | None = None
    detected: bool = True


def kind_of(value: object) -> str:
    """What a value is, for messages."""
    names: dict[type, str] = {
        bool: "true/false",
        int: "a number",
        float: "a number",
        str: "a text",
        list: "a list",
        dict: "an object",
        type(None): "nothing",
    }
    return names.get(type(value), f"a {type(value).__name__}")


def text_in(values: Values, name: str) -> str:
    """A text, which may be empty."""
    value = values[name]
    if not isinstance(value, str):
        raise RowProblem(f"field '{name}' is {kind_of(value)}, not a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half of a surrogate pair; no tokenizer can read it
        raise RowProblem(f"field '{name}' holds a broken character (half of a surrogate pair)") from None
    return value


def filled_in(values: Values, name: str) -> str:
    """A text that is not empty."""
    value = text_in(values, name)
    if not value.strip():
        raise RowProblem(f"field '{name}' is empty")
    return value


def list_in(values: Values, name: str) -> list[Any]:
    """A list."""
    value = values[name]
    if not isinstance(value, (list, tuple)):
        raise RowProblem(f"field '{name}' is {kind_of(value)}, not a list")
    return list(cast("Sequence[Any]", value))


def label_in(values: Values, name: str = "label") -> str:
    """The name of a class; whole numbers and true/false are names too."""
    value = values[name]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float) and value.is_integer():  # tables store a column of integers with gaps as floats
        return str(int(value))
    if isinstance(value, float):
        raise RowProblem(
            f"field '{name}' is the number {value}: a class is a name or a whole number (numbers are for --task regress)"
        )
    if isinstance(value, (list, tuple)):
        raise RowProblem(f"field '{name}' is a list; several labels a row are for --task multi-label")
    return filled_in(values, name).strip()


def number_in(values: Values, name: str = "label") -> float:
    """A finite number."""
    value = values[name]
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowProblem(f"field '{name}' is {value!r}, not a finite number (names of classes are for --task classify)")
    return found


def labels_in(values: Values, name: str = "label") -> tuple[str, ...]:
    """A list of labels; one label alone is a list of one. A cell of a table spells the list as JSON."""
    value = values[name]
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise RowProblem(f"field '{name}' begins like a JSON list and is none: {value[:40]!r}") from None
    several = cast("Sequence[Any]", value) if isinstance(value, (list, tuple)) else (value,)
    return tuple(dict.fromkeys(label_in({name: item}, name) for item in several))
