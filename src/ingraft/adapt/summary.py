"""What is attached to a model, as a table."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, nn

from ingraft.adapt.building import base_parameters, parameters
from ingraft.adapt.control import Control, control_of
from ingraft.adapt.select import base_modules
from ingraft.adapt.weights import kind_of


@dataclass(frozen=True, kw_only=True)
class AdapterStatus:
    """One adapter in a `Status`."""

    name: str
    method: str
    sites: int
    parameters: int
    active: bool
    trainable: bool
    merged: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is attached to a model. `str()` prints a table."""

    adapters: tuple[AdapterStatus, ...]
    trainable: int
    total: int

    def __str__(self) -> str:
        head = f"{self.trainable:,} of {self.total:,} parameters are trainable ({100 * self.trainable / max(self.total, 1):.4f} %)"
        lines = [
            f"  {a.name:<16} {a.method:<12} {a.sites:>4} sites {a.parameters:>12,} parameters"
            + "".join(
                f"  {word}"
                for word, on in (("active", a.active), ("trainable", a.trainable), ("merged", a.merged))
                if on
            )
            for a in self.adapters
        ]
        return "\n".join([head, *lines])


def status(model: nn.Module) -> Status:
    """Adapters, which act, which are merged, and how many parameters train. Works on a bare model too."""
    control = control_of(model) or Control()
    base = {id(p): p for p in base_parameters(model).values()}
    added: dict[int, Tensor] = {}
    adapters: list[AdapterStatus] = []
    trained: dict[int, Tensor] = {i: p for i, p in base.items() if p.requires_grad}
    for name, adapter in control.adapters.items():
        own = parameters(model, name)
        added.update({id(p): p for p in own.values()})
        trained.update({id(p): p for p in own.values() if p.requires_grad})
        adapters.append(
            AdapterStatus(
                name=name,
                method=adapter.method.name,
                sites=len(adapter.sites),
                parameters=sum(p.numel() for p in own.values()),
                active=name in control.call.active or any(name in row for row in control.call.rows or ()),
                trainable=any(p.requires_grad for p in own.values()),
                merged=name in control.merged,
            )
        )
    return Status(
        adapters=tuple(adapters),
        trainable=sum(p.numel() for p in trained.values()),
        total=base_size(model) + sum(p.numel() for p in added.values()),
    )


def base_size(model: nn.Module) -> int:
    """How many numbers the base's parameters hold: tied ones once, a packed weight's as many as it unpacks to."""
    sizes: dict[int, int] = {}
    for module in base_modules(model).values():
        kind = kind_of(module)
        packed = kind is not None and kind.dense_class_of(module) is not None
        for name, p in module._parameters.items():
            if p is not None:
                sizes[id(p)] = math.prod(kind.shape_of(module)) if packed and name == "weight" and kind else p.numel()
    return sum(sizes.values())
