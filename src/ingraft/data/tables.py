"""Rows out of tables: CSV, TSV, Parquet.

CSV has no standard for its delimiter, so the header decides: the delimiter that splits it into the most field names
Ingraft knows wins, and the file's extension breaks ties. All values of a text table are strings.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Mapping
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
        return _read(text, file, delimiter, quoted=True)
    except csv.Error as error:
        if (
            delimiter == "\t"
        ):  # most TSV files know no quoting, and a text that begins with a quotation mark is no mistake there
            return _read(text, file, delimiter, quoted=False)
        raise IngraftError(f"{error}.") from None


def _read(text: str, file: str, delimiter: str, *, quoted: bool) -> list[Row]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the module's default refuses a text above 128 KB
    try:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        header: list[str] | None = None
        rows: list[Row] = []
        problems: list[str] = []
        line = 0
        while True:
            line = reader.line_num + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise csv.Error(f"{file}:{line}: broken quoting ({error})") from None
            if cells is None:
                break
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _check_header([name.strip() for name in cells], file, line)
            elif len(cells) != len(header):
                problems.append(
                    f"{file}:{line}: {len(cells)} cells where the header has {len(header)} ({', '.join(header)})."
                )
            else:
                rows.append(
                    Row(
                        values=dict(zip(header, cells, strict=True)), file=file, line=line, reader=DELIMITERS[delimiter]
                    )
                )
    finally:
        csv.field_size_limit(limit)
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
