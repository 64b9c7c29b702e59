"""One forward of a host: the base's own call, and the parts that act before and after it.

A host's forward does three things around *one* call of the base:

1. `before` of the acting parts, 2. the module's own forward, 3. `after` of the acting parts, then the bias if a part needed it left out.

That is the *shortcut*, used where every acting part is a `ShortcutPart` and the module's forward is one its `Kind` knows. Elsewhere the
*general path* computes W' by the definition and shadows it under the parameter's name while the module's own, unmodified forward runs
(`weights.shadowed`). It is exact for any layer, and costs one base call for each group of rows and a weight-sized tensor, which is
recomputed in backward rather than kept.

Several parts on one host compose in one way everywhere (shortcut, general path, merge): first all that `add`, each on the original W, so
`W + sum(weight_i(W) - W)`; then those that `chain`, in activation order. `compose.py` is that sentence in code.

The rows of a mixed batch are sliced group by group behind the one base call, and put together in the user's order (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ingraft.adapt.compose import composed, own_parameters
from ingraft.adapt.control import HOST_ATTRIBUTE, HostState, host_state, part_of
from ingraft.adapt.flat import in_rows
from ingraft.adapt.joint import plan_of, serve
from ingraft.adapt.offload import present
from ingraft.adapt.probe import note
from ingraft.adapt.rows import Call, entries_of, spread, unflattened
from ingraft.adapt.site import LayerSite
from ingraft.adapt.stacked import Read, Stack, reads, sliced
from ingraft.adapt.swap import Container, Forward, Mixin
from ingraft.adapt.weights import Kind, bias_of, shadowed
from ingraft.errors import IngraftError
from ingraft.methods.contract import OutputPart, ParameterPart, Part, ShortcutPart, WeightPart


class Host(Mixin):
    """A module in which parts act on weights or outputs."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return act(module, base, args, kwargs)


class SequentialHost(Container, Host):
    """A host that iterates over its children."""

    around = Host.around


# ---------------------------------------------------------------------------------------------------------------- the forward


