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
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from ingraft.adapt.arithmetic import ALIASES, WAYS, Mixing
from ingraft.adapt.building import WHOLE_ROLE, parameters
from ingraft.adapt.changes import Change, change_of, side_by_side, spectrum
from ingraft.adapt.compose import own_parameters
from ingraft.adapt.control import Adapter, child_name, host_state, part_of, require_control
from ingraft.adapt.lifecycle import attach
from ingraft.adapt.peft_format import names_for
from ingraft.adapt.select import base_modules
from ingraft.adapt.weights import Kind
from ingraft.errors import IngraftError, nearest
from ingraft.methods import registry
from ingraft.methods.contract import Factors, MethodConfig, Part, WeightPart

PARAMETERS = "parameters"
"""The way that sums trained tensors of one method instead of changes; it serves methods without a weight form too."""


@dataclass(frozen=True, kw_only=True)
class SiteResult:
    """What became of one site.

    Attributes:
        rank: of the new change; None where the module is kept in full, exactly.
        norm: the size (Frobenius) of the change that was asked for.
        error: the size of the difference from it.
    """

    rank: int | None
    norm: float
    error: float

    @property
    def share(self) -> float:
        """The error as a share of the norm."""
        return self.error / self.norm if self.norm else 0.0


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
    problems = _problems(adapters, how, rank, density, majority_sign_method, clamp)
    if problems:
        raise IngraftError(*problems)
    if how == PARAMETERS:
        return _of_parameters(model, adapters, weights, name, seed)
    mixing = Mixing(way=WAYS[how], density=1.0 if density is None else density, majority=majority_sign_method)
    seed = int(torch.randint(2**31, ()).item()) if seed is None else seed
    usual = _usual_rank(model, adapters)
    plan = _Plan(mixing=mixing, weights=weights, rank=rank, usual=usual, clamp=clamp, seed=seed)
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
    adapters = _given(model, {adapter: 1.0})
    problems = _problems(adapters, "svd", rank, None, "total", None)
    if (rank is None) == (error is None):
        problems.append("convert: give a rank, or an error between 0 and 1, and not both.")
    if error is not None and not 0 < error < 1:
        problems.append(f"convert: error must lie between 0 and 1, got {error}.")
    if problems:
        raise IngraftError(*problems)
    plan = _Plan(mixing=Mixing(way=WAYS["svd"]), weights={adapter: 1.0}, rank=rank, error=error, seed=adapters[0].seed)
    return _of_changes(model, adapters, name or f"{adapter}-{registry.LOW_RANK}", plan)


