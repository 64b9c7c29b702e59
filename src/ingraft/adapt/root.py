"""What happens once per forward of the model, ahead of and behind its hosts.

The root's class is swapped like a host's. It moves dropout on by a step where nobody else does (a foreign trainer), sees that modules which
all sites of an adapter share are evaluated once instead of once a site, and, on the first forward after a change, checks that no adapter was
bypassed: frameworks have fused paths that never call a child (`nn.TransformerEncoderLayer`), and an adapter that silently does nothing is the
worst failure this package could have.

A stack of the model may be called from outside, past the root: `generate` runs the encoder of an encoder-decoder by itself, and a user may run
a model without its head. That is a forward too (`outermost`), of that stack alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.control import Control, host_state, part_of, require_control
from ingraft.adapt.joint import refresh
from ingraft.adapt.probe import Trial, find_rows, read_uncalled, trial
from ingraft.adapt.swap import Container, Forward, Mixin
from ingraft.errors import IngraftError
from ingraft.methods.contract import AttentionPart


class Root(Mixin):
    """The model that adapters were attached to."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return outermost(require_control(module), module, "", lambda: base(*args, **kwargs), args, kwargs)


class SequentialRoot(Container, Root):
    """A root that iterates over its children, what all sites of an adapter share among them."""

    around = Root.around


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Rows of the batch, repeated ones counted; 0 if no input tells. By name, one number for each entry is less sure to be a batch than more
    (a position in a cache, a time that all rows share)."""
    named = [value for value in kwargs.values() if isinstance(value, Tensor)]
    named.sort(key=lambda value: value.dim() < 2)
    inputs = [kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args, *named]
    return next((x.shape[0] for x in inputs if isinstance(x, Tensor) and x.dim() > 0), 0)


def _check_rows(model: nn.Module, control: Control, size: int) -> None:
    """Refuse a batch that cannot be the rows that were named. Hosts ask only where rows differ, and none of them where no adapter acts.

    Raises:
        IngraftError: see above.
    """
    rows = control.call.rows
    if rows is None or size % len(rows) == 0:
        return
    if any(getattr(module, "batch_first", True) is False for module in model.modules()):
        return  # dimension 0 may be time
    raise IngraftError(
        f"rows: {len(rows)} rows were named, but the batch that the model was called with has {size} entries in dimension 0, which is no "
        "multiple of it. Give one adapter per row of the batch, or use `activate` to let one adapter act on all of it."
    )


def _one_token(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether each row of the batch is one token, or one embedding."""
    named = (kwargs.get(name) for name in ("decoder_input_ids", "decoder_inputs_embeds", "input_ids", "inputs_embeds"))
    x = next((value for value in (*named, *args) if isinstance(value, Tensor)), None)
    return x is not None and x.dim() == 2 + x.is_floating_point() and x.shape[1] == 1


def _nothing() -> str | None:
    return None


