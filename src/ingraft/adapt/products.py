"""y + s B A d(x), the change that a low-rank adapter makes to a layer's output, as one step of autograd.

Written out with torch's own operations it keeps, beside x, the casts of A and B, A d(x) before and after its scale, and makes a tensor of the
output's size to be added to y. Here backward is left x (which other sites keep as well), s A d(x), and A and B as they are trained; the product
with B is accumulated into y itself. A frozen A asks for no x.

In place is safe because y comes fresh from the base's product, whose own backward does not look at it. Where y is a view (a linear layer with
a bias returns one), autograd would have to copy its gradient; there the sum is a new tensor.

Legend: B rows, I in, O out, R rank, N rows times positions.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from ingraft.adapt.dropout import kept


def plus_product(
    x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float = 1.0, p: float = 0.0, keys_B: Tensor | None = None
) -> Tensor:
    """y + scale B A d(x). y may be changed in place.

    Args:
        x: (B, ..., I). y: (B, ..., O).
        A_RI, B_OR: in their own dtype; used in x's, or autocast's.
        p, keys_B: dropout of x's entries, as `dropout.dropout`.
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    return cast(Tensor, _PlusProduct.apply(x, y, A_RI, B_OR, scale, p, keys_B if p else None, dtype))


def _in_place(y: Tensor, dtype: torch.dtype) -> bool:
    """Whether y may take the sum itself."""
    own = y.grad_fn is not None or not y.requires_grad
    return own and y.dtype == dtype and y.is_contiguous() and not y._is_view()


def _flat(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


class _PlusProduct(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        A_RI: Tensor,
        B_OR: Tensor,
        scale: float,
        p: float,
        keys_B: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.factor, ctx.p, ctx.dtype, ctx.shape, ctx.x_dtype = scale, p, dtype, x.shape, x.dtype
        dropped = x
        if keys_B is not None:
            ctx.factor = scale / (1.0 - p)
            dropped = torch.where(kept(x.shape, p, keys_B), x, 0.0)
        u_NR = F.linear(_flat(dropped, dtype), A_RI.to(dtype)) * ctx.factor
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, u_NR, A_RI, B_OR, keys_B)
        B_RO = B_OR.to(dtype).T
        if _in_place(y, dtype):
            ctx.mark_dirty(y)
            y.view(-1, y.shape[-1]).addmm_(u_NR, B_RO)
            return y
        return y + (u_NR @ B_RO).view(y.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, u_NR, A_RI, B_OR, keys_B = ctx.saved_tensors
        g_NO = _flat(grads[0], ctx.dtype)
        wants_x, wants_y, wants_A, wants_B = ctx.needs_input_grad[:4]
        grad_x = grad_A = grad_B = None
        keep = None if keys_B is None else kept(ctx.shape, ctx.p, keys_B)
        dropped = x if keep is None or x is None else torch.where(keep, x, 0.0)
        if torch.is_grad_enabled():  # for a second derivative: what forward made has lost its history
            if dropped is None:
                raise RuntimeError(
                    "A low-rank adapter whose A is frozen keeps no input, so it has no second derivative."
                )
            u_NR = F.linear(_flat(dropped, ctx.dtype), A_RI.to(ctx.dtype)) * ctx.factor
        if wants_B:
            grad_B = (u_NR.T @ g_NO).T.to(B_OR.dtype)
        if wants_x or wants_A:
            gu_NR = (g_NO @ B_OR.to(ctx.dtype)) * ctx.factor
            if wants_A:
                assert dropped is not None
                grad_A = (gu_NR.T @ _flat(dropped, ctx.dtype)).to(A_RI.dtype)
            if wants_x:
                grad_x = (gu_NR @ A_RI.to(ctx.dtype)).view(ctx.shape)
                grad_x = (grad_x if keep is None else torch.where(keep, grad_x, 0.0)).to(ctx.x_dtype)
        return grad_x, grads[0] if wants_y else None, grad_A, grad_B, None, None, None, None
