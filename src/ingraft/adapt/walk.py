"""The model's own modules by path, looked up once and then only checked.

Every verb asks for them several times over. Walking through a model costs the more the more adapters hang in it, because each host's children
are looked through; so what was found is kept beside the model's control, and the next time only this is checked: every module's own children are
the very ones, and none was added. Adapters' parts are always registered behind a host's own children and every attaching begins with this check,
so a child of the user's own is seen as the last of its module before a part can come behind it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from ingraft.adapt.control import CHILD, control_of
from ingraft.methods.contract import Part

Registered = dict[str, nn.Module | None]
"""The children of a module by name, adapters' parts among them: the very dictionary."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Walk:
    """What a walk found.

    Attributes:
        modules: the model's own modules by path.
        links: of every child: what is registered in its module, its name, itself.
        ends: of every module: what is registered in it, and the names of its own children.
    """

    modules: dict[str, nn.Module]
    links: list[tuple[Registered, str, nn.Module | None]]
    ends: list[tuple[Registered, Collection[str]]]

    def holds(self) -> bool:
        """Whether a walk would find the same."""
        for registered, name, child in self.links:
            if registered.get(name, registered) is not child:
                return False
        for registered, own in self.ends:
            if registered and (last := next(reversed(registered))) not in own and not last.startswith(CHILD):
                return False
        return True


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model's own modules by path, parts of adapters left out."""
    return dict(walked(model).modules)


def walked(model: nn.Module) -> Walk:
    """The same as it is kept: the same object as long as the modules are the same, and something is attached."""
    control = control_of(model)
    if control is None:
        return _walk(model)
    if control.walk is None or control.walk.modules[""] is not model or not control.walk.holds():
        control.walk = _walk(model)
    return control.walk


def _walk(model: nn.Module) -> Walk:
    modules: dict[str, nn.Module] = {}
    links: list[tuple[Registered, str, nn.Module | None]] = []
    ends: list[tuple[Registered, Collection[str]]] = []

    def visit(module: nn.Module, path: str) -> None:
        modules[path] = module
        registered = module._modules
        own = {
            name: child
            for name, child in registered.items()
            if not name.startswith(CHILD) and not isinstance(child, Part)
        }
        links.extend((registered, name, child) for name, child in own.items())
        ends.append((registered, own.keys()))
        start, seen = f"{path}." if path else "", set[int]()
        for name, child in own.items():
            if child is not None and id(child) not in seen:  # under its first name, as torch lists children
                seen.add(id(child))
                visit(child, start + name)

    visit(model, "")
    return Walk(modules=modules, links=links, ends=ends)


def path_of(model: nn.Module, module: object) -> str | None:
    """The first path at which a module stands in the model, None for one that is no part of it."""
    return next((path for path, own in walked(model).modules.items() if own is module), None)
