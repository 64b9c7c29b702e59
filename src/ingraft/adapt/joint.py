"""Rows with different adapters of one kind, served together: one part that holds the tensors of all of them.

Row by row, sixteen adapters cost sixteen times a handful of small operations at every layer, and a decode step has nothing but small operations:
eight times the base's time went into them. So where every row has at most one part at a host, the parts of one class and one set of options become
one. Tensors that run over hidden units (a rank, a bottleneck) are put side by side along these, and a mask leaves each row its own; tensors
that do not are given row by row. The part's own code then runs once over the whole batch, and the site it asks applies mask and rows. A part
says which of its tensors are of which kind (`Part.stacks`); one that does not is served group by group as ever.

All adapters' hidden units are computed for every row. That is work thrown away, and cheap: 16 x 8 of them are a fifth of a layer of width 576. Above
`MOST_UNITS` the groups are served one by one again.

One adapter on every row is the joint of one. It spares a step of generation the cast of every tensor, and most of what a host does to find out
what is to be done, which was more than the products themselves.

What was joined is kept from one forward to the next, without gradients only. It is made anew when rows, adapters, or any tensor change: before
every forward, versions and addresses of the tensors are compared with what they were (6,720 tensors for sixteen adapters at 210 layers, so in
lists, by loops in C). A tensor written to through `.data`, as averages of weights are by some, shows neither. Rows stand for the length of a block; one
adapter may be scored, changed and scored again, so what is kept of it serves steps of one token only, and a longer forward makes an end of it.

Legend: B entries of dimension 0, n rows, H hidden units of all adapters together, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from operator import attrgetter
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.adapt.control import Control, HostState
from ingraft.adapt.rows import Call, unflattened
from ingraft.adapt.site import LayerSite, name_of
from ingraft.adapt.swap import Forward
from ingraft.methods.contract import OutputPart, Part, ShortcutPart

MOST_UNITS = 512

_PLAIN = (Tensor, nn.Parameter)
_version, _training = attrgetter("_version"), attrgetter("training")
State = tuple[list[int], list[int], list[bool]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """Several adapters' parts at one host, as one.

    Attributes:
        part: of their class, its tensors theirs; like: one of them; role: theirs.
        moves: whether `before` does anything.
        by_row: whether rows differ. Where they do not, no unit is another row's, and no vector is given row by row.
        mask_nH: 1 where a hidden unit is the row's own; None if there are none.
    """

    part: Any
    like: Part
    role: str
    moves: bool
    by_row: bool
    mask_nH: Tensor | None
    masks: dict[tuple[int, int, float], Tensor] = field(default_factory=dict[tuple[int, int, float], Tensor])

    def mask(self, u: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """The mask for entries of this shape (B, ..., H), times a scale; in float32 where the dtype of u could not hold that."""
        where = f"{type(self.part).__name__} has hidden units that its `stacks` does not tell of"
        assert self.mask_nH is not None, where
        key = (u.shape[0], u.dim(), id(scale) if isinstance(scale, Tensor) else scale)
        if key not in self.masks:
            scaled_nH = self.mask_nH.float() * scale
            narrow_nH = scaled_nH.to(u.dtype)
            exact = torch.equal(narrow_nH.float(), scaled_nH)
            self.masks[key] = _by_row(narrow_nH if exact else scaled_nH, u.shape[0], u.dim())
        return self.masks[key]


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """What a host does in the forwards of one call.

    Attributes:
        dtype: of the input it is for.
        parts: those that act.
        owners: the dictionaries that they keep their tensors in; state: of these, see `_state`. Empty where nothing is kept.
        possible: False where the host must go the ordinary way.
    """

    dtype: torch.dtype | None
    parts: tuple[Part, ...]
    owners: tuple[dict[str, Any], ...]
    state: State
    possible: bool = False
    on_weight: tuple[Joint, ...] = ()
    on_output: tuple[Joint, ...] = ()


@dataclass(kw_only=True, eq=False)
class Kept:
    """What the hosts of a model keep (`Control.joined`).

    Attributes:
        acting: what acts, in the forwards it is for.
        plans: by host, one each. `together`: all their parts, owners and states, one behind the other; None after a new plan.
    """

    acting: object
    plans: dict[str, Plan] = field(default_factory=dict[str, Plan])
    together: tuple[list[Part], list[dict[str, Any]], State] | None = None

    def note(self, path: str, plan: Plan) -> None:
        self.plans[path], self.together = plan, None

    def changed(self) -> bool:
        """Whether a part or a tensor is not what it was."""
        if self.together is None:
            plans = self.plans.values()
            parts = list(chain.from_iterable(plan.parts for plan in plans))
            owners = list(chain.from_iterable(plan.owners for plan in plans))
            versions, places, training = ([plan.state[which] for plan in plans] for which in range(3))
            self.together = (parts, owners, (_flat(versions), _flat(places), _flat(training)))
        parts, owners, state = self.together
        return _state(parts, owners) != state


def _flat(lists: Iterable[Iterable[Any]]) -> list[Any]:
    return list(chain.from_iterable(lists))


def _state(parts: Iterable[Part], owners: Iterable[dict[str, Any]]) -> State | None:
    """Versions and addresses of tensors, and which parts train; None if that cannot be told."""
    tensors = list(chain.from_iterable(map(dict[str, Any].values, owners)))
    if not set(map(type, tensors)).issubset(_PLAIN):
        return None
    return list(map(_version, tensors)), list(map(Tensor.data_ptr, tensors)), list(map(_training, parts))


class JointSite(LayerSite):
    """What a joint part may ask."""

    def __init__(
        self, joint: Joint, host: nn.Module, state: HostState, call: Call, shape: torch.Size, base: Forward
    ) -> None:
        super().__init__(host, state, call, (), joint.like, None, shape[0], base)
        self._joint, self._shape = joint, shape

    @property
    def role(self) -> str:
        return self._joint.role

    def own(self, u: Tensor) -> Tensor:
        return u * self._joint.mask(u) if self._joint.by_row else u

    def mix(self, u: Tensor, matrix_OK: Tensor) -> Tensor:
        return super().mix(self.own(u), matrix_OK)

    def low_rank(
        self, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float | Tensor = 1.0, dropout: float = 0.0
    ) -> Tensor:
        u = F.linear(x, A_RI)
        if self._joint.by_row:
            u = (u * self._joint.mask(u, scale)).to(x.dtype)
        elif scale != 1.0:
            u.mul_(scale)
        y.view(-1, y.shape[-1]).addmm_(u.view(-1, u.shape[-1]), B_OR.T)
        return y

    def out(self, v_O: Tensor) -> Tensor:
        return _by_row(v_O, self._shape[0], len(self._shape)) if self._joint.by_row else super().out(v_O)

    def inp(self, v_I: Tensor) -> Tensor:
        return _by_row(v_I, self._shape[0], len(self._shape)) if self._joint.by_row else super().inp(v_I)

    def drops(self, x: Tensor, p: float) -> bool:
        return False


def plan_of(host: nn.Module, state: HostState, call: Call, parts: Sequence[Sequence[Part]], x: object) -> Plan:
    """How a host serves a call's rows, or that it must go the ordinary way.

    Args:
        parts: of each of the call's groups.
        x: the host's first input.
    """
    kept: Kept = state.control.joined
    acting = tuple(part for group in parts for part in group if isinstance(part, Part))
    dtype = x.dtype if isinstance(x, Tensor) else None
    joints: list[Joint] = []
    owners: list[dict[str, Any]] = []
    if possible := dtype is not None and _joins(host, state, call, parts, dtype):
        assert dtype is not None
        lone = [group[0] if group else None for group in parts]
        joints = [_joined(host, state, alike, call, dtype) for alike in _alike(lone)]
        possible = all(joint.mask_nH is None or joint.mask_nH.shape[1] <= MOST_UNITS for joint in joints)
        owners = [own for part in acting for own in (part._parameters, part._buffers) if own]
    now = _state(acting, owners)
    assert now is not None
    plan = Plan(
        dtype=dtype,
        parts=acting,
        owners=tuple(owners),
        state=now,
        possible=possible,
        on_weight=tuple(joint for joint in joints if isinstance(joint.part, ShortcutPart)),
        on_output=tuple(joint for joint in joints if isinstance(joint.part, OutputPart)),
    )
    kept.note(state.path, plan)
    return plan


def _joins(host: nn.Module, state: HostState, call: Call, parts: Sequence[Sequence[Part]], dtype: torch.dtype) -> bool:
    """Whether the parts that act here can be one."""
    kind, lone = state.kind, [part for group in parts for part in group]
    if (
        not lone
        or any(len(group) > 1 for group in parts)
        or not all(map(_joinable, lone))
        or any(part.training for part in lone)
        or not dtype.is_floating_point
        or (len(call.groups) > 1 and state.by_row is not True)
    ):
        return False
    on_weight = [part for part in lone if isinstance(part, ShortcutPart)]
    if not on_weight:
        return True
    weight = host._parameters.get("weight")
    return (
        kind is not None
        and kind.multiplies
        and state.known_forward
        and all(part.holds(kind.name) for part in on_weight)
        and (getattr(host, "bias", None) is None or all(part.additive for part in on_weight))
        and (weight is None or weight.dtype == dtype or not weight.is_floating_point())
    )


def serve(
    plan: Plan,
    host: nn.Module,
    state: HostState,
    call: Call,
    base: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    span: Tensor,
) -> Any:
    """What the module returns, all rows at once, each with its own adapter.

    Args:
        span: the input that parts on the output act on.
    """
    if plan.on_weight:
        (x,) = args
        sites = [JointSite(joint, host, state, call, x.shape, base) for joint in plan.on_weight]
        for joint, site in zip(plan.on_weight, sites, strict=True):
            if joint.moves:
                x = joint.part.before(x, site)
        result = base(x)
        for joint, site in zip(plan.on_weight, sites, strict=True):
            result = joint.part.after(x, result, site)
    else:
        result = base(*args, **kwargs)
    if not plan.on_output:
        return result

    def rerun(x: Tensor) -> Tensor:
        again = base(x, *args[1:], **kwargs) if args else base(**{**kwargs, next(iter(kwargs)): x})
        return again[0] if isinstance(again, tuple) else again

    first = result[0] if isinstance(result, tuple) else result
    y = unflattened(first, span)
    for joint in plan.on_output:
        y = joint.part.after(span, y, JointSite(joint, host, state, call, y.shape, rerun))
    y = y.flatten(0, 1) if first.dim() < y.dim() else y
    return (y, *result[1:]) if isinstance(result, tuple) else y


def refresh(control: Control, one_token: bool) -> Call | None:
    """Drop what was joined if it is not for this forward, or a tensor has changed since. Called ahead of every forward of the model.

    Args:
        one_token: whether the forward is of one position, a step of generation.

    Returns:
        The call that hosts may serve by what is kept; None if they may not.
    """
    call, kept = control.call, control.joined
    if len(call.groups) == 1 and not one_token:
        control.joined = None
        return None
    acting = (call.active, call.rows, control.merged)
    if kept is None or kept.acting != acting or kept.changed():
        control.joined = Kept(acting=acting)
    return call


def _tensors(part: Part) -> dict[str, Tensor]:
    found = {**part._parameters, **part._buffers}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _options(part: Part) -> dict[str, Any]:
    """What is neither a tensor nor among what a part can have of its own in a joint one."""
    own = set(part.stacks or ())
    return {name: value for name, value in vars(part).items() if name[0] != "_" and name not in own}


def _joinable(part: Part) -> bool:
    return (
        isinstance(part, ShortcutPart | OutputPart)
        and part.stacks is not None
        and not part._modules
        and {*part._parameters, *part._buffers} == set(tensors := _tensors(part)) <= set(part.stacks)
        and not any(type(t) not in _PLAIN or t.is_meta or t.is_inference() for t in tensors.values())
    )


def _alike(lone: Sequence[Part | None]) -> Iterator[list[Part | None]]:
    """The parts of each class and set of options, in the places of their groups."""
    left = list(lone)
    while (first := next((part for part in left if part is not None), None)) is not None:
        same = [
            part if part is not None and type(part) is type(first) and _options(part) == _options(first) else None
            for part in left
        ]
        left = [None if mine is not None else part for part, mine in zip(left, same, strict=True)]
        yield same


def _joined(host: nn.Module, state: HostState, alike: Sequence[Part | None], call: Call, dtype: torch.dtype) -> Joint:
    """One part for all; `alike` gives each group's."""
    parts = [part for part in alike if part is not None]
    like = parts[0]
    by_row = len(call.groups) > 1
    made: dict[str, Any] = dict(_options(like))
    mask_nH = None
    if by_row:
        beside, mask_nH = _beside(parts, _part_of_row(alike, parts, call), dtype)
        made |= beside
    else:
        stacks = cast(Mapping[str, int | None], like.stacks)
        made |= {name: _used(tensor.detach(), stacks[name], dtype) for name, tensor in _tensors(like).items()}
        made |= {name: value for name in set(stacks) - set(made) if (value := getattr(like, name, None)) is not None}
    part = object.__new__(type(like))
    nn.Module.__init__(part)
    vars(part).update(made)
    return Joint(
        part=part,
        like=like,
        role=state.roles.get(name_of(host, like), "weight"),
        moves=isinstance(like, ShortcutPart) and type(like).before is not ShortcutPart.before,
        by_row=by_row,
        mask_nH=mask_nH,
    )


