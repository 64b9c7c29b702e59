"""Combine adapters into a new one, and convert an adapter of any mergeable method to one of low rank.

Both are defined on what adapters *are*, the changes of the base's parameters that each makes when it acts alone (`changes.py`). That is right
for every scaling and every method: one adapter with weight 1 gives itself back. How the tensors are mixed stands in `arithmetic.py`.

The new adapter sits wherever one of the given ones does. At each site it is one of two things:

* of low rank, where all changes come as factors, or where a rank (or an error) was asked for: then the mixed change is cut to that rank by its
  singular values, and what was left out is reported;
* whole, where a change has no low rank and none was asked for, where what changes is a vector (a norm), and where an adapter keeps the module
  in full beside its own sites (a head): the module's parameters.

Over factors "linear" (and "ties" and its kin, unless they end in `_svd`) mixes A with A and B with B, as the incumbent does: with weights
c_i^2 = w_i s_i this is sum(c_i B_i) sum(c_i A_i), cheap, and not the sum of the changes. Where a change has no factors there is only the sum.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import Literal

import torch
from torch import Tensor, nn

from ingraft.adapt.arithmetic import ALIASES, WAYS, Mixing
from ingraft.adapt.building import WHOLE_ROLE, draw_from, parameters
from ingraft.adapt.changes import change_of
from ingraft.adapt.control import Adapter, part_of, require_control, shared_of
from ingraft.adapt.files.peft_format import names_for
from ingraft.adapt.lifecycle import attach, seed_of
from ingraft.adapt.mixture import Place, Plan, SiteResult, even_ranks, fill_whole, low_at
from ingraft.adapt.select import base_modules
from ingraft.adapt.stacked import Stack
from ingraft.errors import IngraftError, nearest
from ingraft.methods import registry
from ingraft.methods.contract import Factors, MethodConfig, Part, WeightPart

PARAMETERS = "parameters"
"""The way that sums trained tensors of one method instead of changes; it serves methods without a weight form too."""


@dataclass(frozen=True, kw_only=True)
class Combination:
    """What `combine` or `convert` made. `str()` prints a table.

    Attributes:
        name, method: of the new adapter.
        parameters: how many numbers it holds.
        sites: by path.
    """

    name: str
    method: str
    parameters: int
    sites: Mapping[str, SiteResult]

    @property
    def error(self) -> float:
        """The difference from the change that was asked for, over all sites, as a share of its size."""
        norm = math.sqrt(sum(site.norm**2 for site in self.sites.values()))
        return math.sqrt(sum(site.error**2 for site in self.sites.values())) / norm if norm else 0.0

    def __str__(self) -> str:
        lines = [f"{self.name} ({self.method}): {self.parameters:,} parameters, relative error {self.error:.3g}"]
        for path, site in self.sites.items():
            kept = "whole" if site.rank is None else f"rank {site.rank}"
            lines.append(f"  {path:<48} {kept:<9} change {site.norm:.3g}, relative error {site.share:.3g}")
        return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- the verbs


@torch.no_grad()
def combine(
    model: nn.Module,
    weights: Mapping[str, float],
    name: str,
    *,
    how: str = "svd",
    rank: int | None = None,
    density: float | None = None,
    majority_sign_method: Literal["total", "frequency"] = "total",
    clamp: float | None = None,
    seed: int | None = None,
) -> Combination:
    """Attach a mixture of adapters as a new one, which then acts alone. The given ones stay as they are.

    Args:
        weights: factor of each adapter, of any sign.
        how: "svd" (the weighted sum, cut to a rank), "cat" (the same, exact: ranks add up), "linear", "ties", "dare_linear" ("dare"),
            "dare_ties", "magnitude_prune" (over factors, cheap and rough), the last four with "_svd" over changes; "parameters" sums the
            trained tensors of adapters of one method (as averaging checkpoints does), the only way for methods that cannot be merged.
        rank: of the new adapter where singular values are cut. By default the largest of the given ones; a change that has no low rank is
            then kept whole.
        density: the share of entries that pruning keeps.
        majority_sign_method: how ties elects a sign: by "total" or "frequency".
        clamp: a quantile at which the entries of the factors are clipped behind the cut.
        seed: of random pruning, and of the new adapter's dropout; drawn from torch's generator if None.

    Returns:
        The new adapter's method and size, and the error of each site.

    Raises:
        IngraftError: every reason why these cannot be combined so. Nothing is then changed.
    """
    how = ALIASES.get(how, how)
    adapters = _given(model, weights)
    problems = _no_numbers(weights, {"rank": rank, "density": density, "clamp": clamp})
    problems = problems or _problems(adapters, how, rank, density, majority_sign_method, clamp)
    if problems:
        raise IngraftError(*problems)
    seed = seed_of(seed, "combine")
    if how == PARAMETERS:
        return _of_parameters(model, adapters, weights, name, seed)
    mixing = Mixing(way=WAYS[how], density=1.0 if density is None else density, majority=majority_sign_method)
    usual = _usual_rank(model, adapters)
    plan = Plan(mixing=mixing, weights=weights, rank=rank, usual=usual, clamp=clamp, seed=seed)
    return _of_changes(model, adapters, name, plan)


@torch.no_grad()
def convert(
    model: nn.Module, adapter: str, rank: int | None = None, *, name: str | None = None, error: float | None = None
) -> Combination:
    """Attach an adapter of low rank that does what a given one of any mergeable method does, as nearly as its rank allows.

    Changed biases are kept, exactly; a changed norm becomes a module trained in full.

    Args:
        adapter: which.
        rank: of the new adapter at every site.
        name: of the new adapter; the old one's with the new method's behind it by default.
        error: instead of a rank: each site gets the smallest rank that leaves out at most this share of its change.

    Returns:
        The error of each site and over all.

    Raises:
        IngraftError: the method cannot be merged, or neither or both of rank and error are given.
    """
    adapters = _given(model, {adapter: 1.0}, "convert")
    problems = [
        f"convert: {a.name} ({a.method.name}) is not a change of weights, so no adapter of low rank can do the same."
        for a in adapters
        if not a.method.mergeable
    ]
    if rank is not None and rank < 1:
        problems.append(f"convert: rank must be at least 1, got {rank}.")
    if (rank is None) == (error is None):
        problems.append("convert: give a rank, or an error between 0 and 1, and not both.")
    if error is not None and not 0 < error < 1:
        problems.append(f"convert: error must lie between 0 and 1, got {error}.")
    if problems:
        raise IngraftError(*problems)
    plan = Plan(mixing=Mixing(way=WAYS["svd"]), weights={adapter: 1.0}, rank=rank, error=error, seed=adapters[0].seed)
    return _of_changes(model, adapters, name or f"{adapter}-{registry.LOW_RANK}", plan, "convert")


def _given(model: nn.Module, weights: Mapping[str, float], verb: str = "combine") -> list[Adapter]:
    control = require_control(model)
    if not isinstance(weights, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise IngraftError(
            f"{verb}: a weight for each adapter by its name is wanted, such as {{'a': 0.7}}, got {weights!r}."
        )
    if not weights:
        raise IngraftError("combine: no adapter was given.")
    given = [control.require(name) for name in weights]
    if other := [adapter.name for adapter in given if adapter.ground != control.merged]:
        raise IngraftError(
            f"{verb}: {', '.join(control.merged)} is merged into the base, which {', '.join(other)} does not stand on; call `unmerge` first."
        )
    return given


def _no_numbers(weights: Mapping[str, object], options: Mapping[str, object]) -> list[str]:
    """What stands where a number is wanted, each a sentence."""
    found = [
        f"combine: the weight of {name!r} must be a finite number, got {value!r}."
        for name, value in weights.items()
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value)
    ]
    return found + [
        f"combine: {name} must be {'a whole' if name == 'rank' else 'a'} number, got {value!r}."
        for name, value in options.items()
        if value is not None
        and (isinstance(value, bool) or not isinstance(value, Integral if name == "rank" else Real))
    ]


def _problems(
    adapters: Sequence[Adapter], how: str, rank: int | None, density: float | None, majority: str, clamp: float | None
) -> list[str]:
    found: list[str] = []
    way = WAYS.get(how)
    if way is None and how != PARAMETERS:
        known = (*WAYS, *ALIASES, PARAMETERS)
        found.append(f"combine: there is no way {how!r}{nearest(how, known)}. There are {', '.join(known)}.")
    if how == PARAMETERS:
        found += _unlike(adapters)
    else:
        found += [
            f"combine: {a.name} ({a.method.name}) is not a change of weights; only how='{PARAMETERS}' (adapters of one method) can sum it."
            for a in adapters
            if not a.method.mergeable
        ]
    if rank is not None and rank < 1:
        found.append(f"combine: rank must be at least 1, got {rank}.")
    if way is not None and way.prune and density is None:
        found.append(f"combine: {how} prunes; say which share of the entries it keeps (density, between 0 and 1).")
    if density is not None and not 0 < density <= 1:
        found.append(f"combine: density must lie in (0, 1], got {density}.")
    if majority not in ("total", "frequency"):
        found.append(f"combine: majority_sign_method must be 'total' or 'frequency', got {majority!r}.")
    if clamp is not None and not 0 < clamp <= 1:
        found.append(f"combine: clamp is a quantile, between 0 and 1, got {clamp}.")
    return found


# ------------------------------------------------------------------------------------------------------------- sums of changes


def _of_changes(
    model: nn.Module, adapters: Sequence[Adapter], name: str, plan: Plan, verb: str = "combine"
) -> Combination:
    if tokens := [adapter.name for adapter in adapters if adapter.tokens]:
        raise IngraftError(
            f"{verb}: {tokens[0]} trains tokens beside its own sites, which no low-rank adapter can hold. Merge it."
        )
    modules = base_modules(model)
    paths = [path for path in modules if any(path in adapter.sites for adapter in adapters)]
    in_full = {path for path in paths if any(adapter.sites.get(path) == WHOLE_ROLE for adapter in adapters)}

    def parts_at(path: str) -> list[tuple[float, Part]]:
        """Weights and parts at one site. Their changes are worked out when needed: no two sites' exist at once."""
        found = [(plan.weights[a.name], part_of(modules[path], a.name)) for a in adapters]
        return [(weight, part) for weight, part in found if part is not None]

    low: dict[Place, Factors] = {}
    results: dict[str, SiteResult] = {}
    problems: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for path in paths:
            draw_from(plan.seed_at(path))
            try:  # a head in full beside an adapter stays one
                made = {} if path in in_full else low_at(path, modules[path], parts_at(path), plan)
            except IngraftError as error:
                problems += error.problems
                continue
            for place, (factors, result) in made.items():
                low[place], results[place.name] = factors, result
    if problems:
        raise IngraftError(*problems)
    low = _beside_the_whole(paths, low)
    thin = {place.path for place in low}
    whole = [path for path in paths if path not in thin]
    config, tensors = _config(modules, low, whole)

    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        del shared
        assert set(paths) <= set(adapter.sites), "the new adapter sits where the given ones do"
        for place, values in tensors.items():
            for tensor, parameter in place.part(parts[place.path]).named_parameters():
                parameter.copy_(values[tensor])
        with torch.random.fork_rng(devices=[]):
            for path in whole:
                draw_from(plan.seed_at(path))
                found = [(weight, change_of(modules[path], path, part)) for weight, part in parts_at(path)]
                results[path] = fill_whole(modules[path], path, parts[path], found, plan.mixing)

    attach(model, config, name, seed=plan.seed, fill=fill)
    kept = {place.name for place in low} | set(whole)
    return _report(model, name, {path: result for path, result in results.items() if path in kept})


