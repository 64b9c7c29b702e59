"""What methods with a rank share: the rank and the scale by pattern, and the refusal of a rank that no layer could have.

`rank_pattern` and `alpha_pattern` mean what they mean in Hugging Face PEFT: keys are regular expressions that the end of a module's path has to
match, on a component's boundary (`down_proj`, `layers.1.mlp.down_proj`, `^model.layers.0.self_attn.q_proj`); the first that does counts.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self, TypeVar

from ingraft.methods.contract import MethodConfig, SiteFacts

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class RankedConfig(MethodConfig):
    """A rank, which may differ from site to site.

    Attributes:
        r: rank of the change, at least 1.
        rank_pattern: other ranks by the end of the module's path (a regular expression), the first that matches.
        alpha_pattern: the same for the numerator of the scale.
    """

    alpha_field: ClassVar[str] = "alpha"
    """The option that `alpha_pattern` replaces."""

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)

    def __post_init__(self) -> None:
        for name in ("rank_pattern", "alpha_pattern"):
            object.__setattr__(self, name, dict(getattr(self, name) or {}))
        super().__post_init__()

    def problems(self) -> list[str]:
        found = super().problems()
        if self.r < 1:
            found.append(f"r must be at least 1, got {self.r}.")
        found += [
            f"rank_pattern: the rank of {key!r} must be at least 1, got {r}."
            for key, r in self.rank_pattern.items()
            if r < 1
        ]
        for name in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, name):
                try:
                    re.compile(key)
                except re.error as error:
                    found.append(f"{name}: {key!r} is no regular expression: {error}.")
        return found

    def at(self, path: str) -> Self:
        if not (self.rank_pattern or self.alpha_pattern):
            return self
        alpha: Any = of_pattern(self.alpha_pattern, path, getattr(self, self.alpha_field))
        own = {"r": of_pattern(self.rank_pattern, path, self.r), self.alpha_field: alpha}
        return replace(self, **own, rank_pattern={}, alpha_pattern={})

    def idle(self, paths: Iterable[str]) -> list[str]:
        known = list(paths)
        return super().idle(known) + [
            f"{name}: {key!r} matches none of the adapted modules."
            for name in ("rank_pattern", "alpha_pattern")
            for key in getattr(self, name)
            if not any(pattern_matches(key, path) for path in known)
        ]


def by_site(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_field: str) -> dict[str, Any]:
    """The options of a config whose ranks and alphas are these, by path: the commonest as such, the others as patterns."""
    options: dict[str, Any] = {}
    for name, pattern, values in (("r", "rank_pattern", ranks), (alpha_field, "alpha_pattern", alphas)):
        usual = Counter(values.values()).most_common(1)[0][0]
        options[name] = usual
        options[pattern] = {f"^{path}": value for path, value in values.items() if value != usual}
    return options


def pattern_matches(key: str, path: str) -> bool:
    """Whether a pattern's key means this module: the end of its path, from the beginning of a component."""
    return re.match(rf"(.*\.)?({key})$", path) is not None


def of_pattern(pattern: Mapping[str, T], path: str, default: T) -> T:
    """What a pattern says of a module; the default where it says nothing."""
    return next((value for key, value in pattern.items() if pattern_matches(key, path)), default)


def rank_above(config: RankedConfig, facts: SiteFacts) -> str | None:
    """Why this rank has no meaning for a layer of this shape, or None."""
    most, name = min(facts.shape), facts.path.rpartition(".")[2]
    return above(facts, "r", config.r, f"give this module a rank of its own: rank_pattern={{{name!r}: {most}}}")


def above(
    facts: SiteFacts, option: str, r: int, otherwise: str = "leave this module out of target_modules"
) -> str | None:
    """Why a rank has no meaning for a layer of this shape, or None. An adapter from a file, which works, is not refused for waste.

    Args:
        otherwise: what can be done beside lowering the option.
    """
    most = min(facts.shape)
    if facts.finished or r <= most:
        return None
    return (
        f"{facts.path}: {option} = {r} is above the rank that a weight of {facts.shape[0]} x {facts.shape[1]} can have; it must be at most {most}. "
        f"Lower {option}, or {otherwise}."
    )


class Shaped(Protocol):
    """A config that tells the tensors at a site, with their shapes."""

    @property
    def r(self) -> int: ...

    def shapes(self, facts: SiteFacts) -> dict[str, tuple[int, ...]]: ...


def thin_above(config: Shaped, facts: SiteFacts) -> str | None:
    """The same for the matrices that a change is put together from, where they are kept as two factors (`..._a` and `..._b`) of rank r."""
    shapes = config.shapes(facts)
    for name in [name.removesuffix("_a") for name in shapes if name.endswith("_a")]:
        high, wide = (math.prod(shapes[name + side]) // config.r for side in ("_a", "_b"))
        if not facts.finished and config.r > min(high, wide):
            return (
                f"{facts.path}: r = {config.r} is above the rank that {name}, {high} x {wide} here, can have; it must be at most {min(high, wide)}, or so "
                f"large that {name} is trained whole. Change r, or give this module a rank of its own in rank_pattern."
            )
    return None
