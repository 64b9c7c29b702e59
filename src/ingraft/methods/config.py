"""The options that every method has."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, Union, get_args, get_origin, get_type_hints

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def tuple_of_names(value: object) -> tuple[str, ...]:
    """Normalise one name or a sequence of names to a tuple; a set is sorted so that files come out the same in every process."""
    if value is None:
        return ()
    if isinstance(value, str):
        return (value,)
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    if isinstance(value, list | tuple):
        return tuple(value)
    raise IngraftError(f"Expected a name or a list of names, got {value!r}.")


def no_scale(alphas: Mapping[str, float]) -> list[str]:
    """A sentence for each numerator of a scale that is zero."""
    words = "must not be 0: the change is multiplied by it, so nothing would act and nothing would be trained."
    return [f"{name} {words}" for name, value in alphas.items() if value == 0]


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """Hyperparameters common to every method. Subclasses add their own and check them in `problems`.

    Attributes:
        target_modules: which modules to adapt: "all-linear", a regular expression over full module names (a string), or names matched
            exactly or as a dotted suffix (a list). None takes the method's own default.
        exclude_modules: the same notation; what it matches is left alone.
        layers_to_transform: only blocks with these indices (numbers in the module path); negative ones count from the end of their stack.
        target_parameters: tensors of a module that applies them in code of its own (the stacked matrices of a mixture's experts), named exactly
            or by a dotted suffix (`experts.gate_up_proj`); beside `target_modules`, of which [] means none. Weight methods alone.
        modules_to_save: modules outside the method's sites that are trained in full beside it (a new classification head).
        trainable_token_indices: tokens whose rows of the embedding (and of a head tied to it) are trained beside it; or, by name of the module,
            of other embeddings and heads.
    """

    method: ClassVar[str] = ""
    """The method's name in the registry."""

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: tuple[int, ...] | None = None
    target_parameters: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value).__module__ == "numpy" and hasattr(value, "item"):  # a number out of an array
                object.__setattr__(self, field.name, value.item())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple_of_names(value))
        object.__setattr__(self, "modules_to_save", tuple_of_names(self.modules_to_save))
        object.__setattr__(self, "target_parameters", tuple_of_names(self.target_parameters) or None)
        tokens: Any = self.trainable_token_indices
        if isinstance(tokens, Mapping):
            tokens = {name: _tuple(own) for name, own in tokens.items()}
        object.__setattr__(self, "trainable_token_indices", _tuple(tokens) or None)
        object.__setattr__(self, "layers_to_transform", _tuple(self.layers_to_transform))
        # What has the wrong type would make `problems` itself stumble.
        if found := _wrong_types(self) or self.problems():
            raise IngraftError(*found)

    def problems(self) -> list[str]:
        """Every reason why these values cannot work, each a sentence; an empty list if none. Cheap, and needs no model."""
        return []

    def at(self, path: str) -> Self:
        """The options as they hold at one site, where they may differ from site to site (a rank by pattern)."""
        del path
        return self

    def among(self, paths: Sequence[str]) -> Sequence[str]:
        """Which of the sites found are adapted, in model order: all, unless an option says how many (the topmost blocks)."""
        return paths

    def idle(self, paths: Iterable[str]) -> list[str]:
        """Options that name modules and mean none of these, each a sentence."""
        del paths
        return []

    def in_steps(self, total: int) -> list[str]:
        """What is wrong with the options in a training of so many optimiser steps, each a sentence."""
        del total
        return []

    def options(self) -> dict[str, object]:
        """The fields as plain data, in order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


def _tuple(value: Any) -> Any:
    """A number or a list of numbers as a tuple; anything else as it is."""
    return (value,) if isinstance(value, int) else tuple(value) if isinstance(value, list | set | range) else value


def _wrong_types(config: MethodConfig) -> list[str]:
    """Values that are not of their field's type, or not finite, each a sentence."""
    from pydantic import ValidationError

    found: list[str] = []
    for name, (kind, adapter) in _kinds(type(config)).items():
        value = getattr(config, name)
        try:
            adapter.validate_python(value)
        except ValidationError:
            found.append(f"{name} must be {_in_words(kind)}, got {value!r}.")
    return found


def truths(cls: type[MethodConfig], options: Mapping[str, object]) -> dict[str, str]:
    """Options that say true or false where the field wants something else, each a sentence by name. Python counts them as numbers, so that `r: true`
    would be a rank of 1."""
    kinds = _kinds(cls)
    return {
        name: f"{name} must be {_in_words(kinds[name][0])}, got {value!r}."
        for name, value in options.items()
        if name in kinds and _holds_truth(value) and not {bool, object, Any} & set(leaves(kinds[name][0]))
    }


def _holds_truth(value: Any) -> bool:
    inside = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, bool) or any(map(_holds_truth, inside))


def leaves(kind: Any) -> Iterator[Any]:
    """The types that a type is made of."""
    if isinstance(kind, type) and not get_args(kind):
        yield kind
    for inside in get_args(kind) if get_origin(kind) is not Literal else map(type, get_args(kind)):
        yield from leaves(inside)
    if kind is Any:
        yield kind


@functools.cache
def _kinds(cls: type[MethodConfig]) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    """Each field's type, and what checks it."""
    from pydantic import ConfigDict, TypeAdapter

    strict = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], TypeAdapter(hints[f.name], config=strict)) for f in dataclasses.fields(cls)}


_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "a text",
    types.NoneType: "null",
}


def _in_words(kind: Any) -> str:
    """A type as a reader of a recipe would say it."""
    inside = get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_in_words(one) for one in inside)
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, inside))
    if get_origin(kind) is tuple:
        return f"a list, each {_in_words(inside[0])}"
    if get_origin(kind) is not None and issubclass(get_origin(kind), Mapping):
        return f"a mapping, by name {_in_words(inside[1])}"
    return _WORDS.get(kind, str(getattr(kind, "__name__", kind)))