def _given(model: nn.Module, weights: Mapping[str, float]) -> list[Adapter]:
    control = require_control(model)
    if not weights:
        raise IngraftError("combine: no adapter was given.")
    given = [control.require(name) for name in weights]
    if other := [adapter.name for adapter in given if adapter.ground != control.merged]:
        raise IngraftError(
            f"combine: {', '.join(control.merged)} is merged into the base, which {', '.join(other)} does not stand on; call `unmerge` first."
        )
    return given


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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How changes are mixed, and to what rank they are cut: `rank`, or the one that `error` needs; else `usual` where no site must be whole."""

    mixing: Mixing
    weights: Mapping[str, float]
    seed: int
    rank: int | None = None
    error: float | None = None
    usual: int = 0
    clamp: float | None = None

    def seed_at(self, path: str) -> int:
        """Of random pruning at one site, whatever the others are."""
        return (self.seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63

    @property
    def cut(self) -> bool:
        """Whether a change that has no low rank is to be given one."""
        return self.rank is not None or self.error is not None


Found = list[tuple[float, Change]]


def _of_changes(model: nn.Module, adapters: Sequence[Adapter], name: str, plan: _Plan) -> Combination:
    modules = base_modules(model)
    paths = [path for path in modules if any(path in adapter.sites for adapter in adapters)]

    def found_at(path: str) -> Found:
        """Weights and changes at one site, computed when needed: no two sites' dense changes exist at once."""
        parts = [(plan.weights[a.name], part) for a in adapters if (part := part_of(modules[path], a.name)) is not None]
        return [(weight, change_of(modules[path], path, part)) for weight, part in parts]

    low: dict[str, Factors] = {}
    results: dict[str, SiteResult] = {}
    problems: list[str] = []
    with torch.random.fork_rng(devices=[]):
        for path in paths:
            if any(adapter.sites.get(path) == WHOLE_ROLE for adapter in adapters):
                continue  # a head in full beside an adapter stays one
            torch.manual_seed(plan.seed_at(path))
            try:
                made = _low(found_at(path), plan, modules[path], path)
            except IngraftError as error:
                problems += error.problems
                continue
            if made is not None:
                low[path], results[path] = made
    if problems:
        raise IngraftError(*problems)
    if any(
        isinstance(modules[path], nn.Embedding) for path in low
    ):  # a lookup has no bias, so the method's own cannot be switched on
        low = {path: factors for path, factors in low.items() if factors.bias is None}
    whole = [path for path in paths if path not in low]
    config, tensors = _config(modules, low, whole)

    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        del shared
        assert set(adapter.sites) == set(paths), "the new adapter sits where the given ones do"
        for path, values in tensors.items():
            for tensor, parameter in parts[path].named_parameters():
                parameter.copy_(values[tensor])
        with torch.random.fork_rng(devices=[]):
            for path in whole:
                torch.manual_seed(plan.seed_at(path))
                results[path] = _fill_whole(modules[path], path, parts[path], found_at(path), plan.mixing)

    attach(model, config, name, seed=plan.seed, fill=fill)
    return _report(model, name, {path: results[path] for path in paths})


def _report(model: nn.Module, name: str, sites: Mapping[str, SiteResult]) -> Combination:
    method = require_control(model).require(name).method.name
    total = sum(parameter.numel() for parameter in parameters(model, name).values())
    return Combination(name=name, method=method, parameters=total, sites=sites)


def _usual_rank(model: nn.Module, adapters: Sequence[Adapter]) -> int:
    """The largest rank of the factors that these adapters give anywhere."""
    parts = [part_of(model.get_submodule(path), adapter.name) for adapter in adapters for path in adapter.sites]
    given = [part.low_rank() for part in parts if isinstance(part, WeightPart)]
    return max((factors.A_RI.shape[0] for factors in given if factors is not None), default=1)


def _low(found: Found, plan: _Plan, module: nn.Module, path: str) -> tuple[Factors, SiteResult] | None:
    """The mixed change of one site as factors; None where it is to be kept whole."""
    kind = _kind(module)
    if kind is None or not kind.matrix or any(set(change.others) - {"bias"} for _, change in found):
        return None
    weights = [weight for weight, change in found if change.on_weight]
    changes = [change for _, change in found if change.on_weight]
    factors = [change.factors for change in changes if change.factors is not None]
    if len(factors) < len(changes) and not plan.cut:
        return None
    mixing, bias = plan.mixing, _mixed_vectors(found, plan.mixing).get("bias")
    if not changes:
        W_OI = kind.dense(_weight(module))
        B_OR, A_RI = W_OI.new_zeros(len(W_OI), 1), W_OI.new_zeros(1, W_OI.shape[1])
        nothing = Factors(B_OR=B_OR, A_RI=A_RI, bias=bias)
        return nothing, SiteResult(rank=1, norm=0.0, error=0.0)
    if mixing.way.over == "apart" and len(factors) == len(changes):
        made, result = _apart(factors, weights, plan, path)
        return replace(made, bias=bias), result
    if mixing.plain and len(factors) == len(changes):
        whole: Tensor | Factors = side_by_side(factors, weights)
    else:
        whole = mixing([change.dense() for change in changes], weights)
    values = spectrum(whole)
    if isinstance(whole, Factors) and mixing.way.over == "side by side" and not plan.cut:
        return replace(whole, bias=bias), SiteResult(rank=whole.A_RI.shape[0], norm=values.norm, error=0.0)
    rank = min(values.rank_for(plan.error) if plan.error is not None else plan.rank or plan.usual, len(values.S_R))
    made = values.factors(rank, plan.clamp)
    return replace(made, bias=bias), SiteResult(rank=rank, norm=values.norm, error=values.error(rank))


