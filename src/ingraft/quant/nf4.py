"""nf4: sixteen levels at the quantiles of a normal distribution, scaled by the largest of every 64 numbers; the scales quantised again.

    w = level[code] * absmax,    absmax = map[code8] * absmax2 + mean,    absmax2 for every 256 of them

Paper: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs", NeurIPS 2023 (arXiv:2305.14314), sections 3 and 4; the eight-bit map is
that of Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861). Read against bitsandbytes' `quantize_4bit` with
`compress_statistics`; codes, scales and values are the same, which a test compares.

Packed: codes (two to a byte), then code8, then absmax2 and the mean in float32. Blocks run on over the ends of rows, as theirs do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ingraft.quant.blocks import Quantiser, kept, two_codes, two_in_a_byte

LEVELS = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334),
    *(-0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""As published (appendix E of the paper)."""

OUTER = 256
"""Scales that share a scale."""


class NF4(Quantiser):
    name = "nf4"
    block = 64
    by_rows = False

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (_sections(shape)[-1],)

    def quantise(self, W_OI: Tensor) -> Tensor:
        flat = W_OI.detach().reshape(-1).float()
        blocks = F.pad(flat, (0, -flat.numel() % self.block)).view(-1, self.block)
        codes, absmax = _nearest(blocks, torch.tensor(LEVELS, device=flat.device))
        mean = absmax.mean()
        # Padding with the mean itself: zero is what is quantised there.
        outer = F.pad(absmax - mean, (0, -len(absmax) % OUTER)).view(-1, OUTER)
        code8, absmax2 = _nearest(outer, _dynamic_map(flat.device))
        first = torch.cat([two_in_a_byte(codes).view(-1), code8.view(-1)[: len(absmax)]])
        first = F.pad(first, (0, -len(first) % 4))
        return torch.cat([first, torch.cat([absmax2, mean[None]]).view(torch.uint8)])

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        low, high = start * shape[1], stop * shape[1]
        first, last = low // self.block, -(-high // self.block)
        begin, middle, _ = _sections(shape)
        half = self.block // 2
        values = two_codes(packed[first * half : last * half].view(-1, half), LEVELS)
        tail = packed[middle:].view(torch.float32)
        absmax = torch.index_select(
            _dynamic_map(packed.device), 0, packed[begin + first : begin + last].to(torch.int32)
        )
        scale = tail[first // OUTER : -(-last // OUTER)].repeat_interleave(OUTER)[first % OUTER :][: last - first]
        values.mul_(absmax.mul_(scale).add_(tail[-1])[:, None])
        at = low - first * self.block
        return values.view(-1)[at : at + high - low].view(stop - start, shape[1])


def _sections(shape: tuple[int, int]) -> tuple[int, int, int]:
    """Where the scales' codes begin, where the float32 numbers begin, and the length of all."""
    blocks = math.ceil(shape[0] * shape[1] / NF4.block)
    begin = blocks * NF4.block // 2
    middle = math.ceil((begin + blocks) / 4) * 4
    return begin, middle, middle + 4 * (math.ceil(blocks / OUTER) + 1)


def _nearest(blocks: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """The codes of the nearest levels, and each block's largest magnitude."""
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled.clamp_(-1, 1), (levels[:-1] + levels[1:]) / 2, out_int32=True)
    return codes.to(torch.uint8), absmax


def _dynamic_map(device: torch.device) -> Tensor:
    """The 256 values of the eight-bit code: seven decades, with twice as many steps in each as in the one below."""

    def make() -> Tensor:
        parts = [torch.tensor([0.0, 1.0])]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
            steps = 10.0 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)
            parts += [steps, -steps]  # no Python numbers on the way, which torch.compile could not follow
        return torch.cat(parts).sort().values.to(device)

    return kept(("dynamic map", device), make)
