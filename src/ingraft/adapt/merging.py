"""Merge and unmerge.

Merging writes what `compose.composed` says into the base: the very definition the general path computes with, so merged and active agree up to
the rounding of the base's dtype. Unmerging puts the original parameter *object* back; nobody writes an inverse, so a hundred cycles in
bfloat16 change no bit. The price is a second copy of the merged weights for as long as they are merged; a layer whose weight is packed is one
with a dense weight for that time, since packing the sum again would lose part of what was trained.

While adapters are merged they are part of the base. An adapter attached then stands on them: it is made for the base as it is, trained and saved
with it, can be switched and mixed by row, and nothing is unmerged from under it.

A weight that the base ties to another module's is refused: written at one side it would change the other too. Full tuning follows the tie
(its parts share one tensor); otherwise `untie=True` gives the merged side a parameter of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ingraft.adapt.compose import composed, own_parameters
from ingraft.adapt.control import Adapter, Control, Kept, control_of, host_state, part_of, require_control
from ingraft.adapt.offload import is_offloaded
from ingraft.adapt.select import base_modules
from ingraft.adapt.swap import original_class, rebase
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError
from ingraft.methods.contract import ParameterPart, WeightPart


@torch.no_grad()
def merge(model: nn.Module, *names: str, safe: bool = True, progress: bool = False, untie: bool = False) -> None:
    """Write adapters into the base's weights. They keep acting on every row until `unmerge`.

    Args:
        names: which, in this order; none means those that act.
        safe: refuse a merge that would write a value that is not finite.
        progress: show a bar.
        untie: give a tied weight that is to be merged a parameter of its own.

    Raises:
        IngraftError: if a method has no weight form, a weight is tied, a value is not finite. The model is then unchanged.
    """
    control = require_control(model)
    adapters = to_merge(model, *names)
    names = tuple(adapter.name for adapter in adapters)
    problems: list[str] = []
    modules = base_modules(model)
    paths = list(dict.fromkeys(path for adapter in adapters for path in adapter.sites))
    ties = _ties(modules)
    kept: list[Kept] = []
    written: dict[int, nn.Parameter] = {}
    try:
        for path in _tracked(paths, progress):
            for name, value in merged_values(modules[path], names).items():
                if not untie and (problem := _tied(modules, path, name, names, ties)) is not None:
                    problems.append(problem)
                else:
                    _write(modules[path], path, name, value, safe, kept, written)
        if problems:
            raise IngraftError(*problems)
    except BaseException:
        _put_back(modules, kept)
        raise
    control.kept, control.merged = kept, names
    control.restore["active"] = control.call.active
    _record_untied(model, control, modules, ties)


def to_merge(model: nn.Module, *names: str) -> list[Adapter]:
    """The adapters that a merge of these names (none: of those that act) is of.

    Raises:
        IngraftError: nothing acts, one is merged already, rows differ, or a method has no weight form.
    """
    control = require_control(model)
    if control.merged:
        raise IngraftError(
            f"{', '.join(control.merged)} is merged already; call `unmerge` first, or keep it for good (detach({control.merged[0]!r}, keep_merged=True))."
        )
    if control.call.rows is not None:
        raise IngraftError("merge: rows of the batch have adapters of their own; leave `rows` first.")
    names = names or control.call.active
    if not names:
        raise IngraftError("merge: no adapter acts; name the ones to merge.")
    adapters = [control.require(name) for name in names]
    problems = [
        f"{adapter.name} ({adapter.method.name}) cannot be merged: it is not a change of weights. Keep it attached, or save it with `ingraft.save`."
        for adapter in adapters
        if not adapter.method.mergeable
    ]
    if problems:
        raise IngraftError(*problems)
    modules = base_modules(model)
    if offloaded := [path for adapter in adapters for path in adapter.sites if is_offloaded(modules[path])]:
        raise IngraftError(
            f"merge: {', '.join(offloaded[:4])} is offloaded by accelerate, so there is no weight here to write into. Load the base without offloading."
        )
    return adapters


def check_ties(modules: dict[str, nn.Module], paths: Iterable[str], names: tuple[str, ...], untie: bool) -> str | None:
    """The first parameter that a merge at these sites would have to untie, None if there is none.

    Raises:
        IngraftError: there are some, and they may not be untied.
    """
    ties = _ties(modules)
    tied = [path for path in paths if any(len(ties.get(id(p), ())) > 1 for p in modules[path]._parameters.values())]
    found = {
        f"{path}.{name}": problem
        for path in tied
        for name in merged_values(modules[path], names)
        if (problem := _tied(modules, path, name, names, ties)) is not None
    }
    if found and not untie:
        raise IngraftError(*found.values())
    return next(iter(found), None)


def merged_values(module: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The parameters of one module as these adapters want them, those that change."""
    state = host_state(module)
    assert state is not None
    parts = [part for name in names if isinstance(part := part_of(module, name), WeightPart | ParameterPart)]
    values = composed(state.kind, parts, own_parameters(module))
    return {name: value for name, value in values.items() if value is not None}


