"""The options that every method has."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from ingraft.errors import IngraftError


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
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple_of_names(value))
        object.__setattr__(self, "modules_to_save", tuple_of_names(self.modules_to_save))
        object.__setattr__(self, "target_parameters", tuple_of_names(self.target_parameters) or None)
        tokens = self.trainable_token_indices or None
        plain = (
            {name: tuple(own) for name, own in tokens.items()}
            if isinstance(tokens, Mapping)
            else tokens and tuple(tokens)
        )
        object.__setattr__(self, "trainable_token_indices", plain)
        if self.layers_to_transform is not None:
            layers = self.layers_to_transform
            object.__setattr__(self, "layers_to_transform", (layers,) if isinstance(layers, int) else tuple(layers))
        if found := self.problems():
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

    def options(self) -> dict[str, object]:
        """The fields as plain data, in order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
