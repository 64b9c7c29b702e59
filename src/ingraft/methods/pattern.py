"""Options that may differ from site to site: an option, and beside it a pattern that gives some modules another value.

Patterns mean what they mean in Hugging Face PEFT: keys are regular expressions that the end of a module's path has to match, on a component's
boundary (`down_proj`, `layers.1.mlp.down_proj`, `^model.layers.0.self_attn.q_proj`); the first that does counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from ingraft.methods.contract import MethodConfig


@dataclass(frozen=True, kw_only=True)
class PatternedConfig(MethodConfig):
    """Options with patterns beside them. Abstract."""

    patterns: ClassVar[Mapping[str, str]]
    """By the name of each pattern, the option whose value it replaces."""

    def __post_init__(self) -> None:
        for name in self.patterns:
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        super().__post_init__()

    def problems(self) -> list[str]:
        found = super().problems()
        for name in self.patterns:
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    found.append(f"{name}: {key!r} is no regular expression: {error}.")
        return found

    def below_one(self, pattern: str) -> list[str]:
        """A sentence for an option, and for each value of its pattern, that is less than 1."""
        option, values = self.patterns[pattern], getattr(self, pattern)
        found = [f"{option} must be at least 1, got {own}."] if (own := getattr(self, option)) < 1 else []
        return found + [f"{pattern}: {key!r} must be at least 1, got {n}." for key, n in values.items() if n < 1]

    def at(self, path: str) -> Self:
        own: dict[str, Any] = {name: {} for name in self.patterns}
        for name, option in self.patterns.items():
            values = getattr(self, name)
            own[option] = next((v for key, v in values.items() if _matches(key, path)), getattr(self, option))
        return replace(self, **own) if any(getattr(self, name) for name in self.patterns) else self

    def idle(self, paths: Iterable[str]) -> list[str]:
        known = list(paths)
        return super().idle(known) + [
            f"{name}: {key!r} matches none of the adapted modules."
            for name in self.patterns
            for key in getattr(self, name)
            if not any(_matches(key, path) for path in known)
        ]


def _matches(key: str, path: str) -> bool:
    """Whether a pattern's key means this module: the end of its path, from the beginning of a component."""
    return re.match(rf"(.*\.)?({key})$", path) is not None
