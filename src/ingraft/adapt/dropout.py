"""Dropout whose mask is a function of a row's key and an entry's place, so that it is made again in backward and never kept.

A mask is a hash of 32 bits for every two entries, 16 bits for each: probabilities are met to one in 65,536. The product of what is left with a small
matrix (a LoRA's A) keeps x, which other sites keep as well, and no tensor of x's size of its own.

Legend: B rows, N entries of a row, I in, R rank.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout(x: Tensor, p: float, keys_B: Tensor) -> Tensor:
    """Zero entries with probability p and scale the rest by 1 / (1 - p), each row by its own key.

    Args:
        x: dimension 0 goes with `keys_B`; the position of an entry is its flat index within the row.
    """
    return cast(Tensor, _Dropped.apply(x, p, keys_B))


def dropped_product(x: Tensor, A_RI: Tensor, p: float, keys_B: Tensor) -> Tensor:
    """A d(x), d as `dropout`: (B, ..., R)."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, A_RI = x.to(dtype), A_RI.to(dtype)
    return cast(Tensor, _Product.apply(x, A_RI, p, keys_B))


def mixed(h: Tensor) -> Tensor:
    """Two rounds of multiply and xorshift on int32, with wrap-around. Arithmetic shifts, so the sign bits are masked off."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * 0x21F0AAAD
    h = h ^ ((h >> 15) & 0x1FFFF)
    h = h * -749064809  # 0xd35a2d97 as int32
    return h ^ ((h >> 15) & 0x1FFFF)


def kept(shape: torch.Size, p: float, keys_B: Tensor) -> Tensor:
    """Which entries of a tensor of this shape stay, bool.

    Args:
        keys_B: by row; or (tokens, 2), where tokens of several rows lie end to end: the row's key, and where the token's first entry is in it.
    """
    if keys_B.dim() == 2:
        return _kept_by_token(shape, p, keys_B)
    return bits(shape, keys_B) >= int(p * 2**16) - 2**15


def bits(shape: torch.Size, keys_B: Tensor) -> Tensor:
    """int16 of this shape, uniform over all its 2^16 values, each row by its own key. What an entry gets depends on its place in the row, not on the row's length."""
    n = math.prod(shape[1:]) if shape[0] else 0
    pair_N = torch.arange((n + 1) // 2, dtype=torch.int32, device=keys_B.device)
    bits_BN = mixed(keys_B[:, None] ^ (pair_N * 0x3C6EF372)[None, :]).view(torch.int16)[:, :n]
    return bits_BN.reshape(shape)


def _kept_by_token(shape: torch.Size, p: float, keys_N2: Tensor) -> Tensor:
    """`kept`, each token as it would be in its row."""
    key_N1, first_N1 = keys_N2[:, :1], keys_N2[:, 1:]
    n = math.prod(shape) // keys_N2.shape[0]
    if n % 2:  # two tokens may share a pair
        entry_Nn = first_N1 + torch.arange(n, dtype=torch.int32, device=keys_N2.device)
        bits_Nn = mixed(key_N1 ^ ((entry_Nn >> 1) * 0x3C6EF372))
        bits_Nn = torch.where(entry_Nn % 2 == 1, bits_Nn >> 16, (bits_Nn << 16) >> 16)
    else:
        pair_Nn = (first_N1 >> 1) + torch.arange(n // 2, dtype=torch.int32, device=keys_N2.device)
        bits_Nn = mixed(key_N1 ^ (pair_Nn * 0x3C6EF372)).view(torch.int16)
    return (bits_Nn >= int(p * 2**16) - 2**15).view(shape)


def _dropped(x: Tensor, p: float, keep: Tensor) -> Tensor:
    return torch.where(keep, x, 0.0) * (1.0 / (1.0 - p))


class _Dropped(torch.autograd.Function):
    """What is left; its gradient is what is left of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, keys_B: Tensor) -> Tensor:
        ctx.save_for_backward(keys_B)
        ctx.p = p
        return _dropped(x, p, kept(x.shape, p, keys_B))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (keys_B,) = ctx.saved_tensors
        return _dropped(grads[0], ctx.p, kept(grads[0].shape, ctx.p, keys_B)), None, None


class _Product(torch.autograd.Function):
    """A d(x), of which backward is left x and A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, A_RI: Tensor, p: float, keys_B: Tensor) -> Tensor:
        ctx.save_for_backward(x, A_RI, keys_B)
        ctx.p = p
        return F.linear(torch.where(kept(x.shape, p, keys_B), x, 0.0), A_RI) * (1.0 / (1.0 - p))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, A_RI, keys_B = ctx.saved_tensors
        g, keep, right, left = grads[0] * (1.0 / (1.0 - ctx.p)), kept(x.shape, ctx.p, keys_B), None, None
        if ctx.needs_input_grad[0]:
            right = torch.where(keep, g @ A_RI, 0.0)
        if ctx.needs_input_grad[1]:
            left = g.reshape(-1, g.shape[-1]).T @ torch.where(keep, x, 0.0).reshape(-1, x.shape[-1])
        return right, left, None, None