def _write(
    module: nn.Module,
    path: str,
    name: str,
    value: Tensor,
    safe: bool,
    kept: list[Kept],
    written: dict[int, nn.Parameter],
) -> None:
    """Put one value in place, keeping the original. Full tuning of both sides of a tie gives them one tensor again."""
    old = module._parameters[name]
    if safe:
        refuse_not_finite(path, name, value)
    new = nn.Parameter(value.detach().clone(), requires_grad=False)
    if old is not None:
        other = written.setdefault(id(old), new)
        new = other if torch.equal(other, new) else new
    kind = kind_of(module) if name == "weight" else None
    dense = kind.dense_class_of(module) if kind is not None else None
    kept.append(Kept(path=path, name=name, parameter=old, cls=original_class(module) if dense is not None else None))
    module._parameters[name] = new
    if dense is not None:
        _recast(module, dense)


def refuse_not_finite(path: str, name: str, value: Tensor) -> None:
    """What `safe` does."""
    if not torch.isfinite(value).all():
        raise IngraftError(
            f"merge: {path}.{name} would hold values that are not finite. The adapter is damaged or diverged; nothing was merged."
        )


def _put_back(modules: dict[str, nn.Module], kept: Iterable[Kept]) -> None:
    for item in kept:
        modules[item.path]._parameters[item.name] = item.parameter
        if item.cls is not None:
            _recast(modules[item.path], item.cls)


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """For the length of the block the base has its own parameters, whatever is merged into it."""
    control = control_of(model)
    kept = control.kept if control is not None else []
    modules = base_modules(model) if kept else {}
    merged = [
        Kept(
            path=item.path,
            name=item.name,
            parameter=modules[item.path]._parameters[item.name],
            cls=None if item.cls is None else original_class(modules[item.path]),
        )
        for item in kept
    ]
    _put_back(modules, kept)
    try:
        yield
    finally:
        _put_back(modules, merged)


def _recast(module: nn.Module, cls: type[nn.Module]) -> None:
    """Let a host be of another class, whose kind the adapters that are not merged go on meeting."""
    rebase(module, cls)
    state = host_state(module)
    assert state is not None
    state.kind = kind_of(module)
    state.known_forward = state.kind is not None and state.kind.knows_forward(cls, module)


def unmerge(model: nn.Module) -> None:
    """Put the base's own parameters back, bit for bit, and let the adapters act as they did before `merge`.

    Raises:
        IngraftError: if nothing is merged, or an adapter was attached on top of what is.
    """
    control = require_control(model)
    if not control.merged:
        raise IngraftError("unmerge: nothing is merged into this model.")
    if standing := control.standing():
        raise IngraftError(
            f"unmerge: {', '.join(standing)} was attached on top of {', '.join(control.merged)} and means nothing without; save it, detach it, then "
            f"unmerge, or keep what is merged for good (detach({control.merged[0]!r}, keep_merged=True))."
        )
    _put_back(base_modules(model), control.kept)
    control.kept, control.merged = [], ()
    config = getattr(model, "config", None)
    if control.restore.pop("untied", False):
        config.tie_word_embeddings = True  # type: ignore[union-attr]
    control.restore.pop("active", None)


def _ties(modules: dict[str, nn.Module]) -> dict[int, list[str]]:
    """Paths of the modules that own each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(path)
    return owners


def _tied(
    modules: dict[str, nn.Module], path: str, name: str, names: tuple[str, ...], ties: dict[int, list[str]]
) -> str | None:
    """Why writing this parameter would change another module as well, or None. Parts of full tuning follow the tie themselves."""
    others = [other for other in ties.get(id(modules[path]._parameters[name]), []) if other != path]
    follows = all(
        isinstance(part := part_of(modules[other], adapter), ParameterPart) and part.copies
        for other in [*others, path]
        for adapter in names
        if part_of(modules[path], adapter) is not None
    )
    if not others or follows:
        return None
    return (
        f"merge: {path}.{name} is tied to {', '.join(others)}; writing it would change both. "
        "Pass untie=True (--untie) to give the merged weight a tensor of its own (the model grows by its size)."
    )


def _record_untied(
    model: nn.Module, control: Control, modules: dict[str, nn.Module], before: dict[int, list[str]]
) -> None:
    """Tell the config if the word embeddings are tied no longer, so that a saved model loads as it is."""
    config = getattr(model, "config", None)
    if not getattr(config, "tie_word_embeddings", False):
        return
    after = {path: ids for ids, paths in _ties(modules).items() for path in paths}
    split = any(
        len({after[path] for path in paths if path in after}) > 1 for paths in before.values() if len(paths) > 1
    )
    if split:
        config.tie_word_embeddings = False  # type: ignore[union-attr]
        control.restore["untied"] = True


def _tracked(paths: list[str], progress: bool) -> Iterable[str]:
    if not progress:
        return paths
    from rich.progress import track

    return track(paths, description="merging")
