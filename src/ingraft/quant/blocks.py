"""What a format of packed blocks is, and how a matrix comes out of one.

A packed matrix is one tensor of bytes, so that a layer has one parameter: casting a model to another dtype cannot touch it, ties, copies and
files treat it like any weight, and putting it back after a merge is putting one tensor back.

Numbers are computed in float32, exactly as the format's own definition says, and rounded once to the dtype asked for: an adapter then sees the
same base on every machine, whichever library quantised it. Computing in bfloat16 all the way would save a quarter of the time and give
other numbers. Where codes are to be scaled as they are (all of GGUF's formats), a byte holds codes that lie far apart in their row: shifting
and masking then write long runs, which torch vectorises, in half the time of looking codes up (`spread`). Where every code stands for a level of
its own (nf4), codes are looked up two at a time: a table of 256 pairs, read as one 64-bit number each, costs a third of one look-up a code.

Legend: O rows, I columns, N codes.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

PIECE = 2**20
"""Numbers unpacked at once: 4 MB in float32, which the caches of most processors hold."""


class Format(ABC):
    """One way to pack a matrix. Stateless.

    Attributes:
        name: as in recipes and messages.
        block: how many numbers share a scale.
        by_rows: whether every row is packed by itself, (O, bytes), so that rows can be picked and put in another order. The rows are then
            whole blocks.
    """

    name: ClassVar[str]
    block: ClassVar[int]
    by_rows: ClassVar[bool] = True

    @abstractmethod
    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        """The shape of the packed tensor for a matrix (O, I)."""

    @abstractmethod
    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` in float32, a tensor of its own."""


class Quantiser(Format):
    """A format that any matrix can be brought into. Abstract."""

    @abstractmethod
    def quantise(self, W_OI: Tensor) -> Tensor:
        """The matrix, packed."""


class FileFormat(Format):
    """A format of GGUF's. Abstract.

    In memory the codes of a row stand together, then its scales: the file's blocks of 18 to 210 bytes are neither aligned nor long enough to
    be worked on quickly. Not a bit is lost or added.

    Attributes:
        bytes: of one block in the file.
    """

    bytes: ClassVar[int]

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return shape[0], shape[1] // self.block * self.bytes

    @abstractmethod
    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        """What a packed row consists of, each (O, bytes), given the blocks as the file has them: rows, blocks in a row, bytes in a block."""

    def pack(self, raw: Tensor) -> Tensor:
        """A matrix packed, from the file's bytes (O, bytes of a row)."""
        return torch.cat(self.regrouped(raw.view(raw.shape[0], -1, self.bytes)), dim=1)


def dequantise(form: Format, packed: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix (O, I) in a dtype."""
    if shape[0] * shape[1] <= PIECE:
        return form.values(packed, shape, 0, shape[0]).to(dtype)
    out_OI = torch.empty(shape, dtype=dtype, device=packed.device)
    for start, stop in pieces(shape):
        out_OI[start:stop] = form.values(packed, shape, start, stop)
    return out_OI


def pieces(shape: tuple[int, int], size: int = PIECE) -> Iterator[tuple[int, int]]:
    """Ranges of rows with at most so many numbers."""
    step = max(1, size // shape[1])
    return ((start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def spread(packed_OP: Tensor, bits: int) -> Tensor:
    """Codes of 1, 2 or 4 bits, uint8, from bytes that hold several: (O, P) becomes (O, 8 P / bits). Byte p holds in its lowest bits code p, in
    the next ones code p + P, and so on."""
    last = 8 - bits
    parts = [(packed_OP >> shift) & (2**bits - 1) for shift in range(bits, last, bits)]
    return torch.cat([packed_OP & (2**bits - 1), *parts, packed_OP >> last], dim=1)


def gathered(codes_OI: Tensor, bits: int) -> Tensor:
    """The inverse of `spread`."""
    parts = codes_OI.chunk(8 // bits, dim=1)
    return functools.reduce(torch.bitwise_or, (part << (bits * place) for place, part in enumerate(parts)))


def scaled(codes_OI: Tensor, scale: Tensor, offset: Tensor | None = None) -> Tensor:
    """scale * code + offset in float32, with one of each for so many codes of a row as go into it: scales (O, B) for codes (O, I)."""
    values_OI = codes_OI.float()
    blocks = values_OI.view(*scale.shape, -1).mul_(scale[..., None])
    if offset is not None:
        blocks.add_(offset[..., None])
    return values_OI


def two_codes(codes: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Bytes of two four-bit codes each, first code in the upper half, as float32 levels: (..., n) becomes (..., 2 n)."""
    found = torch.index_select(_pairs(levels, codes.device), 0, codes.reshape(-1).to(torch.int32))
    return found.view(torch.float32).view(*codes.shape[:-1], -1)


def _pairs(levels: tuple[float, ...], device: torch.device) -> Tensor:
    """For every byte its two levels, side by side in one 64-bit number."""

    def make() -> Tensor:
        table, byte = torch.tensor(levels, dtype=torch.float32), torch.arange(256)
        return torch.stack([table[byte >> 4], table[byte & 15]], dim=1).view(torch.int64).reshape(-1).to(device)

    return kept((levels, device), make)


_TABLES: dict[Hashable, Tensor] = {}


def kept(key: Hashable, make: Callable[[], Tensor]) -> Tensor:
    """A table that is made once. `functools.cache` would not do: torch.compile looks through it and says so with a warning."""
    found = _TABLES.get(key)
    if found is None:
        found = make()
        if not torch.compiler.is_compiling():
            _TABLES[key] = found
    return found


def two_in_a_byte(codes: Tensor) -> Tensor:
    """The inverse of `two_codes` for codes 0 to 15 along the last dimension."""
    return (codes[..., ::2] << 4) | codes[..., 1::2]


def halves(raw: Tensor) -> Tensor:
    """Bytes as the float16 numbers they are, in float32."""
    return raw.contiguous().view(torch.float16).float()
