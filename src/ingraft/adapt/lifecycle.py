"""The verbs: attach, activate, disabled, rows, trainable, detach, status.

Each verb works out everything that could be wrong before its first change, so that a refusal leaves the model exactly as it was. `merge`
and `unmerge` live in `merging.py`, `save` and `load` in `files.py`.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.control import (
    ATTRIBUTE,
    HOST_ATTRIBUTE,
    Adapter,
    Control,
    HostState,
    child_name,
    control_of,
    host_state,
    part_of,
    require_control,
)
from ingraft.adapt.host import Host, SequentialHost
from ingraft.adapt.offload import first_owner, is_offloaded, present
from ingraft.adapt.roles import blocks
from ingraft.adapt.rows import Call, rows_of
from ingraft.adapt.select import base_modules, select
from ingraft.adapt.swap import is_swapped, original_class, swap, unswap
from ingraft.adapt.weights import bias_of, kind_of
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import AttentionPart, InputPart, Method, MethodConfig, ParameterPart, Part, SiteFacts

M = TypeVar("M", bound=nn.Module)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
WHOLE_ROLE = "whole"
HOSTS = (SequentialHost, Host)


def attach(
    model: M,
    config: MethodConfig,
    name: str = "default",
    *,
    seed: int | None = None,
    strict: bool = True,
    fill: Callable[[Adapter, dict[str, Part], nn.Module | None], None] | None = None,
) -> M:
    """Graft an adapter onto a model, in place. It alone acts and is trainable afterwards; the base is frozen.

    Args:
        model: any module; a transformers model stays the class it is.
        config: a method's config, such as `LoraConfig(r=8)`.
        name: letters, digits, `.`, `_`, `-`; not one that is attached already.
        seed: of the initial values and of dropout; drawn from torch's generator if None, so `torch.manual_seed` governs.
        strict: refuse a pattern that matches nothing while others match; False warns.
        fill: called with the adapter, its parts by path and its shared module before the model is changed, to give them values of its own
            (a file's, when loading); what it raises stops the attaching.

    Returns:
        The same object.

    Raises:
        IngraftError: every reason why the adapter cannot be attached. The model is then unchanged.
    """
    control = control_of(model) or Control()
    if not NAME.fullmatch(name):
        raise IngraftError(
            f"{name!r} is no name for an adapter: up to 64 letters, digits, '.', '_' and '-', beginning with a letter or digit."
        )
    if name in control.adapters:
        raise IngraftError(f"An adapter named {name!r} is attached already; detach it first or choose another name.")
    if control.merged:
        raise IngraftError(
            f"{', '.join(control.merged)} is merged into the base; call `unmerge` before attaching another adapter."
        )
    method = registry.load(config.method)
    sites, whole, remarks = select(model, config, method, strict=strict)
    models.check_method(model, method)
    seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
    adapter = Adapter(
        name=name,
        config=config,
        method=method,
        sites={**sites, **dict.fromkeys(whole, WHOLE_ROLE)},
        saved_whole=whole,
        seed=seed,
        dropout=any(key.endswith("dropout") and value for key, value in config.options().items()),
    )
    parts, shared = _make_parts(model, adapter)
    adapter.virtual = next((part.length for part in parts.values() if isinstance(part, AttentionPart | InputPart)), 0)
    if fill is not None:
        fill(adapter, parts, shared)
    for remark in remarks:
        warnings.warn(f"{name}: {remark}", stacklevel=2)
    # From here on nothing can fail.
    if not control.adapters:
        control.required_grad = {path: parameter.requires_grad for path, parameter in base_parameters(model).items()}
        model.__dict__[ATTRIBUTE] = control
        swap(model, models.root_mixin(model))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    control.adapters[name] = adapter
    for path, part in parts.items():
        _host(model, control, path, adapter.sites[path]).add_module(child_name(name), part)
    if shared is not None:
        model.add_module(child_name(name), shared)
    for part in _trained(model, name):
        part.requires_grad_(True)
    _assign_roles(model, control, name)
    models.settle(model)
    _act(control, replace(control.call, active=(name,), rows=None))
    return model


def _make_parts(model: nn.Module, adapter: Adapter) -> tuple[dict[str, Part], nn.Module | None]:
    """The adapter's parts by path, with initial values that depend on the seed and the path alone."""
    modules = base_modules(model)
    whole = registry.load(registry.WHOLE)
    parts: dict[str, Part] = {}
    masters: dict[int, nn.Parameter] = {}
    facts: list[SiteFacts] = []
    with torch.random.fork_rng(devices=[]):
        for path, role in adapter.sites.items():
            module = modules[path]
            method, config = (whole, whole.config()) if role == WHOLE_ROLE else (adapter.method, adapter.config)
            if is_offloaded(module) and issubclass(method.part, ParameterPart):
                raise IngraftError(
                    f"{method.name}: {path} is offloaded by accelerate, which hides the weights it is tied to. Attach first, then offload."
                )
            with present(module, first_owner(module)):
                fact = facts_of(model, path, module, role)
                torch.manual_seed(_seed(adapter.seed, path))
                part = method.part(config, fact)
            if isinstance(part, ParameterPart):
                _follow_ties(module, part, masters)
            parts[path] = part.train(module.training)
            facts.append(replace(fact, W=None, b=None, parameters={}))  # sizes are all a shared module asks for
        torch.manual_seed(_seed(adapter.seed, "shared"))
        make = adapter.method.shared
        shared = (
            make(adapter.config, tuple(fact for fact in facts if fact.role != WHOLE_ROLE)) if make is not None else None
        )
    return parts, shared


def _seed(seed: int, path: str) -> int:
    return (seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63


def _follow_ties(module: nn.Module, part: ParameterPart, masters: dict[int, nn.Parameter]) -> None:
    """Where the base has one parameter at two places, let both parts have one tensor."""
    for name, own in list(part._parameters.items()):
        base = module._parameters.get(name)
        if own is not None and base is not None:
            part._parameters[name] = masters.setdefault(id(base), own)


def facts_of(model: nn.Module, path: str, module: nn.Module, role: str) -> SiteFacts:
    """What a part at this site may look at."""
    if role in ("attention", "input"):
        return models.site_facts(model, path, module, role)
    kind = kind_of(module)
    weight = module._parameters.get("weight")
    return SiteFacts(
        path=path,
        role=role,
        module=module,
        W=kind.dense(weight) if kind is not None and weight is not None else None,
        b=bias_of(module),
        parameters={name: p for name, p in module._parameters.items() if p is not None},
        width=models.width_of(model, module),
    )


def _host(model: nn.Module, control: Control, path: str, role: str) -> nn.Module:
    """The module at a path, made a host if it is none yet."""
    module = model.get_submodule(path)
    state = host_state(module)
    if state is None:
        kind = kind_of(module)
        known = kind is not None and kind.knows_forward(original_class(module), module)
        state = HostState(
            control=control, path=path, kind=kind, known_forward=known, carries_rows=models.carries_rows(model, path)
        )
        module.__dict__[HOST_ATTRIBUTE] = state
        models.enter_host(model, path)
    # The attention reaches its parts through the attention registry, the input through the root; neither runs anything around the module.
    if role not in ("attention", "input") and not is_swapped(module, HOSTS):
        swap(module, SequentialHost if isinstance(module, nn.Sequential) else Host)
    return module


def _assign_roles(model: nn.Module, control: Control, name: str) -> None:
    """Tell each host its role; let the module where an MLP begins remember its input for the part where the MLP ends."""
    adapter = control.adapters[name]
    for path, role in adapter.sites.items():
        state = host_state(model.get_submodule(path))
        assert state is not None
        state.roles[name] = role
    exits = [path for path, role in adapter.sites.items() if role == "mlp"]
    if not exits:
        return
    entries = {block.mlp_out: block.mlp_in for block in blocks(model)}
    for exit_path in exits:
        state = host_state(model.get_submodule(exit_path))
        assert state is not None
        entry = entries[exit_path]
        assert entry is not None
        opener = host_state(_host(model, control, entry, "opens"))
        assert opener is not None
        opener.opens.setdefault(exit_path, set()).add(name)


def _trained(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold an adapter's tensors."""
    for path in require_control(model).require(name).sites:
        part = part_of(model.get_submodule(path), name)
        if part is not None:
            yield part
    shared = model._modules.get(child_name(name))
    if shared is not None and not isinstance(shared, Part):
        yield shared


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters, those of adapters left out."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in base_modules(model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's trained tensors under stable names (site path, then tensor name), each once."""
    control = require_control(model)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path in control.require(name).sites:
        part = part_of(model.get_submodule(path), name)
        for tensor, parameter in part.named_parameters() if part is not None else ():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{tensor}" if path else tensor] = parameter
    shared = model._modules.get(child_name(name))
    if shared is not None and not isinstance(shared, Part):
        found.update({f"shared.{tensor}": parameter for tensor, parameter in shared.named_parameters()})
    return found


# ---------------------------------------------------------------------------------------------------------------- who acts


def _act(control: Control, call: Call) -> None:
    control.call = call
    control.unchecked = True


def _refuse_merged(control: Control, verb: str) -> None:
    if control.merged:
        raise IngraftError(
            f"{verb}: {', '.join(control.merged)} is merged into the base's weights and acts on every row; call `unmerge` first."
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
        _refuse_merged(control, "activate")
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
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the block the base answers alone. Nothing else changes, trainability least of all."""
    control = require_control(model)
    _refuse_merged(control, "disabled")
    with _temporarily(control, lambda call: replace(call, active=(), rows=None)):
        yield


@contextmanager
def rows(model: nn.Module, entries: Sequence[str | None | Sequence[str]]) -> Iterator[None]:
    """Inside the block each row of the batch has its own adapter (a name), several (names), or none (None).

    A batch that the model repeats (beams, several return sequences) counts each row's copies as that row.

    Raises:
        IngraftError: for names that are not attached; in the forward, where a layer's input cannot be matched to the rows.
    """
    control = require_control(model)
    _refuse_merged(control, "rows")
    per_row = rows_of(entries, tuple(control.adapters))
    with _temporarily(control, lambda call: replace(call, active=(), rows=per_row)):
        yield


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
        keep_merged: leave merged weights merged, for good; otherwise a merged adapter is refused.
    """
    control = require_control(model)
    for name in names:
        control.require(name)
    names = names or tuple(control.adapters)
    if control.merged and not keep_merged:
        raise IngraftError(
            f"detach: {', '.join(control.merged)} is merged; call `unmerge` first (or pass keep_merged=True to keep the merged weights)."
        )
    for name in names:
        for path in control.adapters[name].sites:
            host = model.get_submodule(path)
            host._modules.pop(child_name(name), None)
        model._modules.pop(child_name(name), None)
        del control.adapters[name]
    models.settle(model)
    for module in base_modules(model).values():
        state = host_state(module)
        if state is None:
            continue
        state.opens = {exit_path: left for exit_path, users in state.opens.items() if (left := users - set(names))}
        if not (any(part_of(module, name) for name in control.adapters) or state.opens or models.in_use(model, module)):
            models.leave_host(module)
            for mixin in HOSTS:
                unswap(module, mixin)
            del module.__dict__[HOST_ATTRIBUTE]
    if keep_merged:
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


@dataclass(frozen=True, kw_only=True)
class AdapterStatus:
    """One adapter in a `Status`."""

    name: str
    method: str
    sites: int
    parameters: int
    active: bool
    trainable: bool
    merged: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is attached to a model. `str()` prints a table."""

    adapters: tuple[AdapterStatus, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        head = f"{self.trainable:,} of {self.total:,} parameters are trainable ({100 * self.trainable / max(self.total, 1):.4f} %)"
        lines = [
            f"  {a.name:<16} {a.method:<12} {a.sites:>4} sites {a.parameters:>12,} parameters"
            + "".join(
                f"  {word}"
                for word, on in (("active", a.active), ("trainable", a.trainable), ("merged", a.merged))
                if on
            )
            for a in self.adapters
        ]
        return "\n".join([head, *lines])


def status(model: nn.Module) -> Status:
    """Adapters, which act, which are merged, and how many parameters train. Works on a bare model too."""
    control = control_of(model) or Control()
    base = {id(p): p for p in base_parameters(model).values()}
    adapters: list[AdapterStatus] = []
    trained: dict[int, Tensor] = {i: p for i, p in base.items() if p.requires_grad}
    total = dict(base)
    for name, adapter in control.adapters.items():
        own = parameters(model, name)
        total.update({id(p): p for p in own.values()})
        trained.update({id(p): p for p in own.values() if p.requires_grad})
        adapters.append(
            AdapterStatus(
                name=name,
                method=adapter.method.name,
                sites=len(adapter.sites),
                parameters=sum(p.numel() for p in own.values()),
                active=name in control.call.active or any(name in row for row in control.call.rows or ()),
                trainable=any(p.requires_grad for p in own.values()),
                merged=name in control.merged,
            )
        )
    return Status(
        adapters=tuple(adapters),
        trainable=sum(p.numel() for p in trained.values()),
        total=sum(p.numel() for p in total.values()),
    )


def expected_count(model: nn.Module, config: MethodConfig) -> int:
    """Trained parameters of a config on this model by the method's formula, without attaching anything."""
    method: Method = registry.load(config.method)
    sites, whole, _ = select(model, config, method)
    modules = base_modules(model)
    total = 0
    seen: set[int] = set()
    facts: list[SiteFacts] = []
    for path, role in {**sites, **dict.fromkeys(whole, WHOLE_ROLE)}.items():
        fact = facts_of(model, path, modules[path], role)
        if role == WHOLE_ROLE or issubclass(method.part, ParameterPart):
            fresh = {id(p): p.numel() for p in fact.parameters.values() if id(p) not in seen}
            seen |= set(fresh)
            total += sum(fresh.values())
        else:
            total += method.count(config, fact)
            facts.append(fact)
    if method.shared is not None:
        with torch.device("meta"):
            shared = method.shared(config, tuple(facts))
        total += sum(p.numel() for p in shared.parameters()) if shared is not None else 0
    return total
