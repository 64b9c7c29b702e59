"""GGUF's Q8_0: eight-bit codes in blocks of 32.

    w = d q,    q from -127 to 127

Defined in ggml (`block_q8_0`); the values are those of the `gguf` package, which a test compares.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, by_block, halves


class Q8_0(FileFormat):
    name, block, bytes = "Q8_0", 32, 34

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        return [blocks_OBb[..., 2:].flatten(1), blocks_OBb[..., :2].flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        rows = packed[start:stop]
        values_OI = rows[:, : shape[1]].view(torch.int8).to(torch.float32, memory_format=torch.contiguous_format)
        by_block(values_OI, 32).mul_(halves(rows[:, shape[1] :])[..., None])
        return values_OI
