"""The verbs: attach, activate, disabled, rows, trainable, detach, status.

Each verb works out everything that could be wrong before its first change, so that a refusal leaves the model exactly as it was. `merge`
and `unmerge` live in `merging.py`, `save` and `load` in `files.py`.
"""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.building import TOKENS_ROLE, WHOLE_ROLE, base_parameters, make_parts, token_rows
from ingraft.adapt.context import Context, told
from ingraft.adapt.control import (
    ATTRIBUTE,
    HOST_ATTRIBUTE,
    Adapter,
    Control,
    HostState,
    child_name,
    control_of,
    holds_parts,
    host_state,
    part_of,
    require_control,
    shared_name,
    shared_of,
)
from ingraft.adapt.host import Host, SequentialHost
from ingraft.adapt.roles import blocks, key_value_layers
from ingraft.adapt.rows import Call, rows_of
from ingraft.adapt.select import select
from ingraft.adapt.stacked import reads
from ingraft.adapt.swap import is_swapped, original_class, swap, unswap
from ingraft.adapt.walk import walked
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import AttentionPart, GatedPart, InputPart, MethodConfig, Part

M = TypeVar("M", bound=nn.Module)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
HOSTS = (SequentialHost, Host)


def attach(
    model: M,
    config: MethodConfig,
    name: str = "default",
    *,
    seed: int | None = None,
    strict: bool = True,
    train: bool = True,
    fill: Callable[[Adapter, dict[str, Part], nn.Module | None], None] | None = None,
) -> M:
    """Graft an adapter onto a model, in place. It alone acts and is trainable afterwards; the base is frozen.

    Adapters that are merged at this moment are part of the base for the new one: it is made for, trained on and saved with the base as it is
    now, and `unmerge` has to wait until it is detached.

    Args:
        model: any module; a transformers model stays the class it is.
        config: a method's config, such as `LoraConfig(r=8)`.
        name: letters, digits, `.`, `_`, `-`; not one that is attached already.
        seed: of the initial values and of dropout; drawn from torch's generator if None, so `torch.manual_seed` governs.
        train: let it, and no other, be trainable; False leaves the trainability of others as it is, and this one frozen.
        strict: refuse a pattern that matches nothing while others match; False warns.
        fill: called with the adapter, its parts by path and its shared module before the model is changed, to give them values of its own
            (a file's, when loading); what it raises stops the attaching.

    Returns:
        The same object.

    Raises:
        IngraftError: every reason why the adapter cannot be attached. The model is then unchanged.
    """
    problems: list[str] = []
    # What a type checker would have said, for who has none.
    if not isinstance(model, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        problems.append(f"attach: the model is a {type(model).__name__}, no torch module.")
    if not isinstance(config, MethodConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
        problems.append(
            f"attach: a method's config is wanted, such as LoraConfig(r=8), got {config!r}; "
            "ingraft.methods.registry.make_config makes one from a name and a mapping."
        )
    if problems:
        raise IngraftError(*problems)
    models.check_sizes(model)
    control = control_of(model) or Control()
    check_adapter_name(name)
    if name in control.adapters:
        raise IngraftError(f"An adapter named {name!r} is attached already; detach it first or choose another name.")
    method = registry.load(config.method)
    sites, whole, remarks = select(model, config, method, strict=strict)
    models.check_method(model, method)
    tokens, _ = token_rows(model, config, (*sites, *whole))
    seed = seed_of(seed, "attach")
    adapter = Adapter(
        name=name,
        config=config,
        method=method,
        sites={**sites, **dict.fromkeys(whole, WHOLE_ROLE), **dict.fromkeys(tokens, TOKENS_ROLE)},
        saved_whole=whole,
        tokens=tokens,
        seed=seed,
        ground=control.merged,
        dropout=any(key.endswith("dropout") and value for key, value in config.options().items()),
    )
    if method.over is not None:
        adapter.dropout |= any(control.adapters[other].dropout for other in method.over(config))
    with _temporarily(
        control, lambda call: replace(call, active=(), rows=None)
    ):  # a part may look at what the base makes of tokens
        parts, shared = make_parts(model, adapter, finished=fill is not None)
    lengths = (
        p.length for p in parts.values() if isinstance(p, AttentionPart | InputPart) and not isinstance(p, GatedPart)
    )
    adapter.virtual = next(lengths, 0)
    adapter.behind = next((part.behind for part in parts.values() if isinstance(part, InputPart)), 0)
    if fill is not None:
        fill(adapter, parts, shared)
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    for part in (*parts.values(), *((shared,) if shared is not None else ())):
        part.requires_grad_(train)
    put(model, control, adapter, parts, shared, train)
    return model


def check_adapter_name(name: object) -> None:
    """Refuse what cannot be an adapter's name.

    Raises:
        IngraftError: it cannot.
    """
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise IngraftError(
            f"{name!r} is no name for an adapter: up to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )


def put(
    model: nn.Module,
    control: Control,
    adapter: Adapter,
    parts: Mapping[str, Part],
    shared: nn.Module | None,
    train: bool,
) -> None:
    """Put a finished adapter into the model and let it alone act. Nothing in here can fail.

    Args:
        train: no other is trainable from now on. Whether this one is says `requires_grad` of its tensors.
    """
    modules, name = walked(model).modules, adapter.name
    if not control.adapters:
        control.required_grad = {path: parameter.requires_grad for path, parameter in base_parameters(model).items()}
        for module in modules.values():
            if (kind := kind_of(module)) is not None:
                kind.settle(module)
        model.__dict__[ATTRIBUTE] = control
        swap(model, models.root_mixin(model))
    for module in modules.values():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.requires_grad:
                parameter.requires_grad_(False)
    for other in control.adapters if train else ():
        for part in _trained(model, other):
            part.requires_grad_(False)
    control.adapters[name] = adapter
    child = child_name(name)
    for path, part in parts.items():
        _host(model, control, path, adapter.sites[path], modules).add_module(child, part)
    if shared is not None:
        model.add_module(shared_name(name), shared)
    _assign_roles(model, control, adapter, modules)
    models.settle(model)
    _act(control, replace(control.call, active=(name,), rows=None))


def seed_of(seed: int | None, verb: str) -> int:
    """The seed as a number, drawn from torch's generator if None.

    Raises:
        IngraftError: it is no whole number.
    """
    if seed is None:
        return int(torch.randint(2**31, ()).item())
    if isinstance(seed, bool) or not hasattr(seed, "__index__"):
        raise IngraftError(f"{verb}: seed must be a whole number, or None to draw one, got {seed!r}.")
    return operator.index(seed)


def _host(model: nn.Module, control: Control, path: str, role: str, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The module at a path, made a host if it is none yet."""
    module = modules[path]
    state = host_state(module)
    if state is None:
        kind = kind_of(module)
        known = kind is not None and kind.knows_forward(original_class(module), module)
        state = HostState(
            control=control, path=path, kind=kind, known_forward=known, carries_rows=models.carries_rows(model, path)
        )
        module.__dict__[HOST_ATTRIBUTE] = state
        models.enter_host(model, control, path)
        parent, _, name = path.rpartition(".")
        if path and name in reads(modules[parent]):
            _host(model, control, parent, "reads", modules)
    if role == "attention":
        state.projections = key_value_layers(module)
    # The attention reaches its parts through the attention registry, the input through the root; neither runs anything around the module.
    if role not in ("attention", "input") and not is_swapped(module, HOSTS):
        swap(module, SequentialHost if isinstance(module, nn.Sequential) else Host)
    return module


def _assign_roles(model: nn.Module, control: Control, adapter: Adapter, modules: Mapping[str, nn.Module]) -> None:
    """Tell each host its role; let the module where an MLP begins remember its input for the part where the MLP ends."""
    exits: list[str] = []
    for path, role in adapter.sites.items():
        state = host_state(modules[path])
        assert state is not None
        state.roles[adapter.name] = role
        if role == "mlp":
            exits.append(path)
    if not exits:
        return
    entries = {block.mlp_out: block.mlp_in for block in blocks(model)}
    for exit_path in exits:
        entry = entries[exit_path]
        assert entry is not None
        opener = host_state(_host(model, control, entry, "opens", modules))
        assert opener is not None
        opener.opens.setdefault(exit_path, set()).add(adapter.name)


def _trained(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold an adapter's tensors."""
    modules = walked(model).modules
    for path in require_control(model).require(name).sites:
        part = part_of(modules[path], name)
        if part is not None:
            yield part
    if (shared := shared_of(model, name)) is not None:
        yield shared


# ---------------------------------------------------------------------------------------------------------------- who acts


def _act(control: Control, call: Call) -> None:
    control.call = call
    control.unchecked, control.rows_found = True, set()
    control.joined = None


def _refuse_merged(control: Control, verb: str, names: Iterable[str] = ()) -> None:
    """While adapters are merged, only those that were attached on top of them can be switched; the merged ones act on every row."""
    if not control.merged:
        return
    merged = ", ".join(control.merged)
    standing = control.standing()
    if not standing:
        raise IngraftError(
            f"{verb}: {merged} is merged into the base's weights and acts on every row; call `unmerge` first."
        )
    if other := [name for name in names if name not in standing and name not in control.merged]:
        raise IngraftError(
            f"{verb}: {', '.join(other)} was attached to the base as it is without {merged}, which is merged now; detach "
            f"{', '.join(standing)} and call `unmerge` first."
        )


def activate(model: nn.Module, *names: str) -> None:
    """Let these adapters act, in this order; none lets the base answer alone. Trainability is left as it is.

    Raises:
        IngraftError: for a name that is not attached, or while adapters are merged.
    """
    control = require_control(model)
    for name in names:
        control.require(name)
    if names != control.merged:
        _refuse_merged(control, "activate", names)
    _act(control, replace(control.call, active=tuple(dict.fromkeys(names)), rows=None))


def trainable(model: nn.Module, *names: str) -> None:
    """Let exactly these adapters be trained; the base stays frozen."""
    control = require_control(model)
    for name in names:
        control.require(name)
    for name in control.adapters:
        for part in _trained(model, name):
            part.requires_grad_(name in names)


@contextmanager
def _temporarily(control: Control, change: Callable[[Call], Call]) -> Iterator[None]:
    before = control.call
    _act(control, change(before))
    try:
        yield
    finally:
        # Steps of dropout taken inside go on counting outside.
        _act(control, replace(before, step=control.call.step))


@contextmanager
def acting_kept(model: nn.Module) -> Iterator[None]:
    """Behind the block the same adapters act as ahead of it, whatever was loaded or detached inside (none of these)."""
    control = control_of(model)
    before = Call() if control is None else control.call
    try:
        yield
    finally:
        if (control := control_of(model)) is not None:
            _act(control, replace(before, step=control.call.step))


def is_trainable(model: nn.Module, name: str) -> bool:
    """Whether any tensor of an adapter is trained."""
    return any(tensor.requires_grad for part in _trained(model, name) for tensor in part.parameters())


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the base answers alone, with what is merged into it. Nothing else changes, trainability least of all."""
    control = require_control(model)
    _refuse_merged(control, "disabled")
    with _temporarily(control, lambda call: replace(call, active=(), rows=None)):
        yield


@contextmanager
def rows(model: nn.Module, entries: Sequence[str | None | Sequence[str]]) -> Iterator[None]:
    """Inside the block each row of the batch has its own adapter (a name), several (names), or none (None).

    A batch that the model repeats (beams, several return sequences) counts each row's copies as that row.

    Raises:
        IngraftError: for names that are not attached; in the forward, where the batch or a layer's input cannot be matched to the rows.
    """
    control = require_control(model)
    per_row = rows_of(entries, tuple(control.adapters))
    _refuse_merged(control, "rows", (name for row in per_row for name in row))
    with _temporarily(control, lambda call: replace(call, active=(), rows=per_row)):
        yield


@contextmanager
def context(
    model: nn.Module, *, tasks: Sequence[int] | Tensor | None = None, prompt: Tensor | None = None
) -> Iterator[None]:
    """Inside the block the adapters know what the rows of the batch are about; what is left out holds as before.

    Args:
        tasks: (rows,) the task of each row, for methods that have values by task.
        prompt: (rows, tokens) bool, which tokens belong to the prompt, padding none of them; tokens further on are the answer's. Where nobody
            says, `generate` knows, and in a plain forward every real token is taken for the prompt.

    Raises:
        IngraftError: for shapes that cannot be meant; in the forward, where rows or tokens are not those of the batch.
    """
    control = require_control(model)
    new = told(tasks, prompt)
    kept = control.call.context
    merged = Context(
        tasks=kept.tasks if new.tasks is None else new.tasks, prompt=kept.prompt if new.prompt is None else new.prompt
    )
    control.call = replace(control.call, context=merged)
    try:
        yield
    finally:
        control.call = replace(control.call, context=kept)


def dropout_step(model: nn.Module, step: int, row_ids: Tensor | None = None) -> None:
    """Say where training stands: dropout masks are a function of (adapter seed, step, site, row id, position).

    Args:
        step: the optimiser step. A trainer that never calls this gets a new step with every forward.
        row_ids: (n,) identities of the rows of the next batch within the step; None counts them from zero.
    """
    control = require_control(model)
    control.auto_step = False
    control.call = control.call.at_step(torch.tensor(step, dtype=torch.int64), row_ids)


# ---------------------------------------------------------------------------------------------------------------- the end


def detach(model: M, *names: str, keep_merged: bool = False) -> M:
    """Take adapters off (all if no name is given). After the last one the model is the base again: type, keys, bits, `requires_grad`.

    Args:
        keep_merged: leave merged weights merged, for good, and take the merged adapters off too; the others stay on a base that is now so.
            Otherwise a merged adapter is refused.
    """
    control = require_control(model)
    for name in names:
        control.require(name)
    names = names or tuple(control.adapters)
    if keep_merged:
        names = tuple(dict.fromkeys((*names, *control.merged)))
    for name in control.adapters:
        if name not in names and (held := [other for other in control.acted_on_by(name) if other in names]):
            raise IngraftError(f"detach: {name} acts on {', '.join(held)}; detach {name} first, or with it.")
    if not keep_merged and (merged := [name for name in names if name in control.merged]):
        raise IngraftError(
            f"detach: {', '.join(merged)} is merged; call `unmerge` first (or pass keep_merged=True to keep the merged weights)."
        )
    modules = walked(model).modules
    for name in names:
        for path in control.adapters[name].sites:
            modules[path]._modules.pop(child_name(name), None)
        model._modules.pop(shared_name(name), None)
        del control.adapters[name]
    models.settle(model)
    for module in modules.values():
        state = host_state(module)
        if state is None:
            continue
        for name in names:
            state.roles.pop(name, None)
        state.opens = {exit_path: left for exit_path, users in state.opens.items() if (left := users - set(names))}
        if not (holds_parts(module) or state.opens or models.in_use(model, module)):
            models.leave_host(module)
            for mixin in HOSTS:
                unswap(module, mixin)
            del module.__dict__[HOST_ATTRIBUTE]
    if keep_merged:
        for name in control.standing():
            control.adapters[name].ground = ()
        control.merged, control.kept = (), []
    if control.adapters:
        _act(control, replace(control.call, active=tuple(n for n in control.call.active if n not in names), rows=None))
        return model
    for mixin in (*control.laid, models.root_mixin(model)):
        unswap(model, mixin)
    del model.__dict__[ATTRIBUTE]
    for path, parameter in base_parameters(model).items():
        parameter.requires_grad_(control.required_grad.get(path, False))
    return model
