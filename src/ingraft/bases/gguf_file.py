"""Whether a GGUF file is whole and sound, asked before anything is made of it.

Libraries that read the format trust its header. Of a file that was cut short they tell the slip of whichever parser met the end first, and a
block whose scale is no number becomes a model that answers NaN. So the header is walked here with every length held against the file, which
takes a tenth of a second where the format's own reader takes three, and the values are looked at once, when the file is converted.
"""

from __future__ import annotations

import mmap
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGMLQuantizationType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ADVICE = "Fetch it again and compare its size with the one at its source."

_STRING, _ARRAY = 8, 9
_WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of metadata, by the number of its type; text and lists have lengths of their own."""

_COUNTS = {4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
"""How a whole number is read, by the same."""

_LAYER = re.compile(r"blk\.(\d+)\.")

SCALES = {
    "Q4_0": (0, 2),
    "Q4_1": (0, 4),
    "Q5_0": (0, 2),
    "Q5_1": (0, 4),
    "Q8_0": (0, 2),
    "Q2_K": (80, 84),
    "Q3_K": (108, 110),
    "Q4_K": (0, 4),
    "Q5_K": (0, 4),
    "Q6_K": (208, 210),
}
"""Where a block keeps its half-precision scales: the rest are small integers, so the scales alone decide whether its values are numbers."""


@dataclass(frozen=True, kw_only=True)
class Stored:
    """Where a tensor lies: its type's number, its shape with the width first, its first byte behind the header."""

    kind: int
    shape: tuple[int, ...]
    start: int


def check_whole(path: Path) -> None:
    """Refuse a file that is no GGUF, that ends before its header says, or whose header cannot be. Reads the header only.

    Raises:
        IngraftError: see above.
    """
    tensors, start = _header(path)
    size = path.stat().st_size
    ends = {name: start + one.start + _bytes(path, name, one) for name, one in tensors.items()}
    if cut := [name for name, end in ends.items() if end > size]:
        raise IngraftError(
            f"{path}: is not a whole GGUF file: it has {size:,} bytes and its header tells of {max(ends.values()):,}, so it lacks "
            f"{_some(cut)}, or part of it. {ADVICE}"
        )


def check_values(path: Path) -> None:
    """Refuse a whole file with values that are no numbers. Reads all of it.

    Raises:
        IngraftError: naming the tensors.
    """
    import numpy as np
    from gguf import GGMLQuantizationType

    tensors, start = _header(path)
    content = np.memmap(path, np.uint8, "r")
    damaged: list[str] = []
    for name, one in tensors.items():
        first = start + one.start
        kind = GGMLQuantizationType(one.kind)
        if not is_finite(content[first : first + _bytes(path, name, one)], kind):
            damaged.append(name)
    if damaged:
        raise IngraftError(
            f"{path}: is damaged: some values are no numbers (NaN or infinite), in {_some(damaged)}. "
            "Fetch it again and compare its checksum with the one at its source."
        )


def is_finite(raw: np.ndarray, kind: GGMLQuantizationType) -> bool:
    """Whether a tensor's bytes stand for numbers only. A million blocks are looked at together, to bound the memory."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES
    from gguf.quants import dequantize

    if kind.name in ("I8", "I16", "I32", "I64"):
        return True
    floats = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(kind.name)
    blocks = raw.reshape(-1, GGML_QUANT_SIZES[kind][1])
    count = 2**20 if floats or kind.name in SCALES else 2**12
    for first in range(0, len(blocks), count):
        some = blocks[first : first + count]
        if floats:
            values = some.view(floats)
        elif kind.name in SCALES:
            begin, end = SCALES[kind.name]
            values = np.ascontiguousarray(some[:, begin:end]).view("<f2")
        else:
            try:
                with np.errstate(all="ignore"):
                    values = dequantize(np.ascontiguousarray(some), kind)
            except NotImplementedError:
                return True  # whoever reads this type will say
        if not np.isfinite(values).all():
            return False
    return True


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _bytes(path: Path, name: str, one: Stored) -> int:
    """What a tensor takes in the file."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(one.kind)]
    except (ValueError, KeyError):
        raise IngraftError(
            f"{path}: {name} is of type {one.kind}, which the installed gguf package does not know. Either the file is damaged (fetch it again "
            "and compare its size), or a newer gguf package is needed."
        ) from None
    if one.shape and one.shape[0] % block:
        raise IngraftError(
            f"{path}: does not hold what its header says: {name} is {one.shape[0]} wide, and its type comes in blocks of {block}. {ADVICE}"
        )
    return prod(one.shape) // block * size


