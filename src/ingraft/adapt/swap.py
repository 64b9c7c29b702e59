"""How a module becomes a host: its class is swapped, nothing else.

`module.__class__` is set to a subclass of the module's own class, made on demand and carrying the same name, so that `state_dict` keys,
`isinstance`, tied weights, base checkpoints, wrap policies and output capture go on working. The module object, its parameters and its place
in the tree stay what they were; parts are child modules under it. Wrapping modules (as others do) renames every base key; patching bound
methods breaks copying and compilation; both were rejected.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Mixin:
    """A behaviour laid over a module's own forward. Abstract; `around` receives the forward below it.

    A mixin is never instantiated and never becomes a base class (the class of a live object can only be exchanged for one whose chain of
    bases has the same memory layout); its functions are copied into the generated subclass, where they shadow the module's own. What they
    shadow is reached through `beneath(self, mixin)`, since a copied function has no zero-argument `super()`.
    """

    @staticmethod
    def around(module: Any, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module."""
        raise NotImplementedError


class Container(Mixin):
    """A behaviour laid over a module that iterates over its children: what adapters register there is no layer."""

    def __iter__(self: Any) -> Iterator[nn.Module]:
        return (child for name, child in self._modules.items() if not name.startswith("adapter:"))

    def __len__(self: Any) -> int:
        return sum(1 for _ in iter(self))


_NOT_COPIED = frozenset({*vars(type("Empty", (), {})), "around"})


@functools.cache
def swapped_class(cls: type[nn.Module], mixin: type[Mixin]) -> type[nn.Module]:
    """The subclass of `cls` that runs `mixin.around`, under the name of `cls`. One for each pair, so that types compare equal."""

    @functools.wraps(cls.forward)  # signature and annotations: transformers reads both
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return mixin.around(self, functools.partial(cls.forward, self), args, kwargs)

    def rebuild(self: nn.Module, protocol: Any) -> Any:
        del protocol
        return _blank, (original_class(self), _stack(self)), self.__getstate__()

    behaviour = {
        name: value
        for part in reversed(mixin.__mro__[:-1])
        for name, value in vars(part).items()
        if name not in _NOT_COPIED
    }
    body = {
        **behaviour,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": rebuild,
        "forward": forward,
        "ingraft_original": cls,
        "ingraft_mixin": mixin,
    }
    return type(cls.__name__, (cls,), body)


def beneath(module: Any, mixin: type[Mixin]) -> Any:
    """What a mixin's functions shadow: `super()` for them."""
    cls = next(cls for cls in type(module).__mro__ if vars(cls).get("ingraft_mixin") is mixin)
    return super(cls, module)


def _stack(module: nn.Module) -> tuple[type[Mixin], ...]:
    """The mixins over a module, lowest first."""
    found: list[type[Mixin]] = []
    cls: Any = type(module)
    while "ingraft_original" in vars(cls):
        found.append(cls.ingraft_mixin)
        cls = cls.ingraft_original
    return tuple(reversed(found))


def _blank(cls: type[nn.Module], mixins: tuple[type[Mixin], ...]) -> nn.Module:
    """An empty instance for copy and pickle to fill."""
    klass = functools.reduce(swapped_class, mixins, cls)
    return klass.__new__(klass)


def swap(module: nn.Module, mixin: type[Mixin]) -> None:
    """Lay a mixin over a module. Other mixins already there stay below it."""
    module.__class__ = swapped_class(type(module), mixin)
    _rebind_hooked_forward(module)


def unswap(module: nn.Module, mixin: type[Mixin]) -> None:
    """Take a mixin off again, wherever in the stack it lies."""
    above: list[type[Mixin]] = []
    cls: Any = type(module)
    while "ingraft_original" in vars(cls):
        if cls.ingraft_mixin is not mixin:
            above.append(cls.ingraft_mixin)
        cls = cls.ingraft_original
    for other in reversed(above):
        cls = swapped_class(cls, other)
    module.__class__ = cls
    _rebind_hooked_forward(module)


def rebase(module: nn.Module, cls: type[nn.Module]) -> None:
    """Let a module be of another class below its mixins, one whose forward finds all it needs on it."""
    module.__class__ = functools.reduce(swapped_class, _stack(module), cls)
    _rebind_hooked_forward(module)


def is_swapped(module: nn.Module, mixins: tuple[type[Mixin], ...]) -> bool:
    """Whether one of these mixins lies over the module already."""
    cls: Any = type(module)
    while "ingraft_original" in vars(cls):
        if cls.ingraft_mixin in mixins:
            return True
        cls = cls.ingraft_original
    return False


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the module was written in, below all swaps."""
    cls: Any = type(module)
    while "ingraft_original" in vars(cls):
        cls = cls.ingraft_original
    return cls


def replaced_forward(module: nn.Module) -> bool:
    """Whether something unknown has put its own `forward` on the instance, where it would bypass a swapped class."""
    return "forward" in module.__dict__ and "_old_forward" not in module.__dict__


def _rebind_hooked_forward(module: nn.Module) -> None:
    """accelerate's hooks keep the bound forward of the class that was there before; give them the present one."""
    old = module.__dict__.get("_old_forward")
    if isinstance(old, types.MethodType):
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)
