"""Files of every kind give the same rows, every row knows its line, and what is broken is named; no input ends in another exception."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ingraft.data.formats import read_records
from ingraft.data.readers import read_bytes, read_rows
from ingraft.data.rows import LISTED
from ingraft.errors import IngraftError

VALUES = [
    {"text": "Good, very\ngood", "label": "yes"},
    {"text": "糟糕 “so”", "label": "no"},
    {"text": "a\tb", "label": "yes"},
]


def table(delimiter: str) -> str:
    def cell(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    return "\n".join(delimiter.join(map(cell, row)) for row in [("text", "label"), *(v.values() for v in VALUES)])


JSONL = "\n".join(json.dumps(v, ensure_ascii=False) for v in VALUES)
CONTENTS = {
    "jsonl": (JSONL, [1, 2, 3]),
    "json array": (json.dumps(VALUES, indent=2), [2, 6, 10]),
    "json object": (json.dumps({"version": 1, "data": VALUES, "more": [1]}, indent=1), [4, 8, 12]),
    "json object on one line": (json.dumps({"data": VALUES}), [1, 1, 1]),
    "json objects one after another": ("\n".join(json.dumps(v, indent=1) for v in VALUES), [1, 5, 9]),
    "csv": (table(","), [2, 4, 5]),
    "csv of another country": (table(";"), [2, 4, 5]),
    "tsv": (table("\t"), [2, 4, 5]),
}


@pytest.mark.parametrize("name", ["rows", "rows.jsonl", "rows.json", "rows.csv", "rows.txt"])
@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("how", ["plain", "gzip", "bom", "windows line ends"])
def test_content_decides_and_lines_are_known(kind: str, name: str, how: str) -> None:
    text, lines = CONTENTS[kind]
    data = text.encode()
    if how == "gzip":
        data = gzip.compress(data, mtime=0)
    if how == "bom":
        data = b"\xef\xbb\xbf" + data
    if how == "windows line ends":
        data = data.replace(b"\n", b"\r\n")
    rows = read_bytes(data, name)
    found = [
        {name: value.replace("\r\n", "\n") for name, value in row.values.items()} for row in rows
    ]  # in a quoted cell
    assert found == VALUES
    assert [row.line for row in rows] == lines


def test_parquet_and_datasets_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    made = datasets.Dataset.from_list([{"text": "a", "label": 1}, {"text": "b", "label": 0}], features=features)
    made.to_parquet(tmp_path / "rows.bin")
    assert [(row.values["text"], row.values["label"], row.line) for row in read_rows(tmp_path / "rows.bin")] == [
        ("a", 1, 1),
        ("b", 0, 2),
    ]
    datasets.DatasetDict({"train": made, "validation": made.select([1])}).save_to_disk(tmp_path / "folder")
    assert [row.values["label"] for row in read_rows(tmp_path / "folder")] == ["yes", "no"], (
        "names, not numbers, of classes"
    )
    assert [row.values["text"] for row in read_rows(tmp_path / "folder", split="validation")] == ["b"]
    with pytest.raises(IngraftError, match=r"no split 'test'.*train, validation"):
        read_rows(tmp_path / "folder", split="test")


def test_plain_text_keeps_its_line_numbers() -> None:
    rows = read_bytes(b"One.\n\n[Two] {really}\r\nThree, four\n", "book.txt")
    assert [(row.line, row.values["text"]) for row in rows] == [(1, "One."), (3, "[Two] {really}"), (4, "Three, four")]


def test_text_that_only_looks_like_json_is_text() -> None:
    for text in ("[Verse 1]\nLa la", "{curly}", "[" * 100_000, '{"a": 1'):
        assert read_bytes(text.encode(), "song.txt")[0].values["text"] == text.split("\n")[0]


def test_long_cells_and_loose_quotes_in_tsv() -> None:
    long = "x" * 300_000
    assert read_bytes(f"text,label\n{long},a\n".encode(), "a.csv")[0].values["text"] == long
    loose = read_bytes(b'text\tlabel\n"Oh" she said\ta\n5" disk\tb\n', "a.tsv")
    assert [row.values["text"] for row in loose] == ['"Oh" she said', '5" disk']


LOOSE = ['"The best film of the year', "A dull one", 'I loved it"', "bad", '"fine"', '""', 'a "b" c', '"']


@settings(max_examples=200, deadline=None, derandomize=True)
@given(texts=st.lists(st.sampled_from(LOOSE), min_size=1, max_size=6), first=st.booleans())
def test_no_row_of_a_tsv_vanishes_behind_quotation_marks(texts: list[str], first: bool) -> None:
    """A file of whole lines has a row for every line, wherever its texts begin or end with a quotation mark."""
    lines = [f"{text}\t{n}" if first else f"{n}\t{text}" for n, text in enumerate(texts)]
    header = "text\tlabel" if first else "label\ttext"
    rows = read_bytes("\n".join([header, *lines]).encode(), "a.tsv")
    assert [row.values["label"] for row in rows] == [str(n) for n in range(len(texts))]
    assert [row.line for row in rows] == list(range(2, len(texts) + 2))
    for row, text in zip(rows, texts, strict=True):
        assert row.values["text"] in (text, text[1:-1]), "as it stands, or unquoted"


QUOTABLE = st.tuples(st.text('a"\t\n', min_size=1).map("x{}".format), st.text('b"', min_size=1).map("y{}".format))


@settings(max_examples=200, deadline=None, derandomize=True)
@given(cells=st.lists(QUOTABLE, min_size=1))
def test_what_a_csv_writer_wrote_with_tabs_is_read_back(cells: list[tuple[str, str]]) -> None:
    """Quoted cells may hold tabs, line ends and quotation marks. Only one that holds both tabs and line ends can look like rows."""
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t", lineterminator="\n")
    writer.writerows([("text", "label"), *cells])
    doubtful = any("\t" in text and "\n" in text for text, _ in cells)
    try:
        rows = read_bytes(file.getvalue().encode(), "a.tsv")
    except IngraftError:
        assert doubtful
        return
    if not doubtful:
        assert [(row.values["text"], row.values["label"]) for row in rows] == cells


def test_quotation_marks_of_both_kinds_in_one_file_are_refused_by_line() -> None:
    mixed = 'text\tlabel\n"two\nlines"\t1\n"Oh\t1\nwell"\t0\n'
    with pytest.raises(IngraftError, match=r"some quotation marks enclose cells(.|\n)*a\.tsv:4: .*closed on line 5"):
        read_bytes(mixed.encode(), "a.tsv")


@pytest.mark.parametrize(
    ("data", "name", "message"),
    [
        (b"", "a.jsonl", "is empty"),
        (b" \n\n", "a.txt", "is empty"),
        (b"\xef\xbb\xbf", "a.csv", "is empty"),
        (b"[]", "a.json", r"no row\. Tried: jsonl, json, csv, tsv, parquet"),
        (b"text,label\n", "a.csv", r"no row\. Tried"),
        (b'{"text": "a"}\n{"text": \n{"text": "b"}\n', "a.jsonl", r"a\.jsonl:2: broken JSON"),
        (b'{"text" "a"}\n{"text": "b"}\n{"text": "b"}', "a.jsonl", r"a\.jsonl:1: broken JSON at column 9"),
        (b'[{"text": "a"},\n{"text": "b"}\n{"text": "c"}]', "a.json", r"a\.json:3: broken JSON"),
        (b'[{"text": "a"},\n{"text": "b"', "a.json", r"a\.json:2: broken JSON"),
        (b'{"text": "a"}\n[1]\n{"text": "b"}\n', "a.jsonl", r"a\.jsonl:2: a row must be a JSON object"),
        (b"[1, 2]", "a.json", "must be a JSON object"),
        (b'{"a": [{"x": 1}], "b": [{"x": 1}]}', "a.json", r"several lists of rows \(a, b\)"),
        (b"hello there", "a.jsonl", r"a\.jsonl:1: neither JSON"),
        (b"text,label\na,b\nc\n", "a.csv", r"a\.csv:3: 1 cells where the header has 2"),
        (b'text,label\na,b\n"c,d\ne,f\n', "a.csv", r"a\.csv:3: broken quoting"),
        (b"text,text\na,b\n", "a.csv", "'text' more than once"),
        (b"one\ntwo \xff\nthree\n\xc3(\n", "a.txt", r"a\.txt:2: byte 0xff at column 5"),
        ("text".encode("utf-16"), "a.txt", "UTF-16"),
        (b"PK\x03\x04....", "a.npz", "zip archive"),
        (b"PAR1....", "a.parquet", "broken Parquet"),
        (gzip.compress(b"some text" * 100, mtime=0)[:-20], "a.txt.gz", "broken gzip"),
        (b"[" * 200_000, "a.json", "nested too deep"),
        (b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl", "a.jsonl:1: Exceeds the limit"),
    ],
)
def test_broken_files_are_named_by_line(data: bytes, name: str, message: str) -> None:
    with pytest.raises(IngraftError, match=message):
        read_bytes(data, name)


def test_all_problems_at_once_but_not_more_than_a_screen() -> None:
    lines = [b'{"text": "a"}'] * 60 + [b'{"text": }'] * 40
    with pytest.raises(IngraftError) as caught:
        read_bytes(b"\n".join(lines), "a.jsonl")
    assert len(caught.value.problems) == LISTED + 1
    assert caught.value.problems[0].startswith("a.jsonl:61:")
    assert caught.value.problems[-1] == "... and 30 more"


def test_a_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "reviews_train.jsonl").write_text('{"text": "a"}')
    with pytest.raises(IngraftError, match=r"does not exist.*reviews_train\.jsonl"):
        read_rows(tmp_path / "review_train.jsonl")
    with pytest.raises(IngraftError, match=r"no folder"):
        read_rows(tmp_path / "nowhere" / "rows.jsonl")
    with pytest.raises(IngraftError, match=r"is a folder.*reviews_train\.jsonl"):
        read_rows(tmp_path)
    with pytest.raises(IngraftError):
        read_rows("a\0b")


def test_only_a_name_that_is_nothing_local_goes_to_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    class Hub:
        @staticmethod
        def load_dataset(name: str, split: str) -> Any:
            asked.append(f"{name} {split}")
            raise ConnectionError("no network")

    monkeypatch.setattr("ingraft.data.readers._datasets", lambda: Hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for local in ("rows.jsonl", "folder/rows", "elsewhere/rows.csv", "imdb"):
        with pytest.raises(IngraftError, match=r"does not exist"):
            read_rows(local)
    assert not asked
    with pytest.raises(IngraftError, match=r"no local file.*no network"):
        read_rows("owner/name")
    assert asked == ["owner/name train"]


TWICE = '{"text": "a", "label": 1, "text": "b"}'


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('{"text": "x", "label": 1}\n' + TWICE, 2),
        (TWICE, 1),
        ('{"text": "x", "more": {"a": {"text": 1, "text": 2}}}\n{"text": "y"}', 1),
        ('[{"text": "x"},\n' + TWICE + "]", 2),
        ('{"data": [{"text": "x"},\n\n' + TWICE + '], "version": 1}', 3),
        ('{"text":\n"x"}\n' + TWICE, 3),
        ('{"data": [{"text": "x"}],\n"data": [{"text": "y"}]}', 2),
    ],
)
def test_a_key_given_twice_is_named_by_its_line(content: str, line: int) -> None:
    """The last of them would win without a word, in whichever arrangement the rows are."""
    with pytest.raises(IngraftError, match=rf"a\.json:{line}: the key '(text|data)' is given more than once"):
        read_bytes(content.encode(), "a.json")


def refused_or_rows(data: bytes, name: str) -> None:
    try:
        rows = read_bytes(data, name)
    except IngraftError as error:
        assert error.problems
        return
    assert rows
    text = gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    last = max(text.count(b"\n"), text.count(b"\r")) + 1
    assert all(1 <= row.line <= last for row in rows if row.reader != "parquet")
    try:
        read_records(rows)
    except IngraftError as error:
        assert error.problems


NAMES = st.sampled_from(["a", "a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.parquet", "a.csv.gz"])
FUZZ = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@FUZZ
@given(data=st.binary(max_size=200), name=NAMES)
@example(data=b"PAR1" + b"\0" * 20 + b"PAR1", name="a")
@example(data=b"\x1f\x8b\x08\x00", name="a")
@example(data=b'{"text": NaN}', name="a")
def test_any_bytes_are_rows_or_a_refusal(data: bytes, name: str) -> None:
    refused_or_rows(data, name)


TOKENS = st.sampled_from(
    ['{"', '"}', "text", '"text"', "label", ": ", ",", "[", "]", "{", "}", "\n", "\r\n", "\t", ";", '"', "\\", "\\ud800", "messages", "1", "null", " ", "é", "\0"]
)  # fmt: skip


@FUZZ
@given(parts=st.lists(TOKENS, max_size=40), name=NAMES)
def test_any_near_data_is_rows_or_a_refusal(parts: list[str], name: str) -> None:
    refused_or_rows("".join(parts).encode(), name)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda s: st.lists(s, max_size=3),
    max_leaves=4,
)
FIELD_NAMES = st.sampled_from(
    ["text", "text2", "label", "instruction", "input", "output", "messages", "conversations", "prompt", "completion", "chosen", "rejected", "responses", "ranking", "tokens", "tags", "context", "question", "answers", "role", "content", "from", "value", "answer_start"]
)  # fmt: skip
OBJECTS = st.dictionaries(
    FIELD_NAMES,
    JSON
    | st.lists(st.dictionaries(FIELD_NAMES, JSON, max_size=3), max_size=2)
    | st.dictionaries(FIELD_NAMES, JSON, max_size=3),
    max_size=5,
)


@FUZZ
@given(values=st.lists(OBJECTS, min_size=1, max_size=4))
def test_any_fields_are_records_or_a_refusal(values: list[dict[str, Any]], make_rows: Callable[..., Any]) -> None:
    try:
        form, records = read_records(make_rows(*values))
    except IngraftError as error:
        assert error.problems
        return
    assert len(records) == len(values)
    assert all(isinstance(record, form.meaning) for record in records)
