"""GGUF's Q6_K: six-bit codes in blocks of 256, the scale of every 16 given in eight bits.

    w = d s (q - 32)

Defined in ggml (`block_q6_K`); the values are those of the `gguf` package, which a test compares. A block is 128 bytes with the lower four bits of
the codes, 64 with the upper two, sixteen s, then d (float16). In memory two lower parts and four upper parts share a byte (`spread`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, gathered, halves, scaled, spread
from ingraft.quant.q4 import split_halves


class Q6_K(FileFormat):
    name, block, bytes = "Q6_K", 256, 210

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        low, high, s, d = blocks_OBb.split([128, 64, 16, 2], dim=-1)
        low = split_halves(low.unflatten(-1, (2, 64)))
        high = high.unflatten(-1, (2, 32))
        high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1)
        return [gathered(low.flatten(1), 4), gathered(high.flatten(1), 2), s.flatten(1), d.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, s, d = packed[start:stop].split([width // 2, width // 4, width // 16, width // 128], dim=1)
        codes = spread(low, 4).bitwise_or_(spread(high, 2).bitwise_left_shift_(4)).view(torch.int8).sub_(32)
        scale = halves(d)[..., None] * s.reshape(-1, width // 256, 16).view(torch.int8)
        return scaled(codes, scale.flatten(1))
