"""Rows out of JSON: lines, arrays, an object that holds one list of rows, or objects one after another.

The standard decoder is used value by value (`raw_decode`), which is how an array's rows keep their line numbers: the
decoder says where each value ended, and line breaks are counted on the way.

The decoder would let the last of two equal keys win without a word; a row with such keys is refused, because nobody knows which was meant.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from ingraft.data.formats import FIELDS
from ingraft.data.rows import Row, refuse
from ingraft.errors import IngraftError

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\r\n]*")
_LINE = re.compile(r"[^\n]*")


@dataclass(frozen=True, slots=True)
class _Doubled:
    """A value somewhere in which a key stands twice."""

    key: str
    value: object


class _Strict:
    """The standard decoder, with an eye on equal keys."""

    def __init__(self) -> None:
        self._doubled: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._pairs)

    def _pairs(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            self._doubled.append(Counter(name for name, _ in pairs).most_common(1)[0][0])
        return value

    def decode(self, text: str) -> object:
        """The value that is the whole text; `_Doubled` where it has equal keys."""
        self._doubled.clear()
        return self._seen(self._decoder.decode(text))

    def raw_decode(self, text: str, position: int) -> tuple[object, int]:
        """The value at this position, likewise, and the position behind it."""
        self._doubled.clear()
        value, end = self._decoder.raw_decode(text, position)
        return self._seen(value), end

    def _seen(self, value: object) -> object:
        return _Doubled(self._doubled[0], value) if self._doubled else value


def looks_like_json(text: str) -> bool:
    """Whether the text begins as JSON rows begin."""
    return text.lstrip(" \t\r\n")[:1] in ("{", "[")


def first_value_is_row(text: str) -> bool:
    """Whether the text begins with a whole JSON object, or an array that begins with one: plain text never does by
    accident.
    """
    start = _skip(text, 0)
    if text[start : start + 1] == "[":
        start = _skip(text, start + 1)
    try:
        return isinstance(_DECODER.raw_decode(text, start)[0], dict)
    except (ValueError, RecursionError):
        return False


def read_json(text: str, file: str) -> list[Row]:
    """The rows of a JSON text, in whichever of the four arrangements it is.

    Raises:
        IngraftError: broken JSON, by line and column; values that are no objects; an object without a list of rows.
    """
    if _is_lines(text):
        return _read_lines(text, file)
    places = _Lines(text)
    start = _skip(text, 0)
    if text[start] == "[":
        found, end = _read_array(text, start, file, places)
        if (rest := _skip(text, end)) < len(text):
            raise IngraftError(f"{file}:{places.at(rest)}: text after the end of the JSON array.")
        return _as_rows(found, file, "json")
    objects = list(_values(text, start, file, places))
    first = objects[0][1].value if isinstance(objects[0][1], _Doubled) else objects[0][1]
    if len(objects) == 1 and isinstance(first, dict):
        only = cast("dict[str, Any]", first)
        if not FIELDS & set(only) and _lists_of_objects(only):
            return _read_wrapped(text, start, only, file, places)
    return _as_rows(objects, file, "json")


class _Lines:
    """Line numbers of growing positions, each line break counted once."""

    def __init__(self, text: str) -> None:
        self.text, self.position, self.line = text, 0, 1

    def at(self, position: int) -> int:
        if position < self.position:
            return self.text.count("\n", 0, position) + 1
        self.line += self.text.count("\n", self.position, position)
        self.position = position
        return self.line


def _skip(text: str, position: int) -> int:
    found = _SPACE.match(text, position)
    return found.end() if found else position


def _is_lines(text: str) -> bool:
    """JSON lines: the first line is a whole value and more follow, or most lines look like whole objects (so that one
    broken line, even the first, is one named mistake).
    """
    lines = [line for line in (match.group().strip() for match in _LINE.finditer(text)) if line]
    whole = sum(line.startswith("{") and line.endswith("}") for line in lines)
    return whole * 2 > len(lines) and (len(lines) > 1 or not lines[0].startswith("["))


def _read_lines(text: str, file: str) -> list[Row]:
    rows: list[Row] = []
    problems: list[str] = []
    strict = _Strict()
    lines = text.split("\n")
    if sum(1 for line in lines if line.strip()) == 1:  # one object on one line may be a whole file: {"data": [...]}
        value = _only_object(text, file)
        if value is not None and not FIELDS & set(value) and _lists_of_objects(value):
            return _read_wrapped(text, _skip(text, 0), value, file, _Lines(text))
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = strict.decode(line)
        except RecursionError:
            problems.append(f"{file}:{number}: JSON nested too deep.")
        except json.JSONDecodeError as error:
            problems.append(f"{file}:{number}: broken JSON at column {error.colno}: {error.msg}.")
        except ValueError as error:  # an integer of more digits than Python converts
            problems.append(f"{file}:{number}: {error}.")
        else:
            if isinstance(value, dict):
                rows.append(Row(values=cast("dict[str, Any]", value), file=file, line=number, reader="jsonl"))
            else:
                problems.append(f"{file}:{number}: {_no_row(value)}")
    if problems:
        refuse(problems)
    return rows


def _no_row(value: object) -> str:
    if isinstance(value, _Doubled):
        return f"the key {value.key!r} is given more than once, and only one value can be meant."
    return f"a row must be a JSON object, this is a {type(value).__name__}."


def _only_object(text: str, file: str) -> dict[str, Any] | None:
    try:
        value: object = json.loads(text)
    except (ValueError, RecursionError):
        return None  # the line reader names the mistake
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _decode(text: str, position: int, file: str, places: _Lines) -> tuple[object, int]:
    try:
        return _Strict().raw_decode(text, position)
    except RecursionError:
        raise IngraftError(f"{file}:{places.at(position)}: JSON nested too deep.") from None
    except json.JSONDecodeError as error:
        raise IngraftError(f"{file}:{error.lineno}: broken JSON at column {error.colno}: {error.msg}.") from None
    except ValueError as error:
        raise IngraftError(f"{file}:{places.at(position)}: {error}.") from None


def _values(text: str, position: int, file: str, places: _Lines) -> Iterator[tuple[int, object]]:
    """(line, value) of values that follow one another, separated by white space."""
    while (position := _skip(text, position)) < len(text):
        value, end = _decode(text, position, file, places)
        yield places.at(position), value
        position = end


def _read_array(text: str, start: int, file: str, places: _Lines) -> tuple[list[tuple[int, object]], int]:
    """(line, value) of each element of the array whose bracket stands at `start`, and the position after it."""
    found: list[tuple[int, object]] = []
    position = _skip(text, start + 1)
    if text[position : position + 1] == "]":
        return found, position + 1
    while True:
        position = _skip(text, position)
        value, end = _decode(text, position, file, places)
        found.append((places.at(position), value))
        position = _skip(text, end)
        separator = text[position : position + 1]
        if separator == "]":
            return found, position + 1
        if separator != ",":
            raise IngraftError(
                f"{file}:{places.at(position)}: broken JSON: ',' or ']' expected after element {len(found)} of the list."
            )
        position += 1


def _lists_of_objects(value: Mapping[str, Any]) -> list[str]:
    return [
        key
        for key, content in value.items()
        if isinstance(content, list) and content and all(isinstance(row, dict) for row in cast("list[object]", content))
    ]


def _read_wrapped(text: str, start: int, value: Mapping[str, Any], file: str, places: _Lines) -> list[Row]:
    """The rows of `{"data": [...], ...}`: the one list of objects in it, read again element by element for the line
    numbers.
    """
    lists = _lists_of_objects(value)
    if len(lists) > 1:
        raise IngraftError(
            f"{file}: the object holds several lists of rows ({', '.join(lists)}); keep one of them in a file of its own."
        )
    position = start + 1
    found: list[tuple[int, object]] = []
    seen: set[object] = set()
    while True:
        position = _skip(text, position)
        key, end = _decode(text, position, file, places)
        if key in seen:
            raise IngraftError(f"{file}:{places.at(position)}: {_no_row(_Doubled(str(key), None))}")
        seen.add(key)
        position = _skip(text, _skip(text, end) + 1)
        if key == lists[0]:
            found, position = _read_array(text, position, file, places)
        else:
            position = _decode(text, position, file, places)[1]
        position = _skip(text, position)
        if text[position : position + 1] != ",":
            return _as_rows(found, file, "json")
        position += 1


def _as_rows(found: list[tuple[int, object]], file: str, reader: str) -> list[Row]:
    problems = [f"{file}:{line}: {_no_row(value)}" for line, value in found if not isinstance(value, dict)]
    if problems:
        refuse(problems)
    return [Row(values=cast("dict[str, Any]", value), file=file, line=line, reader=reader) for line, value in found]
