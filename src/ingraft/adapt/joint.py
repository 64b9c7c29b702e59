"""Rows with different adapters of one kind, served together: one part that holds the tensors of all of them.

Row by row, sixteen adapters cost sixteen times a handful of small operations at every layer, and a decode step has nothing but small operations:
eight times the base's time went into them. So where every row has at most one part at a host, the parts of one class and one set of options become
one. Tensors that run over hidden units (a rank, a bottleneck) are put side by side along these, and a mask leaves each row its own; tensors
that do not are given row by row. The part's own code then runs once over the whole batch, and the site it asks applies mask and rows. A part
says which of its tensors are of which kind (`Part.stacks`); one that does not is served group by group as ever.

All adapters' hidden units are computed for every row. That is work thrown away, and cheap: 16 x 8 of them are a fifth of a layer of width 576. Above
`MOST_UNITS` the groups are served one by one again.

What was joined is kept from one forward to the next, without gradients only. It is made anew when rows, adapters, or any tensor change: before
every forward the versions and addresses of the tensors are summed up.

Legend: B entries of dimension 0, n rows, H hidden units of all adapters together, O out, I in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.adapt.control import Control, HostState
from ingraft.adapt.rows import Call, unflattened
from ingraft.adapt.site import LayerSite
from ingraft.adapt.swap import Forward
from ingraft.methods.contract import OutputPart, Part, ShortcutPart

MOST_UNITS = 512


@dataclass(frozen=True, kw_only=True, eq=False)
class Joint:
    """Several adapters' parts at one host, as one.

    Attributes:
        part: of their class, its tensors theirs; like: one of them.
        mask_nH: 1 where a hidden unit is the row's own; None if there are none.
    """

    part: Any
    like: Part
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
    """What a host does for one assignment of rows.

    Attributes:
        parts: those that act; training: whether one of them is in training mode, in which dropout is each adapter's own.
        possible: False where rows must be served group by group.
    """

    call: Call
    merged: tuple[str, ...]
    generation: int
    dtype: torch.dtype
    parts: tuple[Part, ...]
    training: bool
    possible: bool = False
    on_weight: tuple[Joint, ...] = ()
    on_output: tuple[Joint, ...] = ()

    def summed(self) -> int:
        """A number that changes when a tensor of the parts does, or is replaced."""
        tensors = [
            t for part in self.parts for own in (part._parameters, part._buffers) for t in own.values() if t is not None
        ]
        return sum(tensor._version for tensor in tensors) + sum(map(torch.Tensor.data_ptr, tensors))


class JointSite(LayerSite):
    """What a joint part may ask."""

    def __init__(
        self, joint: Joint, host: nn.Module, state: HostState, call: Call, shape: torch.Size, base: Forward
    ) -> None:
        super().__init__(host, state, call, [], joint.like, None, shape[0], base)
        self._joint, self._shape = joint, shape

    def own(self, u: Tensor) -> Tensor:
        return u * self._joint.mask(u)

    def mix(self, u: Tensor, matrix_OK: Tensor) -> Tensor:
        return super().mix(self.own(u), matrix_OK)

    def low_rank(
        self, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float | Tensor = 1.0, dropout: float = 0.0
    ) -> Tensor:
        u = F.linear(x, A_RI)
        u = (u * self._joint.mask(u, scale)).to(x.dtype)
        return y.view(-1, y.shape[-1]).addmm_(u.view(-1, u.shape[-1]), B_OR.T).view(y.shape)

    def out(self, v_O: Tensor) -> Tensor:
        return _by_row(v_O, self._shape[0], len(self._shape))

    def inp(self, v_I: Tensor) -> Tensor:
        return _by_row(v_I, self._shape[0], len(self._shape))

    def drops(self, x: Tensor, p: float) -> bool:
        return False


def plan_of(host: nn.Module, state: HostState, call: Call, parts: Sequence[Sequence[Part]], x: Tensor) -> Plan:
    """How a host serves these rows.

    Args:
        parts: of each of the call's groups.
    """
    control = state.control
    kind, rows = state.kind, call.rows
    lone = [group[0] if group else None for group in parts]
    acting = tuple(part for part in lone if part is not None)
    training = any(part.training for part in acting)
    facts: dict[str, Any] = {"call": call, "merged": control.merged, "generation": control.generation, "dtype": x.dtype}
    facts |= {"parts": acting, "training": training}
    if (
        rows is None
        or training
        or any(len(group) > 1 for group in parts)
        or not x.is_floating_point()
        or state.by_row is not True
        or not all(map(_joinable, acting))
    ):
        return Plan(**facts)
    on_weight = [part for part in lone if isinstance(part, ShortcutPart)]
    if on_weight and (
        kind is None
        or not (kind.multiplies and state.known_forward and all(part.holds(kind.name) for part in on_weight))
        or (getattr(host, "bias", None) is not None and not all(part.additive for part in on_weight))
        or (
            (weight := host._parameters.get("weight")) is not None
            and weight.dtype != x.dtype
            and weight.is_floating_point()
        )
    ):
        return Plan(**facts)
    joints = [_joined(alike, call, x.dtype) for alike in _alike(lone)]
    if any(joint.mask_nH is not None and joint.mask_nH.shape[1] > MOST_UNITS for joint in joints):
        return Plan(**facts)
    plan = Plan(
        **facts,
        possible=True,
        on_weight=tuple(joint for joint in joints if isinstance(joint.part, ShortcutPart)),
        on_output=tuple(joint for joint in joints if isinstance(joint.part, OutputPart)),
    )
    control.joined[state.path] = plan, plan.summed()  # in place of the one for other rows
    return plan


def fits(plan: Plan | None, control: Control, call: Call, x: object) -> bool:
    """Whether a plan is for this call, and its tensors are what they were."""
    return (
        plan is not None
        and plan.generation == control.generation
        and (plan.call is call or plan.call.rows == call.rows)
        and plan.merged == control.merged
        and isinstance(x, Tensor)
        and x.dtype == plan.dtype
        and any(part.training for part in plan.parts) == plan.training
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
        for joint in plan.on_weight:
            x = joint.part.before(x, JointSite(joint, host, state, call, x.shape, base))
        result = base(x)
        for joint in plan.on_weight:
            result = joint.part.after(x, result, JointSite(joint, host, state, call, result.shape, base))
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


def refresh(control: Control) -> None:
    """Drop what was joined if a tensor has changed since. Called ahead of every forward."""
    if any(plan.summed() != total for plan, total in control.joined.values()):
        forget(control)


def forget(control: Control) -> None:
    """Drop what was joined."""
    control.generation += 1
    control.joined = {}


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
        and set(_tensors(part)) <= set(part.stacks)
        and not any(tensor.is_meta for tensor in _tensors(part).values())
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


def _joined(alike: Sequence[Part | None], call: Call, dtype: torch.dtype) -> Joint:
    """One part for all; `alike` gives each group's."""
    assert call.rows is not None
    parts = [part for part in alike if part is not None]
    place = {id(part): index for index, part in enumerate(parts)}
    of_row = torch.full((len(call.rows),), len(parts))  # the last entry is that of rows without any
    for group, part in zip(call.groups, alike, strict=True):
        if part is not None and group.rows is not None:
            of_row[list(group.rows)] = place[id(part)]
    like = parts[0]
    stacks = cast(Mapping[str, int | None], like.stacks)
    made: dict[str, Any] = dict(_options(like))
    units: list[int] = []
    for name, tensor in _tensors(like).items():
        dim, each = stacks[name], [_tensors(part)[name].detach() for part in parts]
        if dim is None:
            neutral = torch.full_like(tensor, like.neutral)
            made[name] = torch.stack([*each, neutral])[of_row.to(tensor.device)].to(dtype)
        else:
            units = [one.shape[dim] for one in each]
            made[name] = torch.cat(each, dim).to(dtype)
    device = next(iter(_tensors(like).values())).device
    for name in set(stacks) - set(_tensors(like)):
        if isinstance(getattr(like, name, None), int | float):
            pieces = [
                torch.full((count,), float(getattr(part, name))) for part, count in zip(parts, units, strict=True)
            ]
            made[name] = torch.cat(pieces).to(device)
    mask_nH = None
    if units:
        unit_H = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(units))
        mask_nH = (of_row[:, None] == unit_H[None]).to(device=device, dtype=dtype)
    part = object.__new__(type(like))
    nn.Module.__init__(part)
    vars(part).update(made)
    return Joint(part=part, like=like, mask_nH=mask_nH)


def _by_row(values_nX: Tensor, size: int, dims: int) -> Tensor:
    """(B, 1, ..., X): a row's values for each of its entries."""
    if values_nX.shape[0] != size:
        values_nX = values_nX.repeat_interleave(size // values_nX.shape[0], 0)
    return values_nX.view(size, *[1] * (dims - 2), -1)
