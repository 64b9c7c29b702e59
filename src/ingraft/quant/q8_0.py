"""GGUF's Q8_0: eight-bit codes in blocks of 32.

    w = d q,    q from -127 to 127

Defined in ggml (`block_q8_0`); the values are those of the `gguf` package, which a test compares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, halves, scaled


class Q8_0(FileFormat):
    name, block, bytes = "Q8_0", 32, 34

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        return [blocks_OBb[..., 2:].flatten(1), blocks_OBb[..., :2].flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        rows = packed[start:stop]
        return scaled(rows[:, : shape[1]].view(torch.int8), halves(rows[:, shape[1] :]))
