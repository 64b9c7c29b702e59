"""Whether dimension 0 of what a layer sees goes with the rows of the batch: found out by changing a row.

`rows` gives the rows of one batch different adapters, and a layer can serve them only if it knows which of the entries it sees belong to which
row. In most models they are n times k entries, row by row. Sizes cannot tell: time may come first, tokens may be sorted by expert, a table of
positions may be as long as the batch. So before the first forward whose rows differ, the base runs twice without adapters, the second time with
its first row changed, and each host notes which entries changed. Where any but the first row's did, the rows are not where they would have to be,
and the host refuses to serve rows that differ. It costs two forwards of the base for each set of adapters, once.

The other question put to the base alone is whether it reads the weights of a layer that it did not call (`read_uncalled`): a forward in which every
operation is asked what it was given. Nothing is changed for it, so nothing has to be put back, and no value could send the model another way.

Legend: B entries of dimension 0, n rows of the batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from ingraft.adapt.control import CHILD, Control, HostState
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
    before = control.call, control.packing, control.running, control.replaying
    # As if run again: a backward that recomputes must not take this call for the one it belongs to.
    control.call, control.packing, control.running, control.replaying = Call(step=control.call.step), False, True, True
    for module in training:
        module.training = False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        control.watch = None
        control.call, control.packing, control.running, control.replaying = before
        for module in training:
            module.training = True


def _copies(named: Mapping[str, Any], first: int, size: int) -> dict[str, Any]:
    """Inputs by name. Masks, positions, types and labels say nothing that a row must see changed, and not every number is allowed in them."""
    kept = ("mask", "position", "type", "label")
    return {key: _copy(value, 0 if any(word in key for word in kept) else first, size) for key, value in named.items()}


def _copy(value: Any, first: int, size: int) -> Any:
    """A copy of a value, with its first entries changed if it is a tensor of the batch, or holds some. Tensors and caches are copied in any case,
    because a forward may write into them."""
    if isinstance(value, Mapping):
        named: Mapping[str, Any] = value
        return type(value)(**_copies(named, first, size))
    if not isinstance(value, Tensor):
        return copy.deepcopy(value) if _is_cache(value) else value
    value = value.detach().clone().requires_grad_(value.requires_grad)  # which reentrant checkpointing asks for
    if not first or value.dim() < 1 or value.shape[0] != size or value.dtype == torch.bool:
        return value
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


# ---------------------------------------------------------------------------------------------------- weights read, layers not called

Trial = Callable[[], object]


def trial(stack: nn.Module, control: Control, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trial | None:
    """How to run the base alone on these inputs after a forward has been over them, or None if that cannot be done without a trace: something
    else than tensors and plain values would change once more (a cache that holds something), or other processes would have to run along."""
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return None
    values = tree_iter((args, kwargs), is_leaf=_is_cache)
    if not all(
        int(value.get_seq_length()) == 0
        if _is_cache(value)
        else isinstance(value, Tensor | bool | int | float | str | None)
        for value in values
    ):
        return None
    inputs = tuple(_copy(value, 0, 0) for value in args), _copies(kwargs, 0, 0)

    def run() -> object:
        with _aside(stack, control):
            return stack.forward(*inputs[0], **inputs[1])

    return run


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def read_uncalled(stack: nn.Module, layers: Mapping[str, nn.Module], again: Trial) -> list[str]:
    """Those of these layers, none of which was called, whose weights a forward reads all the same.

    Not seen: what lies elsewhere (offloaded), and what a called module owns as well (tied).
    """
    inside = {path: _own_modules(layer) for path, layer in layers.items()}
    known = {id(module) for modules in inside.values() for module in modules}
    elsewhere = {id(value) for module in stack.modules() if id(module) not in known for value in _tensors(module)}
    watch = Watch(
        {
            path: [value for module in modules for value in _tensors(module) if id(value) not in elsewhere]
            for path, modules in inside.items()
        }
    )
    with watch:
        again()
    return [path for path in layers if path in watch.seen]


class Watch(TorchDispatchMode):
    """Notes whose tensors operations are given, views and detached ones too. Those that ask only for a shape do not count."""

    supports_higher_order_operators = True

    def __init__(self, tensors: Mapping[str, Sequence[Tensor]]) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self._names = {id(value): path for path, values in tensors.items() for value in values}
        self._spans = [
            (at, at + value.nbytes, path)
            for path, values in tensors.items()
            for value in values
            if (at := _address(value)) is not None
        ]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__ if isinstance(func, torch._ops.OpOverload) else ""
        if not (name.startswith("new_") or name.endswith("_like")):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor):
                    self._note(value)
        return func(*args, **kwargs)

    def _note(self, value: Tensor) -> None:
        if (path := self._names.get(id(value))) is not None:
            self.seen.add(path)
        elif (at := _address(value)) is not None:
            self.seen |= {path for low, high, path in self._spans if low <= at < high}


def _address(value: Tensor) -> int | None:
    """Where a tensor's numbers lie, None where no storage of its own holds any."""
    return (value.data_ptr() or None) if torch._C._has_storage(value) and not value.is_meta else None


def _own_modules(module: nn.Module) -> list[nn.Module]:
    """A module and those below it, adapters' parts left out."""
    found = [module]
    for name, child in module._modules.items():
        if child is not None and not name.startswith(CHILD):
            found += _own_modules(child)
    return found


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for value in (*module._parameters.values(), *module._buffers.values()):
        if value is not None:
            yield value
