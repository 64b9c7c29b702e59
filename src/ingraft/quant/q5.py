"""GGUF's Q5_0, Q5_1 and Q5_K: four-bit codes with a fifth bit kept apart.

    Q5_0: w = d (q - 16)        Q5_1: w = d q + m        Q5_K: w = d s q - dmin m

Defined in ggml (`block_q5_0`, `block_q5_1`, `block_q5_K`); the values are those of the `gguf` package, which a test compares. Files called Q4_K_M hold
Q5_0 where rows are no whole blocks of 256. In memory eight fifth bits share a byte, in order.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, by_block, halves, kept, two_codes, two_in_a_byte
from ingraft.quant.q4 import SIGNED, UNSIGNED, split_halves
from ingraft.quant.q4_k import scales_and_offsets


def _fifth_bits(rows: Tensor, lowest: int) -> Tensor:
    """Bytes of eight fifth bits each as `lowest` or `lowest` + 16, int8: (O, n) becomes (O, 8 n)."""
    found = torch.index_select(_eights(lowest, rows.device), 0, rows.reshape(-1).to(torch.int32))
    return found.view(torch.int8).view(rows.shape[0], -1)


def _eights(lowest: int, device: torch.device) -> Tensor:
    """For every byte its eight numbers, side by side in one 64-bit number."""

    def make() -> Tensor:
        byte = torch.arange(256)
        table = torch.stack([lowest + 16 * ((byte >> shift) & 1) for shift in range(8)], dim=1)
        return table.to(torch.int8).view(torch.int64).reshape(-1).to(device)

    return kept(("eights", lowest, device), make)


def _eight_in_a_byte(bits: Tensor) -> Tensor:
    """The inverse, for bits along the last dimension."""
    eight = bits.unflatten(-1, (-1, 8))
    return functools.reduce(torch.bitwise_or, (eight[..., shift] << shift for shift in range(8)))


class Q5_0(FileFormat):
    name, block, bytes = "Q5_0", 32, 22

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, high, low = blocks_OBb.split([2, 4, 16], dim=-1)
        return [two_in_a_byte(split_halves(low)).flatten(1), high.flatten(1), d.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, d = packed[start:stop].split([width // 2, width // 8, width // 16], dim=1)
        values_OI = two_codes(low, SIGNED).add_(_fifth_bits(high, -8))
        by_block(values_OI, 32).mul_(halves(d)[..., None])
        return values_OI


class Q5_1(FileFormat):
    name, block, bytes = "Q5_1", 32, 24

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, m, high, low = blocks_OBb.split([2, 2, 4, 16], dim=-1)
        return [two_in_a_byte(split_halves(low)).flatten(1), high.flatten(1), d.flatten(1), m.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, d, m = packed[start:stop].split([width // 2, width // 8, width // 16, width // 16], dim=1)
        values_OI = two_codes(low, UNSIGNED).add_(_fifth_bits(high, 0))
        by_block(values_OI, 32).mul_(halves(d)[..., None]).add_(halves(m)[..., None])
        return values_OI


class Q5_K(FileFormat):
    name, block, bytes = "Q5_K", 256, 176

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        d, scales, high, low = blocks_OBb.split([4, 12, 32, 128], dim=-1)
        codes = split_halves(low.unflatten(-1, (4, 32)))
        bits = torch.stack([(high >> shift) & 1 for shift in range(8)], dim=-2)  # byte i holds bit i of every 32
        return [
            two_in_a_byte(codes).flatten(1),
            _eight_in_a_byte(bits.flatten(2)).flatten(1),
            d.flatten(1),
            scales.flatten(1),
        ]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, scales = packed[start:stop].split([width // 2, width // 8, width // 16], dim=1)
        values_OI = two_codes(low, UNSIGNED).add_(_fifth_bits(high, 0))
        scale, offset = scales_and_offsets(scales, width // 256)
        by_block(values_OI, 32).mul_(scale).sub_(offset)
        return values_OI