def _apart(factors: list[Factors], weights: list[float], plan: _Plan, path: str) -> tuple[Factors, SiteResult]:
    """A's mixed with A's and B's with B's, a weight's root on each side, its sign on one."""
    ranks = [f.A_RI.shape[0] for f in factors]
    if len(set(ranks)) > 1:
        raise IngraftError(
            f"combine: {path}: the ranks differ ({', '.join(map(str, ranks))}), so factors cannot be mixed one by one; use 'cat', 'svd' or a way that ends in '_svd'."
        )
    if plan.cut:
        raise IngraftError(
            f"combine: {path}: mixing factors keeps their rank ({ranks[0]}); for another, use a way that ends in 'svd'."
        )
    scales = [weight * f.scale for weight, f in zip(weights, factors, strict=True)]
    roots = [math.sqrt(abs(scale)) for scale in scales]
    made = Factors(
        A_RI=plan.mixing(
            [f.A_RI.float() for f in factors], [math.copysign(c, s) for c, s in zip(roots, scales, strict=True)]
        ),
        B_OR=plan.mixing([f.B_OR.float() for f in factors], roots),
    )
    if not plan.mixing.plain:
        return made, SiteResult(rank=ranks[0], norm=spectrum(made).norm, error=0.0)
    true = side_by_side(factors, weights)
    apart = spectrum(side_by_side([true, made], [1.0, -1.0])).norm
    return made, SiteResult(rank=ranks[0], norm=spectrum(true).norm, error=apart)


def _mixed_vectors(found: Found, mixing: Mixing) -> dict[str, Tensor]:
    """Changes of vectors by name, each mixed from the adapters that have one."""
    names = dict.fromkeys(name for _, change in found for name in change.others)
    return {
        name: mixing(
            [change.others[name] for _, change in found if name in change.others],
            [weight for weight, change in found if name in change.others],
        )
        for name in names
    }


def _config(
    modules: Mapping[str, nn.Module], low: Mapping[str, Factors], whole: Sequence[str]
) -> tuple[MethodConfig, Mapping[str, Mapping[str, Tensor]]]:
    """The config of the new adapter, and the tensors of its sites of low rank."""
    in_full = tuple(names_for(whole, modules))
    if not low:
        return registry.load(registry.WHOLE).config(target_modules=in_full), {}
    method = registry.load(registry.LOW_RANK)
    assert method.of_factors is not None
    config, tensors = method.of_factors(low)
    return replace(config, target_modules=tuple(names_for(low, modules)), modules_to_save=in_full), tensors


def _fill_whole(module: nn.Module, path: str, part: Part, found: Found, mixing: Mixing) -> SiteResult:
    """Give a module that is kept whole its values: the base's and the mixed change."""
    changes = _mixed_vectors(found, mixing)
    on_weight = [(weight, change.dense()) for weight, change in found if change.on_weight]
    if on_weight:
        D_OI = mixing([change for _, change in on_weight], [weight for weight, _ in on_weight])
        kind = _kind(module)
        assert kind is not None
        changes["weight"] = kind.stored(D_OI, _weight(module).shape)
    for name, change in changes.items():
        own, base = part._parameters.get(name), module._parameters[name]
        if own is None or base is None:
            raise IngraftError(
                f"combine: {path} has no {name} to be changed; give a rank, so that the new adapter brings its own."
            )
        own.copy_(base.float() + change)  # not added: where the base ties two modules they share this tensor
    return SiteResult(
        rank=None, norm=math.sqrt(sum(float(c.double().square().sum()) for c in changes.values())), error=0.0
    )


def _kind(module: nn.Module) -> Kind | None:
    state = host_state(module)
    return state.kind if state is not None else None


def _weight(module: nn.Module) -> Tensor:
    weight = own_parameters(module)["weight"]
    assert weight is not None
    return weight


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
    shared = model._modules.get(child_name(adapter.name))
    return found | ({} if shared is None or isinstance(shared, Part) else {_SHARED: shared})