def outermost(
    control: Control,
    stack: nn.Module,
    path: str,
    run: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: Callable[[], str | None] = _nothing,
) -> Any:
    """Run one forward of the model, or of a stack of it, with the control made ready for it; inside such a forward, simply run.

    Args:
        path: of the stack in the model; "" for the whole of it.
        given: the path of a stack whose work this forward was handed ready-made, so that it need not run; None if there is none.
    """
    if control.running:
        return run()
    size = batch_size(args, kwargs)
    _check_rows(stack, control, size)
    if control.call.rows is not None and control.call.size != size:
        control.call = replace(control.call, size=size)
    if len(control.call.groups) > 1 and path not in control.rows_found and not torch.compiler.is_compiling():
        find_rows(stack, path, control, size, args, kwargs)
    acting = {name for group in control.call.groups for name in group.names}
    again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1  # recomputed, in backward
    if not again and control.auto_step and any(control.adapters[name].dropout for name in acting):
        if torch.compiler.is_compiling():
            control.call.step.add_(1)  # in place: a graph can change a tensor, and cannot make a new call
        else:
            control.call = control.call.at_step(control.call.step + 1, None)
    control.running = True
    if not (again or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        control.quick = refresh(control, _one_token(args, kwargs))
    try:
        for name in acting:
            # Attentions ask for it inside of blocks, which may be run again in backward; it must not be made in there.
            if name in control.encoders and issubclass(control.adapters[name].method.part, AttentionPart):
                control.shared_of(name)
        if control.unchecked and not again and not torch.compiler.is_compiling():
            return _checked(stack, path, control, acting, run, given, trial(stack, control, args, kwargs))
        return run()
    finally:
        control.running, control.quick = False, None
        control.spans.clear()
        control.shared.clear()


def _checked(
    model: nn.Module,
    at: str,
    control: Control,
    acting: set[str],
    run: Callable[[], Any],
    given: Callable[[], str | None],
    again: Trial | None,
) -> Any:
    """Run, then refuse if a host with an acting part was passed over although the module around it ran.

    Args:
        model: it, or the stack at `at`.
        again: runs the base alone on the same inputs; None if that cannot be done.
    """
    above = at + "." if at else ""
    sites = (path for name in acting for path in control.adapters[name].sites)
    needless = ("", given())
    hosts = [path.removeprefix(above) for path in sites if path.startswith(above) and path not in needless]
    parents = {path.rpartition(".")[0] for path in hosts}
    ran: set[str] = set()

    def note(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ran.add(path)

        return hook

    for path in hosts:
        state = host_state(model.get_submodule(path))
        if state is not None:
            state.ran = False
    # What was called runs by definition; a hook on it would not fire any more.
    handles = [model.get_submodule(path).register_forward_pre_hook(note(path)) for path in parents if path]
    ran.add("")
    try:
        result = run()
    finally:
        for handle in handles:
            handle.remove()
    # A tied parameter that some other host computed with is in use, wherever else it is registered (T5's `shared`). Of offloaded ones
    # nobody can tell which are tied; they pass.
    used = {id(p) for path in hosts if _has_run(model, path) for name in acting for p in _tensors(model, path, name)}
    missed = [
        path
        for path in hosts
        if path.rpartition(".")[0] in ran
        and not _has_run(model, path)
        and not all(id(p) in used or p.is_meta for name in acting for p in _tensors(model, path, name))
    ]
    # What lies beside one of its own shape that ran may be called on some inputs only (Longformer's projections for global attention); then its
    # weights are not read on the others.
    beside = {(path.rpartition(".")[0], _shape(model, path)) for path in hosts if _has_run(model, path)}
    twins = {
        path: model.get_submodule(path) for path in missed if (path.rpartition(".")[0], _shape(model, path)) in beside
    }
    read = read_uncalled(model, twins, again) if twins and again is not None else []
    bypassed = [path for path in missed if path not in twins or path in read]
    if bypassed:
        raise IngraftError(
            f"The model ran without calling {', '.join(above + path for path in bypassed[:8])}{' and others' if len(bypassed) > 8 else ''}: the module around it uses a fused "
            "path or reads the weight directly, so the adapter there does nothing. Leave it out of target_modules, or switch the fused path off."
        )
    control.unchecked &= bool(at)  # a stack's word does not go for the whole
    return result


def _has_run(model: nn.Module, path: str) -> bool:
    state = host_state(model.get_submodule(path))
    return state is None or state.ran


def _shape(model: nn.Module, path: str) -> tuple[object, ...]:
    """What two layers of one kind and size have in common."""
    module = model.get_submodule(path)
    return type(module), *((name, p.shape) for name, p in module._parameters.items() if p is not None)


def _tensors(model: nn.Module, path: str, adapter: str) -> list[nn.Parameter]:
    part = part_of(model.get_submodule(path), adapter)
    return [] if part is None else list(part.parameters())
