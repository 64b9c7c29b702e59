"""The rows a benchmark trains on and is scored on: the first of a data set's training rows, and its rows for evaluation."""

from __future__ import annotations

import gzip
import sys
from itertools import islice
from pathlib import Path

TRAIN = ("train.jsonl", "train.jsonl.gz")
EVALUATION = ("dev.jsonl", "heldout.jsonl")


def evaluation_of(folder: Path) -> Path:
    """The file with the rows for evaluation."""
    return _first(folder, EVALUATION)


def first_rows(folder: Path, count: int, target: Path) -> Path:
    """The first training rows of a data set, as a file of their own."""
    source = _first(folder, TRAIN)
    with gzip.open(source, "rt") if source.suffix == ".gz" else source.open() as lines:
        target.write_text("".join(islice(lines, count)))
    return target


def _first(folder: Path, names: tuple[str, ...]) -> Path:
    found = next((folder / name for name in names if (folder / name).exists()), None)
    if found is None:
        sys.exit(f"{folder} holds none of {', '.join(names)}; name a folder that does with --rows.")
    return found
