"""GGUF's Q4_K: four-bit codes in blocks of 256, scale and offset of every 32 given in six bits.

    w = d s q - dmin m

Defined in ggml (`block_q4_K`); the values are those of the `gguf` package, which a test compares. A block is d and dmin (float16), twelve bytes
with eight s and eight m, then 128 bytes of codes: of each 32 bytes the lower halves, then the upper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, gathered, halves, scaled, spread
from ingraft.quant.q4 import split_halves


class Q4_K(FileFormat):
    name, block, bytes = "Q4_K", 256, 144

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        codes = split_halves(blocks_OBb[..., 16:].unflatten(-1, (4, 32))).flatten(1)
        return [gathered(codes, 4), blocks_OBb[..., :4].flatten(1), blocks_OBb[..., 4:16].flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        rows, codes = packed[start:stop], shape[1] // 2
        return scaled(spread(rows[:, :codes], 4), *scales_and_offsets(rows[:, codes:], shape[1] // 256))


def scales_and_offsets(rows: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """d s and - dmin m for every 32 numbers, each (O, 8 blocks), from rows of all d and dmin and then all twelve bytes."""
    d_OB2 = halves(rows[:, : 4 * blocks]).view(-1, blocks, 2)
    s_OB8, m_OB8 = _six_bits(rows[:, 4 * blocks :].reshape(-1, blocks, 12))
    return (d_OB2[..., :1] * s_OB8).flatten(1), (d_OB2[..., 1:] * m_OB8).neg_().flatten(1)


def _six_bits(packed_OB12: Tensor) -> tuple[Tensor, Tensor]:
    """Eight scales and eight offsets: the first four of each lie in the lower six bits of bytes of their own, the upper two bits of which
    are the upper bits of the last four."""
    s, m, rest = packed_OB12.split(4, dim=-1)
    last_s, last_m = (rest & 15) | ((s >> 6) << 4), (rest >> 4) | ((m >> 6) << 4)
    return torch.cat([s & 63, last_s], dim=-1), torch.cat([m & 63, last_m], dim=-1)
