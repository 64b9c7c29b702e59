"""int8: every row scaled by its largest magnitude.

    w = code * absmax / 127,    code from -127 to 127

Paper: Dettmers et al., "LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale", NeurIPS 2022 (arXiv:2208.07339), the weights of section
3.1. What differs: activations stay as they are and no outlier is treated apart; this saves memory, not arithmetic.

Packed: the codes, then absmax in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ingraft.quant.blocks import Quantiser


class Int8(Quantiser):
    name = "int8"
    block = 1
    by_rows = False

    def packed_shape(self, shape: tuple[int, int]) -> tuple[int, ...]:
        return (_scales_at(shape) + 4 * shape[0],)

    def quantise(self, W_OI: Tensor) -> Tensor:
        W_OI = W_OI.detach().float()
        absmax_O = W_OI.abs().amax(dim=1)
        codes_OI = (W_OI * (127.0 / absmax_O.clamp(min=1e-38))[:, None]).round_().to(torch.int8)
        codes = codes_OI.view(torch.uint8).reshape(-1)
        return torch.cat([F.pad(codes, (0, -len(codes) % 4)), absmax_O.view(torch.uint8)])

    def values(self, packed: Tensor, shape: tuple[int, int], start: int, stop: int) -> Tensor:
        codes = packed[start * shape[1] : stop * shape[1]].view(torch.int8).view(stop - start, shape[1])
        absmax_O = packed[_scales_at(shape) :].view(torch.float32)[start:stop]
        return codes.float().mul_((absmax_O / 127.0)[:, None])


def _scales_at(shape: tuple[int, int]) -> int:
    return -(-shape[0] * shape[1] // 4) * 4
