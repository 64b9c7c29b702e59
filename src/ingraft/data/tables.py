"""Rows out of tables: CSV, TSV, Parquet.

CSV has no standard for its delimiter, so the header decides: the delimiter that splits it into the most field names
Ingraft knows wins, and the file's extension breaks ties. All values of a text table are strings.

TSV has none for quoting: some writers quote as in CSV, most know no quoting at all. A row must not vanish in either reading.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from ingraft.data.formats import FIELDS
from ingraft.data.rows import Row, refuse
from ingraft.errors import IngraftError

OPTIONAL = frozenset({"input", "system", "id"})
_FIRST_LINE = re.compile(r"^[^\n]*\S[^\n]*", re.MULTILINE)
DELIMITERS = {",": "csv", "\t": "tsv", ";": "csv"}


def header_fields(text: str, delimiter: str) -> list[str]:
    """The first line split by `delimiter`, quotes and spaces removed."""
    first = _FIRST_LINE.search(text)
    try:
        fields = next(csv.reader([first.group() if first else ""], delimiter=delimiter), [])
    except csv.Error:
        return []
    return [name.strip() for name in fields]


def looks_like_table(text: str) -> bool:
    """Whether the first line is a header of at least two columns, all of whose names are recognised: plain text
    never has one by accident.
    """
    return any(
        len(names) > 1 and set(names) <= FIELDS | OPTIONAL for names in (header_fields(text, d) for d in DELIMITERS)
    )


def has_known_column(text: str) -> bool:
    """Whether the first line, read as a header, names a recognised field."""
    return any(FIELDS & set(header_fields(text, delimiter)) for delimiter in DELIMITERS)


def read_table(text: str, file: str, *, extension: str = "") -> list[Row]:
    """The rows of a CSV or TSV text with a header.

    Args:
        text: the decoded file.
        file: its name for messages.
        extension: `.csv` or `.tsv`; breaks ties between delimiters.

    Raises:
        IngraftError: broken quoting, rows of another width than the header, double or empty column names; by line.
    """
    favourite = "\t" if extension == ".tsv" else ","

    def fit(delimiter: str) -> tuple[int, bool, int]:
        names = header_fields(text, delimiter)
        return len(FIELDS & set(names)), delimiter == favourite and len(names) > 1, len(names)

    delimiter = max(DELIMITERS, key=fit)
    try:
        records = _records(text, file, delimiter, quoted=True)
    except csv.Error as error:
        if delimiter != "\t":
            raise IngraftError(f"{error}.") from None
        # Most TSV files know no quoting, and a text that begins with a quotation mark is no mistake there.
        return _rows(_records(text, file, delimiter, quoted=False), file, delimiter)
    if delimiter == "\t":
        records = _without_swallowing(records, text, file)
    return _rows(records, file, delimiter)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Record:
    """Cells that belong together, and the lines, 1-based, that they were on."""

    cells: list[str]
    first: int
    last: int


def _records(text: str, file: str, delimiter: str, *, quoted: bool) -> list[_Record]:
    """What is no blank line, header included.

    Raises:
        csv.Error: broken quoting, with file and line.
    """
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's default refuses a text above 128 KB
    try:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        found: list[_Record] = []
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise csv.Error(f"{file}:{line}: broken quoting ({error})") from None
            if cells is None:
                return found
            if any(cell.strip() for cell in cells):
                found.append(_Record(cells=cells, first=line, last=reader.line_num))
    finally:
        csv.field_size_limit(limit)


def _without_swallowing(records: list[_Record], text: str, file: str) -> list[_Record]:
    """The records of a TSV text without cells that reach from one row's loose quotation mark to another's.

    Where a text begins with a quotation mark and a later one ends with one, quoting would make all rows in between one cell. A cell that does
    so is no cell but rows if every line of it is a whole row by itself.

    Raises:
        IngraftError: some rows can be read only with quoting and others only without.
    """
    if not records:
        return records
    plain = _records(text, file, "\t", quoted=False)
    width = len(plain[0].cells)
    wrong = {record.first for record in plain if len(record.cells) != width}
    swallowing = [
        record
        for record in records
        if (record.last > record.first or len(record.cells) != width)
        and wrong.isdisjoint(range(record.first, record.last + 1))
    ]
    if swallowing and wrong:
        refuse(
            [
                f"{file}:{record.first}: a cell begins with a quotation mark that is closed on line {record.last}, and each line up to there is a "
                "whole row."
                for record in swallowing
            ],
            summary=f"{file}: some quotation marks enclose cells and others are part of a text. Double those in texts and enclose such cells, or "
            "write the rows as jsonl.",
        )
    return plain if swallowing else records


def _rows(records: list[_Record], file: str, delimiter: str) -> list[Row]:
    header: list[str] | None = None
    rows: list[Row] = []
    problems: list[str] = []
    for record in records:
        if header is None:
            header = _check_header([name.strip() for name in record.cells], file, record.first)
        elif len(record.cells) != len(header):
            problems.append(
                f"{file}:{record.first}: {len(record.cells)} cells where the header has {len(header)} ({', '.join(header)})."
            )
        else:
            values = dict(zip(header, record.cells, strict=True))
            rows.append(Row(values=values, file=file, line=record.first, reader=DELIMITERS[delimiter]))
    if problems:
        refuse(problems)
    return rows


def _check_header(names: list[str], file: str, line: int) -> list[str]:
    doubled = sorted({name for name in names if names.count(name) > 1 and name})
    if doubled:
        raise IngraftError(f"{file}:{line}: the header names {', '.join(map(repr, doubled))} more than once.")
    # An unnamed column is the row index that some tools write; it is read and ignored like any unknown field.
    return [name or f"column {number}" for number, name in enumerate(names, 1)]


def read_parquet(data: bytes, file: str) -> list[Row]:
    """The rows of a Parquet file; `line` is the row's number.

    Raises:
        IngraftError: a broken file, or pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise IngraftError(f"{file}: reading Parquet needs pyarrow. Install it: pip install datasets") from None
    try:
        found = cast("list[Mapping[str, Any]]", pq.read_table(pa.BufferReader(data)).to_pylist())
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise IngraftError(f"{file}: broken Parquet file: {error}") from None
    return [Row(values=values, file=file, line=number, reader="parquet") for number, values in enumerate(found, 1)]
