"""GGUF's Q5_0, Q5_1 and Q5_K: four-bit codes with a fifth bit kept apart.

    Q5_0: w = d (q - 16)        Q5_1: w = d q + m        Q5_K: w = d s q - dmin m

Defined in ggml (`block_q5_0`, `block_q5_1`, `block_q5_K`); the values are those of the `gguf` package, which a test compares. Files called Q4_K_M hold
Q5_0 where rows are no whole blocks of 256. In memory eight fifth bits share a byte (`spread`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, gathered, halves, scaled, spread
from ingraft.quant.q4 import split_halves
from ingraft.quant.q4_k import scales_and_offsets


def _codes(low: Tensor, high: Tensor) -> Tensor:
    """The codes, uint8, from their lower four bits, two in a byte, and their fifth, eight in a byte."""
    return spread(low, 4).bitwise_or_(spread(high, 1).bitwise_left_shift_(4))


def _high_bits(high: Tensor) -> Tensor:
    """The fifth bits of a row as `spread` wants them, from the file's bytes (O, blocks, 4): bit i of a block's 32 is bit i % 8 of byte i / 8."""
    bits = torch.stack([(high >> shift) & 1 for shift in range(8)], dim=-1)
    return gathered(bits.flatten(1), 1)


class Q5_0(FileFormat):
    name, block, bytes = "Q5_0", 32, 22

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, high, low = blocks_OBb.split([2, 4, 16], dim=-1)
        return [gathered(split_halves(low).flatten(1), 4), _high_bits(high), d.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, d = packed[start:stop].split([width // 2, width // 8, width // 16], dim=1)
        return scaled(_codes(low, high).view(torch.int8).sub_(16), halves(d))


class Q5_1(FileFormat):
    name, block, bytes = "Q5_1", 32, 24

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, m, high, low = blocks_OBb.split([2, 2, 4, 16], dim=-1)
        return [gathered(split_halves(low).flatten(1), 4), _high_bits(high), d.flatten(1), m.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, d, m = packed[start:stop].split([width // 2, width // 8, width // 16, width // 16], dim=1)
        return scaled(_codes(low, high), halves(d), halves(m))


class Q5_K(FileFormat):
    name, block, bytes = "Q5_K", 256, 176

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, scales, high, low = blocks_OBb.split([4, 12, 32, 128], dim=-1)
        codes = split_halves(low.unflatten(-1, (4, 32)))
        bits = torch.stack([(high >> shift) & 1 for shift in range(8)], dim=-2)  # byte i holds bit i of every 32
        return [
            gathered(codes.flatten(1), 4),
            gathered(bits.flatten(1), 1),
            d.flatten(1),
            scales.flatten(1),
        ]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, scales = packed[start:stop].split([width // 2, width // 8, width // 16], dim=1)
        return scaled(_codes(low, high), *scales_and_offsets(scales, width // 256))
