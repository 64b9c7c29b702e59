"""What methods with a rank share: the rank and the scale by pattern, and the refusal of a rank that no layer could have."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ingraft.methods.config import no_scale
from ingraft.methods.contract import SiteFacts
from ingraft.methods.pattern import PatternedConfig


@dataclass(frozen=True, kw_only=True)
class RankedConfig(PatternedConfig):
    """A rank, which may differ from site to site.

    Attributes:
        r: rank of the change, at least 1.
        rank_pattern: other ranks by the end of the module's path (a regular expression), the first that matches.
        alpha_pattern: the same for the numerator of the scale.
    """

    patterns: ClassVar[Mapping[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    r: int = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)

    def problems(self) -> list[str]:
        name = self.patterns["alpha_pattern"]
        of_sites = {f"alpha_pattern: {key!r}": value for key, value in self.alpha_pattern.items()}
        return super().problems() + self.below_one("rank_pattern") + no_scale({name: getattr(self, name), **of_sites})


def by_site(ranks: Mapping[str, int], alphas: Mapping[str, float], alpha_field: str) -> dict[str, Any]:
    """The options of a config whose ranks and alphas are these, by path: the commonest as such, the others as patterns."""
    options: dict[str, Any] = {}
    for name, pattern, values in (("r", "rank_pattern", ranks), (alpha_field, "alpha_pattern", alphas)):
        usual = Counter(values.values()).most_common(1)[0][0]
        options[name] = usual
        options[pattern] = {f"^{path}": value for path, value in values.items() if value != usual}
    return options


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
