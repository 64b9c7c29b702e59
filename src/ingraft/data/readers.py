"""From a path to rows: what a file is, is decided by its content.

An extension is a hint and no more: people rename files, and `.json` is used for both arrays and lines. The order of
the questions is from the unmistakable (magic bytes) to the vague (plain text). Files are read whole: rows are held in
memory anyway, and only so can every problem of a file be listed at once.
"""

from __future__ import annotations

import gzip
import re
import zlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn, cast

from ingraft.data.arrays import holds_arrays, looks_like_pixels, rows_of
from ingraft.data.folders import is_picture, picture_rows
from ingraft.data.jsonrows import first_value_is_row, looks_like_json, read_json
from ingraft.data.rows import Row, refuse
from ingraft.data.tables import has_known_column, looks_like_table, read_parquet, read_table
from ingraft.errors import IngraftError

TRIED = "jsonl, json, csv, tsv, parquet, plain text, and each of them gzipped; pictures, folders of pictures, and .npz"
EXTENSIONS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".txt", ".text", ".md", ".gz", ".npz")
FOREIGN = {
    b"PK\x03\x04": "a zip archive (.xlsx is one too)",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"ARROW1": "an Arrow file",
    b"SQLite format 3": "a database",
    b"%PDF": "a PDF",
    b"GGUF": "a model (GGUF)",
    b"\xff\xfe": "UTF-16 text: save it as UTF-8",
    b"\xfe\xff": "UTF-16 text: save it as UTF-8",
}
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def read_rows(source: str | Path, *, split: str | None = None) -> list[Row]:
    """The rows of a file, a `datasets` folder or a data set on a hub.

    Args:
        source: a path; or `owner/name` on a hub where nothing of that name exists locally.
        split: which split of a `datasets` folder or hub data set; default `train`, or the only one.

    Raises:
        IngraftError: nothing there (with the nearest file names), unreadable, broken (by line), or without a row.
    """
    path = Path(source).expanduser()
    name = str(source)
    try:
        if path.is_file():
            return read_bytes(path.read_bytes(), name)
        if path.is_dir():
            return _read_folder(path, name, split)
        exists = path.exists()
    except (OSError, ValueError) as error:
        raise IngraftError(f"{name!r} cannot be read: {error}") from None
    if exists:
        raise IngraftError(f"{name} is neither a file nor a folder.")
    if _HUB.fullmatch(name) and path.suffix not in EXTENSIONS and not path.parent.exists():
        return _read_hub(name, split)
    raise IngraftError(_not_there(path, name))


def check_source(source: str | Path) -> None:
    """Refuse at once a path where nothing is; what is there, or may be on a hub, is found out by reading.

    Raises:
        IngraftError: with the nearest file names.
    """
    path, name = Path(source).expanduser(), str(source)
    on_hub = _HUB.fullmatch(name) and path.suffix not in EXTENSIONS and not path.parent.exists()
    if not path.exists() and not on_hub:
        raise IngraftError(_not_there(path, name))


def _not_there(path: Path, name: str) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f"{name} does not exist: there is no folder {folder}."
    try:
        here = sorted(entry.name for entry in folder.iterdir())
    except OSError:
        here = []
    near = get_close_matches(path.name, here, n=3, cutoff=0.5)
    near = near or [other for other in here if other.endswith(EXTENSIONS)][:5]
    return f"{name} does not exist." + (f" In that folder: {', '.join(near)}." if near else "")


def read_bytes(data: bytes, file: str) -> list[Row]:
    """The rows in a file's content.

    Args:
        data: the content, gzipped or not.
        file: its name, for messages and as a hint where the content could be either of two things.

    Raises:
        IngraftError: as `read_rows`.
    """
    suffixes = Path(file).suffixes
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise IngraftError(f"{file}: broken gzip file: {error}. Fetch it again.") from None
    extension = next((suffix.lower() for suffix in reversed(suffixes) if suffix.lower() != ".gz"), "")
    if data[:4] == b"PAR1":
        rows = read_parquet(data, file)
    elif holds_arrays(data):
        rows = rows_of(data, file)
    elif is_picture(data, extension):
        rows = [Row(values={"image": Path(file).name}, file=file, line=1, reader="picture")]
    else:
        for magic, what in FOREIGN.items():
            if data.startswith(magic):
                raise IngraftError(f"{file} is {what}. Readable: {TRIED}.")
        rows = _read_text(_decode(data, file), file, extension)
    if not rows:
        raise IngraftError(f"{file} holds no row. Tried: {TRIED}.")
    return rows


