"""Folders of pictures, and pictures by themselves, as rows."""

from __future__ import annotations

from pathlib import Path

from ingraft.data.rows import Row
from ingraft.errors import IngraftError

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
TABLES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".npz")
MAGIC = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8", b"II*\x00", b"MM\x00*")
PARTS = frozenset({"train", "test", "val", "valid", "validation", "dev", "eval"})
_LITTER = frozenset({"thumbs.db", "desktop.ini"})


def is_picture(data: bytes, extension: str) -> bool:
    """Whether a file's content is a picture; the extension decides where the first bytes could be a text's."""
    riff = data[:4] == b"RIFF" and data[8:12] == b"WEBP"
    return riff or data.startswith(MAGIC) or (extension in (".bmp", ".ppm", ".pgm") and data[:1] in (b"B", b"P"))


def picture_rows(path: Path, name: str) -> list[Row]:
    """A folder's pictures: of a class a folder, or all without a class. Nothing where there are none, or files of rows beside them.

    Everything in a class's folder, and in folders in it, counts as a picture of that class, but for hidden files.

    Args:
        name: what the user called the folder.

    Raises:
        IngraftError: its folders are no classes, or cannot all be.
    """
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    if any(entry.suffix.lower() in TABLES for entry in entries):
        return []  # which of them is meant is for the user to say
    alone = [entry for entry in entries if entry.is_file() and entry.suffix.lower() in PICTURES]
    classes = {entry.name: _files(entry) for entry in entries if entry.is_dir()}
    if not any(file.suffix.lower() in PICTURES for files in classes.values() for file in files):
        return [_row(file, path, name, number) for number, file in enumerate(alone, 1)]
    if {each.lower() for each in classes} <= PARTS:
        others = " or ".join(f"{name}/{each}" for each in classes)
        raise IngraftError(
            f"{name}: its folders {', '.join(classes)} are parts of the data and no classes. Name one of them: {others}."
        )
    problems = [
        f"{name}: the class folder {each} holds no picture; take it away."
        for each, files in classes.items()
        if not files
    ]
    if alone:
        problems.append(
            f"{name}: {alone[0].name}{f' and {len(alone) - 1} more' if len(alone) > 1 else ''} lie beside the class folders and have no class. Move them into one, or away."
        )
    if problems:
        raise IngraftError(*problems)
    found = [(label, file) for label, files in classes.items() for file in files]
    return [_row(file, path, name, number, label) for number, (label, file) in enumerate(found, 1)]


def _files(folder: Path) -> list[Path]:
    inside = (file for file in folder.rglob("*") if file.is_file())
    return sorted(
        file
        for file in inside
        if file.name.lower() not in _LITTER and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )


def _row(file: Path, folder: Path, name: str, number: int, label: str | None = None) -> Row:
    values = {"image": file.relative_to(folder).as_posix()} | ({} if label is None else {"label": label})
    return Row(values=values, file=name, line=number, reader="folder")