def _header(path: Path) -> tuple[dict[str, Stored], int]:
    """The tensors of a file by name, and where the first byte behind the header lies."""
    try:
        with path.open("rb") as file:
            start = file.read(4)
            if start != MAGIC:
                if MAGIC.startswith(start):
                    raise IngraftError(f"{path}: is not a whole GGUF file: it has {len(start)} bytes. {ADVICE}")
                raise IngraftError(f"{path}: is not a GGUF file; it begins with {start!r}.")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _walk(path, content)
    except OSError as error:
        raise IngraftError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _walk(path: Path, content: mmap.mmap) -> tuple[dict[str, Stored], int]:
    try:
        walk = _Walk(content)
        (version,) = walk.numbers("<I")
        if version not in VERSIONS:
            raise IngraftError(
                f"{path}: its header says version {version} of GGUF; versions 2 and 3 are read. If it should be one of those, it is damaged: "
                "fetch it again and compare its size."
            )
        count, pairs = walk.numbers("<QQ")
        alignment, layers = 32, None
        for _ in range(pairs):
            key, (kind,) = walk.text(), walk.numbers("<I")
            place = walk.place
            walk.skip(kind)
            if key == b"general.alignment":
                (alignment,) = struct.unpack_from("<I", content, place)
            elif key.endswith(b".block_count") and kind in _COUNTS:
                (layers,) = struct.unpack_from(_COUNTS[kind], content, place)
        tensors: dict[str, Stored] = {}
        for _ in range(count):
            name, (sizes,) = walk.text(), walk.numbers("<I")
            shape = walk.numbers(f"<{sizes}Q")
            kind, start = walk.numbers("<IQ")
            tensors[name.decode()] = Stored(kind=kind, shape=shape, start=start)
        end = -(-walk.place // alignment) * alignment
    except (struct.error, OverflowError):  # a length or a number that leads behind the end
        raise IngraftError(
            f"{path}: is not a whole GGUF file: its {len(content):,} bytes end inside its header. {ADVICE}"
        ) from None
    except (ValueError, ZeroDivisionError, RecursionError) as error:
        raise IngraftError(f"{path}: its header is damaged: {error}. {ADVICE}") from error
    if not tensors:
        raise IngraftError(f"{path}: is a GGUF file without tensors, which is no model. {ADVICE}")
    held = max((int(found[1]) + 1 for name in tensors if (found := _LAYER.match(name))), default=0)
    if layers is not None and held > layers:
        raise IngraftError(
            f"{path}: does not hold what its header says: the header tells of {layers} layers and there are tensors of {held}. A model made "
            f"of it would leave the others out. {ADVICE}"
        )
    return tensors, end


class _Walk:
    """A place in the header that moves on as it is read. What lies behind the end raises `struct.error`."""

    def __init__(self, content: mmap.mmap) -> None:
        self.content, self.place = content, len(MAGIC)

    def numbers(self, form: str) -> tuple[int, ...]:
        found = struct.unpack_from(form, self.content, self.place)
        self.place += struct.calcsize(form)
        return found

    def text(self) -> bytes:
        (length,) = self.numbers("<Q")
        begin, self.place = self.place, self.place + length
        return self.content[begin : self.place]

    def skip(self, kind: int) -> None:
        """Pass over a value of metadata."""
        if kind == _STRING:
            (length,) = self.numbers("<Q")
            self.place += length
        elif kind == _ARRAY:
            inner, count = self.numbers("<IQ")
            if inner in _WIDTHS:
                self.place += count * _WIDTHS[inner]
                return
            for _ in range(count):
                self.skip(inner)
        elif kind in _WIDTHS:
            self.place += _WIDTHS[kind]
        else:
            raise ValueError(f"it holds a value of type {kind}, which GGUF does not have")
