"""GGUF's Q4_0 and Q4_1: four-bit codes in blocks of 32.

    Q4_0: w = d (q - 8)        Q4_1: w = d q + m

Defined in ggml (`block_q4_0`, `block_q4_1`); the values are those of the `gguf` package, which a test compares. In the file code j lies in the lower
half of byte j, code j + 16 in its upper half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, gathered, halves, scaled, spread


def split_halves(raw: Tensor) -> Tensor:
    """Codes in order, from bytes whose lower halves come first and whose upper halves follow: the last dimension doubles."""
    return torch.cat([raw & 15, raw >> 4], dim=-1)


class Q4_0(FileFormat):
    name, block, bytes = "Q4_0", 32, 18

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        return [gathered(split_halves(blocks_OBb[..., 2:]).flatten(1), 4), blocks_OBb[..., :2].flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        codes, d = packed[start:stop].split([shape[1] // 2, shape[1] // 16], dim=1)
        return scaled(spread(codes, 4).view(torch.int8).sub_(8), halves(d))


class Q4_1(FileFormat):
    name, block, bytes = "Q4_1", 32, 20

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        codes = split_halves(blocks_OBb[..., 4:]).flatten(1)
        return [gathered(codes, 4), blocks_OBb[..., :2].flatten(1), blocks_OBb[..., 2:4].flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        codes, d, m = packed[start:stop].split([shape[1] // 2, shape[1] // 16, shape[1] // 16], dim=1)
        return scaled(spread(codes, 4), halves(d), halves(m))
