"""GGUF's Q6_K: six-bit codes in blocks of 256, the scale of every 16 given in eight bits.

    w = d s (q - 32)

Defined in ggml (`block_q6_K`); the values are those of the `gguf` package, which a test compares. A block is 128 bytes with the lower four bits of
the codes, 64 with the upper two, sixteen s, then d (float16). In memory two lower parts and four upper parts share a byte, in order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ingraft.quant.blocks import FileFormat, by_block, halves, kept, two_codes, two_in_a_byte
from ingraft.quant.q4 import UNSIGNED, split_halves


class Q6_K(FileFormat):
    name, block, bytes = "Q6_K", 256, 210

    def regrouped(self, blocks_OBb: Tensor) -> list[Tensor]:
        low, high, s, d = blocks_OBb.split([128, 64, 16, 2], dim=-1)
        low = split_halves(low.unflatten(-1, (2, 64)))
        high = high.unflatten(-1, (2, 32))
        high = torch.cat([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=-1).flatten(2)
        four = high[..., ::4] << 6 | high[..., 1::4] << 4 | high[..., 2::4] << 2 | high[..., 3::4]
        return [two_in_a_byte(low).flatten(1), four.flatten(1), s.flatten(1), d.flatten(1)]

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        width = shape[1]
        low, high, s, d = packed[start:stop].split([width // 2, width // 4, width // 16, width // 128], dim=1)
        values_OI = two_codes(low, UNSIGNED)
        values_OI.add_(_four_codes(high))
        scale = halves(d)[..., None] * s.reshape(-1, width // 256, 16).view(torch.int8)
        by_block(values_OI, 16).mul_(scale.view(-1, width // 16, 1))
        return values_OI


def _four_codes(high: Tensor) -> Tensor:
    """Bytes of four upper parts each as the 16 h - 32 they stand for: (O, n) becomes (O, 4 n)."""
    found = torch.index_select(_fours(high.device), 0, high.reshape(-1).to(torch.int32))
    return torch.view_as_real(found).view(torch.float32).reshape(high.shape[0], -1)


def _fours(device: torch.device) -> Tensor:
    """For every byte its four numbers, side by side in one 128-bit number."""

    def make() -> Tensor:
        byte = torch.arange(256)
        table = torch.stack([16.0 * ((byte >> shift) & 3) - 32.0 for shift in (6, 4, 2, 0)], dim=1).float()
        return torch.view_as_complex(table.view(torch.float64)).to(device)

    return kept(("fours", device), make)
