"""How several parts on one module compose: one definition for the general path, for merging, and for what a chained part finds below it.

First all that `add`, each on the original W: `W + sum(weight_i(W) - W)`. Then those that `chain`, in activation order. A lone part's result is
taken as it is, so that no rounding comes in by subtracting W and adding it again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ingraft.adapt.stacked import Read, reads
from ingraft.adapt.weights import Kind, kind_of
from ingraft.methods.contract import ParameterPart, WeightPart

Values = Mapping[str, Tensor | None]


def own_parameters(module: nn.Module) -> dict[str, Tensor | None]:
    """The parameters registered on the module itself, absent biases included, a packed weight in numbers; and those of children that it
    reads."""
    own: dict[str, Tensor | None] = dict(module._parameters)
    kind = kind_of(module) if "weight" in own else None
    if kind is not None and kind.dense_class is not None:
        own["weight"] = kind.weight_of(module)
    for child in reads(module):
        own |= {f"{child}.{name}": value for name, value in own_parameters(module.get_submodule(child)).items()}
    return own


def composed(
    kind: Kind | None, parts: Sequence[WeightPart | ParameterPart | Read], parameters: Values
) -> dict[str, Tensor | None]:
    """The module's parameters as these parts together want them, stored layout, the base's dtype; only those that change.

    This is the one place that says how several adapters compose. Merge writes what it returns.
    """
    adds = [part for part in parts if part.composition == "add"]
    chains = [part for part in parts if part.composition == "chain"]
    values: dict[str, Tensor | None] = dict(parameters)
    if len(adds) == 1:
        values = _changed(kind, adds[0], parameters)
    elif adds:
        results = [_changed(kind, part, parameters) for part in adds]
        values = {name: _sum_of_changes(old, [result[name] for result in results]) for name, old in parameters.items()}
    for part in chains:
        values = _changed(kind, part, values)
    changed: dict[str, Tensor | None] = {}
    for name, value in values.items():
        old = parameters[name]
        if value is not old:
            changed[name] = value if value is None or old is None else value.to(old.dtype)
    return changed


def _changed(
    kind: Kind | None, part: WeightPart | ParameterPart | Read, parameters: Values
) -> dict[str, Tensor | None]:
    """The parameters as one part wants them."""
    if isinstance(part, Read):
        made = composed(kind_of(part.layer), part.parts, own_parameters(part.layer))
        return {**parameters, **{f"{part.name}.{name}": value for name, value in made.items()}}
    if isinstance(part, ParameterPart):
        return {**parameters, **part.values({name: value for name, value in parameters.items() if value is not None})}
    stored = parameters["weight"]
    assert kind is not None and stored is not None
    dense = kind.dense(stored)
    W, b = part.weight(dense, parameters.get("bias"))
    changed = {**parameters}
    if W is not dense:
        changed["weight"] = kind.stored(W, stored.shape)
    if b is not None or "bias" in parameters:
        changed["bias"] = b
    return changed


def _sum_of_changes(old: Tensor | None, results: Sequence[Tensor | None]) -> Tensor | None:
    """old + sum(new - old), in float32; `old` itself where nothing changed it."""
    news = [new for new in results if new is not None and new is not old]
    if not news:
        return old
    if len(news) == 1:
        return news[0]
    start = torch.zeros_like(news[0], dtype=torch.float32) if old is None else old.float()
    total = start
    for new in news:
        total = total + (new.float() - start)
    return total.to(news[0].dtype)
