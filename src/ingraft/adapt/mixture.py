"""How the changes of several adapters are mixed at one place: into factors of low rank, or into the values of a whole module.

A place is where one matrix lies: a module's weight, or one of the matrices that a module keeps in tensors of its own (`stacked.py`).

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ingraft.adapt.arithmetic import Mixing
from ingraft.adapt.changes import Change, change_of, change_of_matrix, side_by_side, spectrum
from ingraft.adapt.compose import own_parameters
from ingraft.adapt.control import host_state
from ingraft.adapt.stacked import Matrix, Stack, own_tensors
from ingraft.adapt.weights import Kind
from ingraft.errors import IngraftError
from ingraft.methods.contract import Factors, Part, WeightPart


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
class Place:
    """Where one matrix lies.

    Attributes:
        path: of the module.
        matrix: which of the module's matrices, None for its weight.
        takes_bias: whether a bias can be added to its product.
    """

    path: str
    matrix: Matrix | None = None
    takes_bias: bool = True

    @property
    def name(self) -> str:
        """Its name in reports."""
        return self.path if self.matrix is None else f"{self.path}.{self.matrix.key}"

    @property
    def raw(self) -> str | None:
        """The tensor by which a config names it, where that is not its module."""
        in_module = self.matrix is None or self.matrix.bias is not None
        return None if in_module or self.matrix is None else f"{self.path}.{self.matrix.parameter}"

    @property
    def option(self) -> str:
        """The path by which a config gives it a rank of its own."""
        return self.raw or self.path

    def part(self, whole: Part) -> nn.Module:
        """The part of an adapter that belongs here, among those the adapter has in the module."""
        return whole if self.matrix is None else whole.get_submodule(self.matrix.key)


@dataclass(frozen=True, kw_only=True)
class Plan:
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


Found = Sequence[tuple[float, Change]]
"""Weights and changes."""


@torch.no_grad()
def low_at(
    path: str, module: nn.Module, parts: Sequence[tuple[float, Part]], plan: Plan
) -> dict[Place, tuple[Factors, SiteResult]]:
    """The mixed change of each matrix of a module as factors; empty where the module is to be kept whole.

    Raises:
        IngraftError: factors that cannot be mixed as the plan says.
    """
    stacks = [(weight, part) for weight, part in parts if isinstance(part, Stack)]
    if stacks and len(stacks) < len(parts):
        return {}
    found: dict[Place, list[tuple[float, Change]]] = {}
    shapes: dict[Place, tuple[int, ...]] = {}
    for weight, stack in stacks:
        own = {name: value.detach().float() for name, value in own_tensors(module).items()}
        for matrix, part in stack.parts():
            assert isinstance(part, WeightPart)
            place = Place(path=path, matrix=matrix, takes_bias=matrix.bias is not None)
            W, b = matrix.weight(own), matrix.bias_of(own)
            found.setdefault(place, []).append((weight, change_of_matrix(part, W, b)))
            shapes[place] = tuple(W.shape)
    kind = _kind(module)
    if not stacks and kind is not None and kind.matrix:
        place = Place(path=path, takes_bias="bias" in module._parameters)
        found[place] = [(weight, change_of(module, path, part)) for weight, part in parts]
        shapes[place] = kind.shape_of(module)
    made: dict[Place, tuple[Factors, SiteResult]] = {}
    for place, changes in found.items():
        one = _low(changes, plan, shapes[place], place.name)
        if one is None:
            return {}
        made[place] = one
    return made


def even_ranks(low: Mapping[Place, Factors]) -> dict[Place, Factors]:
    """The same changes, those that share an option of the config padded to one rank."""
    most: dict[str, int] = {}
    for place, factors in low.items():
        most[place.option] = max(most.get(place.option, 0), len(factors.A_RI))
    return {place: _padded(factors, most[place.option]) for place, factors in low.items()}


def _padded(factors: Factors, rank: int) -> Factors:
    room = rank - len(factors.A_RI)
    A_RI, B_OR = nn.functional.pad(factors.A_RI, (0, 0, 0, room)), nn.functional.pad(factors.B_OR, (0, room))
    return factors if room == 0 else replace(factors, A_RI=A_RI, B_OR=B_OR)


def _low(found: Found, plan: Plan, shape: tuple[int, ...], path: str) -> tuple[Factors, SiteResult] | None:
    """The mixed change of one matrix as factors; None where it is to be kept whole."""
    if any(set(change.others) - {"bias"} for _, change in found):
        return None
    weights = [weight for weight, change in found if change.on_weight]
    changes = [change for _, change in found if change.on_weight]
    factors = [change.factors for change in changes if change.factors is not None]
    if len(factors) < len(changes) and not plan.cut:
        return None
    mixing, bias = plan.mixing, _mixed_vectors(found, plan.mixing).get("bias")
    if not changes:
        nothing = Factors(B_OR=torch.zeros(shape[0], 1), A_RI=torch.zeros(1, shape[1]), bias=bias)
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


def _apart(factors: list[Factors], weights: list[float], plan: Plan, path: str) -> tuple[Factors, SiteResult]:
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


def fill_whole(module: nn.Module, path: str, part: Part, found: Found, mixing: Mixing) -> SiteResult:
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