def act(host: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One forward of a host. Steps and costs in the module docstring."""
    state: HostState = host.__dict__[HOST_ATTRIBUTE]
    call = state.current()  # which keeps it for a recomputation, whatever serves it now
    if call is state.control.quick and not torch.compiler.is_compiling() and not torch.is_grad_enabled():
        x = _first(args, kwargs)
        plan = state.control.joined.plans.get(state.path)
        if plan is None or plan.dtype is not getattr(x, "dtype", None):
            plan = plan_of(host, state, call, [acting_parts(host, state, group.names) for group in call.groups], x)
        if plan.possible and (not plan.on_weight or (len(args) == 1 and not kwargs)):
            state.ran = True
            if state.opens:
                _open_spans(state, call, args, kwargs)
            span = _span_input(state, args, kwargs) if plan.on_output else x
            return serve(plan, host, state, call, base, args, kwargs, span)
    if call.flat is not None and call.flat.by_row:
        return in_rows(lambda call, *one: _act(host, state, call, *one), state, call, base, args, kwargs)
    return _act(host, state, call, base, args, kwargs)


def _act(
    host: nn.Module, state: HostState, call: Call, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    state.ran = True
    for name in reads(host):
        if (inner := host_state(host.get_submodule(name))) is not None:
            inner.ran = True
    if state.control.watch is not None:
        note(state.control.watch, state, _first(args, kwargs))
    if state.opens:
        _open_spans(state, call, args, kwargs)
    work = [(acting_parts(host, state, group.names), group.rows) for group in call.groups]
    if not any(parts for parts, _ in work):
        return base(*args, **kwargs)
    with present(*_parts_of(work)):
        if len(work) == 1:
            return _whole(host, state, call, work[0][0], base, args, kwargs)
        assert call.rows is not None
        return _mixed(host, state, call, work, len(call.rows), base, args, kwargs)


def acting_parts(host: nn.Module, state: HostState, names: Sequence[str]) -> list[Any]:
    """The parts these adapters have here, in activation order, less those that are merged into the weight already; and those of layers
    whose weights this module reads."""
    merged = state.control.merged
    parts = [part_of(host, name) for name in names if name not in merged]
    found: list[Any] = [part for part in parts if isinstance(part, WeightPart | ParameterPart | OutputPart)]
    for name in reads(host):
        layer = host.get_submodule(name)
        own = host_state(layer)
        inner = acting_parts(layer, own, names) if own is not None else []
        if inner:
            found.append(Read(name, layer, inner))
    return found


def _parts_of(work: Sequence[tuple[list[Any], object]]) -> Iterator[nn.Module]:
    """The modules that hold the tensors of these parts."""
    for parts, _ in work:
        for part in parts:
            if isinstance(part, Read):
                yield from part.parts
            elif isinstance(part, Stack):
                yield from part.modules()
            else:
                yield part


def _whole(
    host: nn.Module,
    state: HostState,
    call: Call,
    parts: list[Any],
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """All rows carry the same parts."""
    on_weight, on_output = _by_kind(parts)
    if not on_weight:
        y = base(*args, **kwargs)
    elif (shortcuts := _shortcuts(state, on_weight)) and len(args) == 1 and not kwargs:
        y = _shortcut(host, state, call, shortcuts, base, args[0])
    else:
        y = _general(host, state.kind, on_weight, base, args, kwargs)
    if not on_output:
        return y
    x = _span_input(state, args, kwargs)
    first = y[0] if isinstance(y, tuple) else y
    apart = unflattened(first, x)
    changed = _outputs(host, state, call, on_output, x, apart, None, apart.shape[0], base, args, kwargs)
    first = changed if apart is first else changed.flatten(0, 1)
    return (first, *y[1:]) if isinstance(y, tuple) else first


def _mixed(
    host: nn.Module,
    state: HostState,
    call: Call,
    work: list[tuple[list[Any], tuple[int, ...] | None]],
    n: int,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Rows differ: one base call over all of them where shortcuts allow, a piece of its output for each group."""
    if not state.carries_rows:
        raise IngraftError(
            f"rows: {state.path} is computed once for the whole batch (its input has no row dimension), so its adapter cannot differ from row "
            "to row. Leave this module out of target_modules, or run the rows in separate batches."
        )
    split = [(*_by_kind(parts), rows) for parts, rows in work]
    x = _first(args, kwargs)
    if not isinstance(x, Tensor):
        raise IngraftError(
            f"rows: {state.path} is called without an input that could show its rows, so its adapter cannot differ from row to row. Leave this "
            "module out of target_modules, or run the rows in separate batches."
        )
    if state.by_row is False and not (x.shape[0] == 1 and not x.is_floating_point()):
        raise IngraftError(
            f"rows: what {state.path} sees does not go with the rows of the batch (a change in one row changes other entries of its input, or "
            "none), so its adapter cannot differ from row to row. Leave this module out of target_modules, or run the rows in separate batches."
        )
    fast = (
        all(not on_weight or _shortcuts(state, on_weight) for on_weight, _, _ in split)
        and len(args) == 1
        and not kwargs
    )
    touches_weight = any(on_weight for on_weight, _, _ in split)
    others = [*args, *kwargs.values()][1:]
    several = any(isinstance(other, Tensor | tuple | list | dict) for other in others)
    if touches_weight and several and state.kind is not None:
        raise IngraftError(
            f"rows: {state.path} takes more than one input; its weight cannot differ from row to row. Run the rows separately."
        )
    if not (touches_weight and several) and (touches_weight or x.shape[0] == 1):
        x = spread(x, call)
        args, kwargs = _with_first(x, args, kwargs)
    size = x.shape[0]
    pieces: list[Tensor] = []
    order: list[Tensor] = []
    returned = x
    rest: tuple[Any, ...] | None = None
    further: list[tuple[Any, ...]] = []
    y_all: Tensor | None = None
    if not (touches_weight and not fast):
        y_all, rest, bare = _base_once(host, state, call, split, x, n, base, args, kwargs)
    else:
        bare = False
    for group, (on_weight, on_output, rows) in zip(call.groups, split, strict=True):
        assert rows is not None
        entries = entries_of(rows, size, n, state.path).to(x.device)
        x_rows = x.index_select(0, entries)
        if y_all is None:
            if several:
                some_args, some_kwargs = sliced(host, args, kwargs, entries, size, state.path)
            else:
                some_args, some_kwargs = _with_first(x_rows, args, kwargs)
            with _alone(state, call.of_group(group)):
                y = (
                    _general(host, state.kind, on_weight, base, some_args, some_kwargs)
                    if on_weight
                    else base(*some_args, **some_kwargs)
                )
            if isinstance(y, tuple):
                further.append(y[1:])
                y = y[0]
            returned, y = y, unflattened(y, x_rows)
        else:
            returned, y = y_all, unflattened(y_all, x).index_select(0, entries)
            if on_weight:
                y = _after(host, state, call, _shortcuts(state, on_weight), x_rows, y, entries, size, base, bare)
            elif bare and (b := bias_of(host)) is not None and state.kind is not None:
                y = y + state.kind.along_out(host, b)
        if on_output:
            span = _span_input(state, args, kwargs, keep=True).index_select(0, entries)
            y = _outputs(host, state, call, on_output, span, y, entries, size, base, args, kwargs)
        pieces.append(y)
        order.append(entries)
    state.control.spans.pop(state.path, None)
    inverse = torch.argsort(torch.cat(order))
    y = torch.cat(pieces).index_select(0, inverse)
    y = y.flatten(0, 1) if returned.dim() < y.dim() else y
    if further:
        rest = tuple(
            torch.cat(each).index_select(0, inverse) if isinstance(each[0], Tensor) else each[0]
            for each in zip(*further, strict=True)
        )
    return y if rest is None else (y, *rest)


@contextmanager
def _alone(state: HostState, call: Call) -> Iterator[None]:
    """Let hosts inside this module see the rows they are given as a whole batch."""
    before, state.control.call = state.control.call, call
    try:
        yield
    finally:
        state.control.call = before


def _base_once(
    host: nn.Module,
    state: HostState,
    call: Call,
    split: Any,
    x: Tensor,
    n: int,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Tensor, tuple[Any, ...] | None, bool]:
    """The one base call of a mixed batch, each group's rows seen through its own `before`. Returns y, other outputs (None: y is no tuple), bias left out."""
    bare = False
    changed: list[tuple[Tensor, Tensor]] = []
    for on_weight, _, rows in split:
        shortcuts = _shortcuts(state, on_weight)
        bare |= not all(part.additive for part in shortcuts)
        if any(_has_before(part) for part in shortcuts):
            entries = entries_of(rows, x.shape[0], n, state.path).to(x.device)
            changed.append(
                (
                    entries,
                    _befores(host, state, call, shortcuts, x.index_select(0, entries), entries, x.shape[0], base)[-1],
                )
            )
    for entries, x_rows in changed:
        x = x.index_copy(0, entries, x_rows.to(x.dtype))
    if bare and state.kind is not None:
        return state.kind.bare(host, base, x), None, True
    y = base(x, *args[1:], **kwargs) if args else base(**kwargs)
    return (y[0], tuple(y[1:]), False) if isinstance(y, tuple) else (y, None, False)


# ---------------------------------------------------------------------------------------------------------------- parts on weights


def _by_kind(parts: Sequence[Any]) -> tuple[list[Any], list[OutputPart]]:
    on_weight = [part for part in parts if isinstance(part, WeightPart | ParameterPart | Read)]
    return on_weight, [part for part in parts if isinstance(part, OutputPart)]


def _has_before(part: ShortcutPart) -> bool:
    return type(part).before is not ShortcutPart.before


def _shortcuts(state: HostState, parts: Sequence[Part]) -> list[ShortcutPart]:
    """The parts, if all of them may go round the weight here; else an empty list."""
    shortcuts = [part for part in parts if isinstance(part, ShortcutPart)]
    if not state.known_forward or state.kind is None or len(shortcuts) != len(parts):
        return []
    if not all(part.holds(state.kind.name) for part in shortcuts):
        return []
    adds = [part for part in shortcuts if part.composition == "add"]
    if len(adds) > 1 and any(_has_before(part) for part in adds):
        return []  # each would want its own input to the one base call
    return shortcuts


def _befores(
    host: nn.Module,
    state: HostState,
    call: Call,
    parts: list[ShortcutPart],
    x: Tensor,
    entries: Tensor | None,
    size: int,
    base: Forward,
) -> list[Tensor]:
    """The input as each part hands it on, outermost first: the last chained part sees x, the base sees the last entry."""
    seen = [x]
    for part in reversed(_ordered(parts)):
        seen.append(
            part.before(seen[-1], LayerSite(host, state, call, [], part, entries, size, base))
            if _has_before(part)
            else seen[-1]
        )
    return seen


def _ordered(parts: Sequence[ShortcutPart]) -> list[ShortcutPart]:
    return [part for part in parts if part.composition == "add"] + [
        part for part in parts if part.composition == "chain"
    ]


def _shortcut(
    host: nn.Module, state: HostState, call: Call, parts: list[ShortcutPart], base: Forward, x: Tensor
) -> Tensor:
    """before, one base product, after, bias."""
    assert state.kind is not None
    x_base = _befores(host, state, call, parts, x, None, x.shape[0], base)[-1]
    bare = not all(part.additive for part in parts)
    y = state.kind.bare(host, base, x_base) if bare else base(x_base)
    return _after(host, state, call, parts, x, y, None, x.shape[0], base, bare)


def _after(
    host: nn.Module,
    state: HostState,
    call: Call,
    parts: list[ShortcutPart],
    x: Tensor,
    y: Tensor,
    entries: Tensor | None,
    size: int,
    base: Forward,
    bare: bool,
) -> Tensor:
    """What the parts make of the base's product. `bare`: y comes without its bias, which is added here, as the parts see it."""
    assert state.kind is not None
    ordered = _ordered(parts)
    seen = _befores(host, state, call, parts, x, entries, size, base)
    inputs = dict(zip(map(id, reversed(ordered)), seen[1:], strict=True))
    adds = [part for part in ordered if part.composition == "add"]
    b = bias_of(host) if bare else None

    def site(part: Part, below: Sequence[Part]) -> LayerSite:
        return LayerSite(host, state, call, below, part, entries, size, base)

    if len(adds) == 1:
        y = adds[0].after(inputs[id(adds[0])], y, site(adds[0], []))
    else:
        y_base = y
        for part in (part for part in adds if not part.additive):
            y = y + (part.after(inputs[id(part)], y_base.clone(), site(part, [])) - y_base)
        for part in (part for part in adds if part.additive):  # which change y alone, in place if they can
            y = part.after(inputs[id(part)], y, site(part, []))
    if b is not None:
        b_base = b
        for part in adds:
            changed = part.bias(b_base)
            b = b if changed is None else b + (changed - b_base)
    below: list[Part] = list(adds)
    for part in ordered[len(adds) :]:
        y = part.after(inputs[id(part)], y, site(part, below))
        b = part.bias(b) if bare else b
        below.append(part)
    return y if b is None else y + state.kind.along_out(host, b.to(y.dtype))


def _general(
    host: nn.Module,
    kind: Kind | None,
    parts: Sequence[WeightPart | ParameterPart | Read],
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """The definition, through the shadow. W' is recomputed in backward unless it is a mere copy of a parameter."""

    # Each input once: an attention asks whether query, key and value are the same object, and recomputation would make three of it.
    once = {id(arg): arg for arg in args}
    places = [list(once).index(id(arg)) for arg in args]

    def run(*inputs: Any) -> Any:
        values = composed(kind, parts, own_parameters(host))
        again = tuple(inputs[place] for place in places)
        if kind is not None:
            return kind.run(host, base, values, again, kwargs)
        with shadowed(host, values):
            return base(*again, **kwargs)

    cheap = all(not isinstance(part, WeightPart) and part.copies for part in parts)
    if cheap or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(*once.values())
    return checkpoint(run, *once.values(), use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------------------------------------------- parts on outputs


def _outputs(
    host: nn.Module,
    state: HostState,
    call: Call,
    parts: Sequence[OutputPart],
    x: Tensor,
    y: Tensor,
    entries: Tensor | None,
    size: int,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    def rerun(x_again: Tensor) -> Tensor:
        nonlocal x
        x = x_again  # a further part acts on what this one made of the input
        again = base(x_again, *args[1:], **kwargs)
        return again[0] if isinstance(again, tuple) else again

    for part in parts:
        y = part.after(x, y, LayerSite(host, state, call, [], part, entries, size, rerun))
    return y


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The module's first input, however it was passed; None if it takes none."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _with_first(x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same inputs with another first one."""
    return ((x, *args[1:]), kwargs) if args else (args, {**kwargs, next(iter(kwargs)): x})


def _open_spans(state: HostState, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remember this input for the parts at the far end of the span, if one of them acts in this call."""
    acting = {name for group in call.groups for name in group.names}
    for exit_path, names in state.opens.items():
        if acting & names:
            state.control.spans[exit_path] = _first(args, kwargs)


def _span_input(state: HostState, args: tuple[Any, ...], kwargs: dict[str, Any], *, keep: bool = False) -> Tensor:
    """The input an output part acts on: its span's, or the module's own."""
    spans = state.control.spans
    if state.path in spans:
        return spans[state.path] if keep else spans.pop(state.path)
    return _first(args, kwargs)