def _beside_the_whole(paths: Sequence[str], low: dict[Place, Factors]) -> dict[Place, Factors]:
    """The places of low rank that can stay so: not inside a module that is kept whole, and where a bias can be switched on for all of them if it is
    changed in one (a lookup and a stack of experts have none)."""
    if any(factors.bias is not None for factors in low.values()) and not all(place.takes_bias for place in low):
        moved = {place.path for place, factors in low.items() if factors.bias is not None}
        low = {place: factors for place, factors in low.items() if place.path not in moved}
    whole = [path for path in paths if path not in {place.path for place in low}]
    return {
        place: factors for place, factors in low.items() if not any(place.path.startswith(f"{path}.") for path in whole)
    }


def _config(
    modules: Mapping[str, nn.Module], low: Mapping[Place, Factors], whole: Sequence[str]
) -> tuple[MethodConfig, Mapping[Place, Mapping[str, Tensor]]]:
    """The config of the new adapter, and the tensors of its places of low rank."""
    in_full = tuple(names_for(whole, modules))
    if not low:
        return registry.load(registry.WHOLE).config(target_modules=in_full), {}
    method = registry.load(registry.LOW_RANK)
    assert method.of_factors is not None
    even = even_ranks(low)
    biased = next((place for place, factors in even.items() if factors.bias is not None), None)
    config, _ = method.of_factors({place.option: even[place] for place in (*even, *([biased] if biased else []))})
    _, tensors = method.of_factors({place.name: factors for place, factors in even.items()})
    named = tuple(names_for({place.path for place in low if place.raw is None}, modules))
    raw = tuple(dict.fromkeys(place.raw for place in low if place.raw is not None))
    config = replace(config, target_modules=named, target_parameters=raw or None, modules_to_save=in_full)
    return config, {place: tensors[place.name] for place in low}