def _part_of_row(alike: Sequence[Part | None], parts: Sequence[Part], call: Call) -> Tensor:
    """(n,) the index of each row's part; that of a row without any is one more than the last."""
    assert call.rows is not None
    place = {id(part): index for index, part in enumerate(parts)}
    of_row = torch.full((len(call.rows),), len(parts))
    for group, part in zip(call.groups, alike, strict=True):
        if part is not None and group.rows is not None:
            of_row[list(group.rows)] = place[id(part)]
    return of_row


def _beside(parts: Sequence[Part], of_row: Tensor, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor | None]:
    """The tensors of these parts side by side, or row by row; and the mask of hidden units."""
    like = parts[0]
    stacks = cast(Mapping[str, int | None], like.stacks)
    device = next(iter(_tensors(like).values())).device
    made: dict[str, Any] = {}
    units: list[int] = []
    for name, tensor in _tensors(like).items():
        dim, each = stacks[name], [_tensors(part)[name].detach() for part in parts]
        if dim is None:
            neutral = torch.full_like(tensor, like.neutral)
            made[name] = torch.stack([*each, neutral])[of_row.to(tensor.device)].to(dtype)
        else:
            units = [one.shape[dim] for one in each]
            made[name] = _used(torch.cat(each, dim), dim, dtype)
    for name in set(stacks) - set(_tensors(like)):
        if isinstance(getattr(like, name, None), int | float):
            pieces = [
                torch.full((count,), float(getattr(part, name))) for part, count in zip(parts, units, strict=True)
            ]
            made[name] = torch.cat(pieces).to(device)
    if not units:
        return made, None
    unit_H = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(units))
    return made, (of_row[:, None] == unit_H[None]).to(device=device, dtype=dtype)


def _used(tensor: Tensor, dim: int | None, dtype: torch.dtype) -> Tensor:
    """A tensor in the dtype of use; a copy lies unit by unit, as products with bfloat16 want it (8 times as fast where the processor has none)."""
    if tensor.dtype == dtype:
        return tensor
    used = tensor.to(dtype)
    return used if dim is None else used.movedim(dim, 0).contiguous().movedim(0, dim)


def _by_row(values_nX: Tensor, size: int, dims: int) -> Tensor:
    """(B, 1, ..., X): a row's values for each of its entries."""
    if values_nX.shape[0] != size:
        values_nX = values_nX.repeat_interleave(size // values_nX.shape[0], 0)
    return values_nX.view(size, *[1] * (dims - 2), -1)
