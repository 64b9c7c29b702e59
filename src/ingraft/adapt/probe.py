"""Whether dimension 0 of what a layer sees goes with the rows of the batch: found out by changing a row.

`rows` gives the rows of one batch different adapters, and a layer can serve them only if it knows which of the entries it sees belong to which
row. In most models they are n times k entries, row by row. Sizes cannot tell: time may come first, tokens may be sorted by expert, a table of
positions may be as long as the batch. So before the first forward whose rows differ, the base runs twice without adapters, the second time with
its first row changed, and each host notes which entries changed. Where any but the first row's did, the rows are not where they would have to be,
and the host refuses to serve rows that differ. It costs two forwards of the base for each set of adapters, once.

Legend: B entries of dimension 0, n rows of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.control import Control, HostState
from ingraft.adapt.rows import Call
from ingraft.errors import IngraftError

Seen = dict[HostState | None, list[tuple[Tensor, bool]]]
"""What each host saw, call by call."""

_CLOSE = 1e-4
"""Relative: below it an entry counts as unchanged, whatever a product over other rows does to the last digits."""


def note(seen: Seen, state: HostState | None, x: object) -> None:
    """Keep two sums over each entry of what a host sees (None: of what the model returns), and whether it is numbers (rather than indices)."""
    if isinstance(x, Tensor) and x.dim() > 0:
        x_BN = x.detach().reshape(x.shape[0], -1).double()
        weight_N = torch.linspace(1.0, 2.0, x_BN.shape[1], dtype=torch.float64, device=x.device)
        sums_B2 = torch.stack([x_BN @ weight_N, x_BN.abs().sum(1)], 1)
        seen.setdefault(state, []).append((sums_B2, x.is_floating_point()))


def find_rows(
    stack: nn.Module, path: str, control: Control, size: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Let every host in a model, or a stack of it, know whether the entries it sees go with the rows of this batch.

    Raises:
        IngraftError: the output does not: dimension 0 of the input is something else.
    """
    rows = control.call.rows
    if rows is None or not size or size % len(rows):
        return
    count = size // len(rows)
    plain: Seen = {}
    changed: Seen = {}
    with _aside(stack, control):
        for seen, first in ((plain, 0), (changed, count)):
            control.watch = seen
            result = stack.forward(*(_copy(value, first, size) for value in args), **_copies(kwargs, first, size))
            note(seen, None, _first_tensor(result))
    for state, before in plain.items():
        after = changed.get(state, [])
        by_row = len(before) == len(after) and all(
            _goes_with_rows(one, other, numbers, len(rows))
            for (one, numbers), (other, _) in zip(before, after, strict=True)
        )
        if state is not None:
            state.by_row = by_row
        elif not by_row and not all(
            torch.equal(one, other) for (one, _), (other, _) in zip(before, after, strict=True)
        ):
            raise IngraftError(
                "rows: a change in the first row of this batch changes the model's output elsewhere, so dimension 0 of its input does not go "
                "with rows (time may come first). Put the batch first, or use `activate` to let one adapter act on all of it."
            )
    control.rows_found.add(path)


def _goes_with_rows(one: Tensor, other: Tensor, numbers: bool, n: int) -> bool:
    """Whether entries changed as those of rows would. Indices that did not change (positions) may be a row's all the same; numbers cannot."""
    if one.shape != other.shape:
        return False
    moved_B = ((one - other).abs() > _CLOSE * (one.abs() + other.abs()) + 1e-12).any(1)
    if not bool(moved_B.any()):
        return not numbers
    return len(moved_B) % n == 0 and not bool(moved_B[len(moved_B) // n :].any())


@contextmanager
def _aside(stack: nn.Module, control: Control) -> Iterator[None]:
    """Inside the block the base runs alone, in evaluation mode, and leaves nothing behind."""
    training = [module for module in stack.modules() if module.training]
    before = control.call, control.packing
    control.call, control.packing, control.running = Call(step=control.call.step), False, True
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        control.watch, control.running = None, False
        control.call, control.packing = before
        for module in training:
            module.training = True


def _copies(named: Mapping[str, Any], first: int, size: int) -> dict[str, Any]:
    """Inputs by name. Masks, positions, types and labels say nothing that a row must see changed, and not every number is allowed in them."""
    kept = ("mask", "position", "type", "label")
    return {key: _copy(value, 0 if any(word in key for word in kept) else first, size) for key, value in named.items()}


def _copy(value: Any, first: int, size: int) -> Any:
    """A value with its first entries changed, if it is a tensor of the batch, or holds some; caches are copied, because a forward adds to them."""
    if isinstance(value, Mapping):
        named: Mapping[str, Any] = value
        return type(value)(**_copies(named, first, size))
    if not isinstance(value, Tensor):
        return copy.deepcopy(value) if hasattr(value, "get_seq_length") else value
    if not first or value.dim() < 1 or value.shape[0] != size or value.dtype == torch.bool:
        return value
    value = value.clone()
    if value.is_floating_point():
        value[:first] = value[:first] * 0.5 + torch.rand_like(value[:first])
    else:
        value[:first] = (value[:first] - 1).abs()
    return value


def _first_tensor(result: Any) -> object:
    """The first tensor of a model's output."""
    if isinstance(result, Tensor):
        return result
    values = result.values() if isinstance(result, Mapping) else result if isinstance(result, tuple | list) else ()
    return next((value for value in values if isinstance(value, Tensor)), None)
