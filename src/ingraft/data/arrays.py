"""Files that hold many pictures: `.npz` with `images` and perhaps `labels` and `names`, and tables whose columns are the pixels of square grey pictures.

The arrays are kept in memory while their rows are in use, once a file: a picture of such a file is an offset (`data/pixels.py`).
"""

from __future__ import annotations

import functools
import gzip
import io
import math
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingraft.data.rows import Row
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from numpy.typing import NDArray

IMAGES, LABELS, NAMES = ("images", "x", "X", "data"), ("labels", "label", "y", "Y", "targets"), ("names", "classes")
"""What the arrays of an .npz are called."""
SMALLEST = 8
"""Height of a picture that a table is taken to hold, at least."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Arrays:
    """A file's pictures.

    Attributes:
        images: (N, H, W) or (N, H, W, 3 or 4), uint8.
        labels: the class of each; None where the file has none.
    """

    images: NDArray[Any]
    labels: tuple[str, ...] | None


def holds_arrays(data: bytes) -> bool:
    """Whether a file's content is an .npz."""
    if data[:4] != b"PK\x03\x04" or not zipfile.is_zipfile(io.BytesIO(data)):
        return False
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    return bool(names) and all(name.endswith(".npy") for name in names)


def looks_like_pixels(text: str) -> bool:
    """Whether a text is a table of pixels: its first line has numbers from 0 to 255, those of a square picture, and a class in front or behind; or a header
    that says so (`label, pixel0, ...`)."""
    first = text.lstrip()[: text.lstrip().find("\n")].split(",")
    side = math.isqrt(len(first) - 1)
    if side < SMALLEST or side * side != len(first) - 1:
        return False
    return _headed(first) or all(_is_pixel(cell) for cell in first)


def rows_of(data: bytes, file: str) -> list[Row]:
    """A row for each picture: `image` names it, `label` is its class.

    Args:
        data: the content, not gzipped. file: as the user named it.

    Raises:
        IngraftError: arrays that are no pictures.
    """
    found = _parsed(data, file)
    name, reader = Path(file).name, "npz" if data[:2] == b"PK" else "csv"
    return [
        Row(
            values={"image": f"{name}[{i}]", **({"label": found.labels[i]} if found.labels is not None else {})},
            file=file,
            line=i + 1,
            reader=reader,
        )
        for i in range(len(found.images))
    ]


def images_in(path: Path) -> NDArray[Any]:
    """The pictures of a file, read once as long as it stays what it is."""
    stat = path.stat()
    return _kept(str(path), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=8)
def _kept(path: str, changed: int, size: int) -> NDArray[Any]:
    del changed, size  # here so that a changed file is read anew
    data = Path(path).read_bytes()
    return _parsed(gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data, path).images


def _parsed(data: bytes, file: str) -> Arrays:
    return _from_npz(data, file) if holds_arrays(data) else _from_table(data.decode("utf-8-sig"), file)


def _from_npz(data: bytes, file: str) -> Arrays:
    import numpy as np

    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise IngraftError(f"{file}: broken .npz file: {error}") from error
    images, labels, names = (next((arrays[n] for n in known if n in arrays), None) for known in (IMAGES, LABELS, NAMES))
    if images is None:
        raise IngraftError(
            f"{file}: holds the arrays {', '.join(arrays)}; pictures are expected as 'images', their classes as 'labels'."
        )
    problems: list[str] = []
    if images.ndim == 4 and images.shape[3] == 1:
        images = images[..., 0]
    if images.dtype != np.uint8 or not (images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (3, 4))):
        problems.append(
            f"{file}: 'images' is {images.dtype} of shape {images.shape}; whole numbers of 8 bits (uint8) of shape (N, height, width) or "
            "(N, height, width, 3) are expected."
        )
    if labels is not None and (labels.shape != images.shape[:1] or labels.dtype.kind not in "iuUb"):
        problems.append(
            f"{file}: 'labels' is {labels.dtype} of shape {labels.shape}; one class for each of {len(images)} pictures is expected."
        )
    elif (
        labels is not None
        and names is not None
        and labels.dtype.kind in "iu"
        and not ((labels >= 0) & (labels < len(names))).all()
    ):
        problems.append(
            f"{file}: 'labels' goes from {labels.min()} to {labels.max()}, and there are {len(names)} 'names'."
        )
    if problems:
        raise IngraftError(*problems)
    return Arrays(images=images, labels=None if labels is None else _named(labels, names))


def _named(labels: Any, names: Any) -> tuple[str, ...]:
    if names is None or labels.dtype.kind not in "iu":
        return tuple(str(label) for label in labels.tolist())
    return tuple(str(names[label]) for label in labels.tolist())


def _from_table(text: str, file: str) -> Arrays:
    """A picture a line."""
    import numpy as np

    first = text.lstrip()[: text.lstrip().find("\n")].split(",")
    headed = _headed(first)
    try:
        cells = np.loadtxt(io.StringIO(text), delimiter=",", skiprows=1 if headed else 0, ndmin=2)
    except ValueError as error:
        raise IngraftError(f"{file}: a table of pixels, and not all of it is numbers: {error}") from error
    at = [cell.strip().lower() for cell in first].index("label") if headed else _where_the_class_is(cells, file)
    pixels, side = np.delete(cells, at, axis=1), math.isqrt(cells.shape[1] - 1)
    if wrong := np.argwhere((pixels < 0) | (pixels > 255) | (pixels != np.floor(pixels))).tolist():
        raise IngraftError(f"{file}: picture {wrong[0][0] + 1} has a pixel that is no whole number from 0 to 255.")
    return Arrays(
        images=pixels.astype(np.uint8).reshape(-1, side, side),
        labels=tuple(f"{label:g}" for label in cells[:, at].tolist()),
    )


def _where_the_class_is(cells: Any, file: str) -> int:
    """The first or the last column of a table without a header: the one that varies, where the other is the corner of every picture.

    Raises:
        IngraftError: both could be.
    """
    ends = [len(set(cells[:, at].tolist())) for at in (0, -1)]
    if (ends[0] > 1) == (ends[1] > 1):
        raise IngraftError(
            f"{file}: a table of pixels without a header; whether the first or the last column is the class cannot be told. Add a header: label, pixel0, ..."
        )
    return 0 if ends[0] > 1 else cells.shape[1] - 1


def _headed(first: Sequence[str]) -> bool:
    names = [cell.strip().lower() for cell in first]
    return names.count("label") == 1 and sum(name.startswith("pixel") for name in names) == len(names) - 1


def _is_pixel(cell: str) -> bool:
    try:
        return 0 <= float(cell) <= 255
    except ValueError:
        return False
