"""A safetensors file, read once.

The library's own reader maps a file and is asked tensor by tensor, beside which the digest would be that of another reading of the file. Here the
file is opened once, its numbers are read once (not before they are asked for: a header can be refused alone), digest and tensors come from the
same bytes, and tensors are views of them. The format is a length, a JSON object and the numbers, so reading it is short; what the library refuses is
refused here, which a test holds it to.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ingraft.adapt.files.folders import Header
from ingraft.errors import IngraftError

LARGEST_HEADER = 100_000_000
"""As in the format's definition."""

KINDS: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "I16": torch.int16,
    "U16": torch.uint16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U32": torch.uint32,
    "F32": torch.float32,
    "C64": torch.complex64,
    "F64": torch.float64,
    "I64": torch.int64,
    "U64": torch.uint64,
}
"""Safetensors' names of dtypes. Its four- and six-bit numbers are read by nobody here."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Mended:
    """What a file would hold that kept all that its adapter needs."""

    path: Path
    tensors: Mapping[str, Tensor]

    @property
    def header(self) -> Header:
        names = {dtype: name for name, dtype in KINDS.items()}
        return {key: (tuple(tensor.shape), names[tensor.dtype]) for key, tensor in self.tensors.items()}

    def tensor(self, key: str) -> Tensor:
        return self.tensors[key]


class TensorFile:
    """An open file; see `open_tensors`.

    Attributes:
        path: of the file.
        promised: how long the header is said to be; head: what is there of it; size: bytes of numbers behind it.
    """

    def __init__(self, path: Path, stream: BinaryIO) -> None:
        self.path, self._stream = path, stream
        facts = os.fstat(stream.fileno())
        if not stat.S_ISREG(facts.st_mode):
            raise _unreadable(path, "not a plain file")
        self._length = stream.read(8)
        # What is wrong with it is said when the header is asked for: a digest that differs says more.
        self.promised = int.from_bytes(self._length, "little")
        self.head = stream.read(min(self.promised, LARGEST_HEADER))
        self.size = max(facts.st_size - 8 - len(self.head), 0)

    @functools.cached_property
    def data(self) -> Tensor:
        """All numbers, (bytes,) uint8."""
        found = torch.empty(self.size, dtype=torch.uint8)
        view, done = found.numpy().data, 0
        while done < self.size:
            try:
                count = self._stream.readinto(view[done:])  # type: ignore[attr-defined]
            except OSError as error:
                raise _unreadable(self.path, error.strerror or error) from error
            if not count:
                raise _unreadable(self.path, "it became shorter while it was read")
            done += count
        return found

    def digest(self) -> Callable[[], str]:
        """Begin to work out the file's sha256; the function that is returned waits for it. The hash lets other threads run meanwhile."""
        found = hashlib.sha256()
        pieces = (self._length, self.head, self.data.numpy().data)
        worker = Thread(target=lambda: [found.update(piece) for piece in pieces], daemon=True)
        worker.start()

        def wait() -> str:
            worker.join()
            return found.hexdigest()

        return wait

    @functools.cached_property
    def _entries(self) -> dict[str, tuple[str, tuple[int, ...], int, int]]:
        """Dtype, shape, begin and end of each tensor, in the order of their numbers.

        Raises:
            IngraftError: not a safetensors file.
        """
        if len(self._length) < 8 or self.promised != len(self.head):
            raise _unreadable(self.path, "its header is larger than the file, or than a header may be")
        try:
            return dict(_entries_of(self.head, self.size))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise _unreadable(self.path, error) from error

    @functools.cached_property
    def header(self) -> Header:
        """Shape and dtype (safetensors' name) of each tensor, by name.

        Raises:
            IngraftError: not a safetensors file.
        """
        return {key: (shape, kind) for key, (kind, shape, _, _) in self._entries.items()}

    def tensor(self, key: str) -> Tensor:
        """A tensor: a view of the numbers, or a copy where they lie across the boundaries of their dtype."""
        kind, shape, begin, end = self._entries[key]
        piece = self.data[begin:end]
        return (piece if begin % KINDS[kind].itemsize == 0 else piece.clone()).view(KINDS[kind]).view(shape)


Tensors = TensorFile | Mended
"""What a file holds, however it was come by."""


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """A safetensors file for the length of the block.

    Raises:
        IngraftError: it cannot be opened, or does not begin like one.
    """
    try:
        stream = path.open("rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error.strerror or error) from error
    with stream:
        yield TensorFile(path, stream)  # type: ignore[arg-type]


def read_header(weights: Path) -> Header:
    """Shape and dtype of every tensor in a file, by name; the values stay on the disk.

    Raises:
        IngraftError: not a safetensors file.
    """
    with open_tensors(weights) as file:
        return file.header


def all_finite(values: Tensor) -> bool:
    """Whether there is no infinity and no NaN among them; both show in the extremes, which take a tenth of the time of looking at each."""
    if not values.is_floating_point() or values.numel() == 0:
        return True
    least, most = torch.aminmax(values)
    return math.isfinite(least.item()) and math.isfinite(most.item())


def _unreadable(path: Path, why: object) -> IngraftError:
    return IngraftError(f"{path}: not a readable safetensors file: {why}.")


def _entries_of(head: bytes, size: int) -> Iterator[tuple[str, tuple[str, tuple[int, ...], int, int]]]:
    """What a header says, checked: the tensors lie one behind the other and fill the file."""
    if not head.startswith(b"{"):
        raise ValueError("its header is no JSON object")
    fields: Any = json.loads(head, parse_constant=_refuse)
    meta = fields.pop("__metadata__", {})
    if not isinstance(meta, dict) or not all(isinstance(value, str) for value in meta.values()):  # type: ignore[union-attr]
        raise ValueError("its __metadata__ is no mapping of texts")
    for key, entry in fields.items():
        begin, end = entry["data_offsets"]
        if len(entry) != 3 or not all(type(n) is int and n >= 0 for n in (begin, end, *entry["shape"])):
            raise ValueError(f"{key!r} is not described by dtype, shape and data_offsets")
    done = 0
    for key, entry in sorted(fields.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        if kind not in KINDS:
            raise ValueError(f"{key!r} has dtype {kind!r}")
        if begin != done or end - begin != math.prod(shape) * KINDS[kind].itemsize:
            raise ValueError(f"{key!r} does not lie where its shape and the tensor before it say")
        done = end
        yield key, (kind, shape, begin, end)
    if done != size:
        raise ValueError(f"its tensors have {done} bytes, and it holds {size}")


def _refuse(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")