def _report(model: nn.Module, name: str, sites: Mapping[str, SiteResult]) -> Combination:
    method = require_control(model).require(name).method.name
    total = sum(parameter.numel() for parameter in parameters(model, name).values())
    return Combination(name=name, method=method, parameters=total, sites=sites)


def _usual_rank(model: nn.Module, adapters: Sequence[Adapter]) -> int:
    """The largest rank of the factors that these adapters give anywhere."""
    parts = [part_of(model.get_submodule(path), adapter.name) for adapter in adapters for path in adapter.sites]
    inner = [one for part in parts if isinstance(part, Stack) for _, one in part.parts()]
    given = [part.low_rank() for part in (*parts, *inner) if isinstance(part, WeightPart)]
    return max((factors.A_RI.shape[0] for factors in given if factors is not None), default=1)


# ------------------------------------------------------------------------------------------------------------- sums of tensors


def _unlike(adapters: Sequence[Adapter]) -> list[str]:
    """Why the trained tensors of these adapters do not stand for the same things."""
    first = adapters[0]
    return [
        f"combine: {other.name} and {first.name} differ in {what}; '{PARAMETERS}' sums tensors of adapters made alike."
        for other in adapters[1:]
        for what, alike in (
            ("method", other.method.name == first.method.name),
            ("options", _shaping(other) == _shaping(first)),
            ("modules", other.sites == first.sites),
        )
        if not alike
    ][:4]


