"""y + s B A d(x) as one step of autograd: the formula, its two derivatives, and what it does to y. What is rounded once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ingraft.adapt as adapt
from ingraft.adapt.dropout import dropout
from ingraft.adapt.products import plus_product
from ingraft.adapt.rows import Call, row_keys
from ingraft.methods.registry import make_config
from ingraft.testing.cases import randomise

KEYS = row_keys(Call(), 5, 3, None, torch.device("cpu"))


def made(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("frozen", ["", "A", "W"])
def test_the_formula_and_its_derivatives(p: float, frozen: str) -> None:
    torch.manual_seed(0)
    tensors = {"x": made(3, 4, 6), "W": made(5, 6), "A": made(2, 6), "B": made(5, 2)}
    for name in frozen:
        tensors[name].requires_grad_(False)

    def ours(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return plus_product(x, x @ W.T, A, B, 1.7, p, KEYS)

    x, W, A, B = tensors.values()
    dropped = dropout(x, p, KEYS) if p else x
    torch.testing.assert_close(ours(x, W, A, B), x @ W.T + 1.7 * (dropped @ A.T @ B.T))
    assert torch.autograd.gradcheck(ours, (x, W, A, B))
    if frozen != "A":
        assert torch.autograd.gradgradcheck(ours, (x, W, A, B))


def test_a_second_derivative_is_refused_where_the_input_was_not_kept() -> None:
    x, A, B = made(3, 6), torch.randn(2, 6, dtype=torch.float64), made(5, 2)
    y = plus_product(x, x.new_zeros(3, 5), A, B)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(y.sum(), [B], create_graph=True)


def test_y_takes_the_sum_itself_only_where_nothing_else_needs_it() -> None:
    torch.manual_seed(0)
    x, W, A, B, b = made(3, 4, 6), made(5, 6), made(2, 6), made(5, 2), made(5)
    own = x @ W.T
    assert plus_product(x, own, A, B).data_ptr() == own.data_ptr()
    leaf, view = made(3, 4, 5), torch.nn.functional.linear(x, W, b)
    assert view._is_view()
    for y in (leaf, view, (x @ W.T).transpose(0, 1).contiguous().transpose(0, 1)):
        before = y.detach().clone()
        result = plus_product(x, y, A, B)
        torch.testing.assert_close(y, before)
        torch.testing.assert_close(result, before + x @ A.T @ B.T)


def test_under_autocast_it_computes_in_the_dtype_of_autocast() -> None:
    x, A, B = torch.randn(3, 6, requires_grad=True), torch.randn(2, 6, requires_grad=True), torch.randn(5, 2)
    W = torch.randn(5, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = plus_product(x, torch.nn.functional.linear(x, W), A, B)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad is not None and x.grad.dtype == torch.float32
    assert A.grad is not None and A.grad.dtype == torch.float32
    torch.testing.assert_close(y.float(), x @ (W + B @ A).T, atol=0.2, rtol=0.05)


@pytest.mark.parametrize("options", [{"r": 8}, {"r": 8, "mini_r": 4, "init_weights": "mini"}])
def test_a_sum_of_shards_is_added_with_one_rounding(options: dict[str, Any]) -> None:
    """In bfloat16 the output is the base's plus the exact change, rounded; the change is not rounded by itself, the same way for every shard."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Sequential(nn.Linear(32, 64)).to(torch.bfloat16)
    x = torch.randint(-3, 4, (50, 32), generator=generator).to(torch.bfloat16)  # shards whose sums are exact
    with torch.no_grad():
        base = layer(x).float()
        adapt.attach(layer, make_config("miss", {**options, "target_modules": ["0"]}))
        randomise(layer, "default")
        D_RM = next(p for name, p in layer.named_parameters() if name.endswith("miss_block")).bfloat16().float()
        change = x.float().unflatten(-1, (-1, 8)).sum(-2) @ D_RM.repeat(1, 64 // D_RM.shape[1])
        wrong = layer(x) != (base + change).bfloat16()
    assert wrong.float().mean() < 0.01