def _decode(data: bytes, file: str) -> str:
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        _refuse_bytes(data, file)
    return text if "\n" in text else text.replace("\r", "\n")  # files of old Macs end their lines so


def _refuse_bytes(data: bytes, file: str) -> NoReturn:
    problems: list[str] = []
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError as error:
            problems.append(
                f"{file}:{number}: byte {error.object[error.start]:#04x} at column {error.start + 1} is not UTF-8."
            )
    refuse(problems, summary=f"{file} is not UTF-8 text ({len(problems)} lines). Save it as UTF-8. Tried: {TRIED}.")


def _read_text(text: str, file: str, extension: str) -> list[Row]:
    if not text.strip():
        raise IngraftError(f"{file} is empty.")
    as_text = extension in (".txt", ".text", ".md")
    as_table = extension in (".csv", ".tsv")
    if looks_like_json(text) and (first_value_is_row(text) if as_text or as_table else True):
        return read_json(text, file)
    if looks_like_pixels(text):
        return rows_of(text.encode(), file)
    if as_table or looks_like_table(text) or (not as_text and has_known_column(text)):
        return read_table(text, file, extension=extension)
    if extension in (".json", ".jsonl", ".ndjson"):
        first = len(text) - len(text.lstrip())
        line = text.count("\n", 0, first) + 1
        raise IngraftError(
            f"{file}:{line}: neither JSON nor a table with a known header: it begins {text[first : first + 30]!r}. Tried: {TRIED}."
        )
    lines = text.replace("\r\n", "\n").split("\n")
    return [
        Row(values={"text": line}, file=file, line=n, reader="txt") for n, line in enumerate(lines, 1) if line.strip()
    ]


def _datasets() -> Any:
    try:
        import datasets
    except ImportError:
        raise IngraftError("Reading `datasets` folders and hub data sets needs: pip install datasets") from None
    return datasets


def _read_folder(path: Path, name: str, split: str | None) -> list[Row]:
    if not any((path / mark).exists() for mark in ("dataset_dict.json", "state.json", "dataset_info.json")):
        if found := picture_rows(path, name):
            return found
        files = sorted(entry.name for entry in path.iterdir() if entry.name.endswith(EXTENSIONS))
        hint = f" Name one of its files: {', '.join(files[:10])}." if files else ""
        raise IngraftError(f"{name} is a folder, but not one that `datasets.save_to_disk` wrote.{hint}")
    datasets = _datasets()
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # a foreign library over foreign files
        raise IngraftError(f"{name} cannot be read as a `datasets` folder: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        found = _pick(cast("dict[str, Any]", found), name, split)
    return _from_dataset(found, name)


def _pick(splits: dict[str, Any], name: str, split: str | None) -> Any:
    wanted = split or ("train" if "train" in splits else next(iter(splits), ""))
    if wanted not in splits or (split is None and wanted != "train" and len(splits) > 1):
        raise IngraftError(
            f"{name} has no split '{wanted if split else 'train'}'; it has: {', '.join(splits) or 'none'}."
        )
    return splits[wanted]


def _read_hub(name: str, split: str | None) -> list[Row]:
    datasets = _datasets()
    try:
        found = datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # the network, the hub and the data set may each fail in their own way
        raise IngraftError(
            f"{name} is no local file, and as a data set on the hub it cannot be loaded: {error}",
            "If a file was meant, check its path. A hub mirror is set by HF_ENDPOINT.",
        ) from error
    return _from_dataset(found, name)


def _from_dataset(found: Any, name: str) -> list[Row]:
    names = {
        column: list(feature.names)
        for column, feature in found.features.items()
        if isinstance(getattr(feature, "names", None), list)
    }  # class labels are stored as numbers next to the list of their names
    rows: list[Row] = []
    for number, values in enumerate(cast("Any", found), 1):
        row = dict(values)
        for column, known in names.items():
            if isinstance(row.get(column), int) and 0 <= row[column] < len(known):
                row[column] = known[row[column]]
        rows.append(Row(values=row, file=name, line=number, reader="datasets"))
    if not rows:
        raise IngraftError(f"{name} holds no row.")
    return rows