def _shaping(adapter: Adapter) -> dict[str, object]:
    """The options that say what an adapter's tensors mean."""
    said_by_sites = ("target_modules", "exclude_modules", "layers_to_transform", "modules_to_save")
    return {
        key: value
        for key, value in adapter.config.options().items()
        if key not in said_by_sites and not key.endswith("dropout")
    }


def _of_parameters(
    model: nn.Module, adapters: Sequence[Adapter], weights: Mapping[str, float], name: str, seed: int | None
) -> Combination:
    given = [(weights[adapter.name], _modules_of(model, adapter)) for adapter in adapters]

    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        del adapter
        new: dict[str, nn.Module] = {**parts, **({} if shared is None else {_SHARED: shared})}
        for path, module in new.items():
            for tensor, parameter in module.named_parameters():
                parameter.copy_(sum(weight * modules[path].get_parameter(tensor) for weight, modules in given))  # type: ignore[arg-type]
            for tensor, buffer in module.named_buffers():
                theirs = [modules[path].get_buffer(tensor) for _, modules in given]
                if not all(torch.equal(theirs[0], other) for other in theirs):
                    raise IngraftError(
                        f"combine: the adapters' frozen {tensor} at {path} differ (their seeds do), so their trained tensors do not mean the same."
                    )
                buffer.copy_(theirs[0])

    first = adapters[0]
    attach(model, first.config, name, seed=first.seed if seed is None else seed, fill=fill)
    return _report(model, name, {})


_SHARED = "shared module"


def _modules_of(model: nn.Module, adapter: Adapter) -> dict[str, nn.Module]:
    """An adapter's parts by path, and its shared module."""
    parts = {path: part_of(model.get_submodule(path), adapter.name) for path in adapter.sites}
    found: dict[str, nn.Module] = {path: part for path, part in parts.items() if part is not None}
    shared = shared_of(model, adapter.name)
    return found | ({} if shared is None else {_SHARED: shared})
