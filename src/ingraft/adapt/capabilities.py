"""What a method can do, told by its record and its part's class: nothing here is written down twice.

Layer kinds are found by asking: a weight method is shown an ordinary layer of each kind, and `Method.refuses` answers as it would at attach.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ingraft.adapt.weights import KINDS, Kind
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import (
    AttentionPart,
    InputPart,
    Method,
    OutputPart,
    ParameterPart,
    ShortcutPart,
    SiteFacts,
    WeightPart,
)


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method can do.

    Attributes:
        layers: the kinds of layer it adapts, or the place in a transformer where it acts.
        mergeable: whether it can be written into the base's weights.
        quantised: whether it trains over a base whose weights are kept in packed blocks.
        mixed_rows: how a batch whose rows belong to different adapters runs: "one base call", or "a base call a group".
    """

    layers: tuple[str, ...]
    mergeable: bool
    quantised: bool
    mixed_rows: str


def capabilities(name: str) -> Capabilities:
    """What a method can do. Imports the method's file.

    Raises:
        IngraftError: there is no such method.
    """
    method = registry.load(name)
    part = method.part
    in_place = issubclass(part, OutputPart | AttentionPart | InputPart | ShortcutPart)
    return Capabilities(
        layers=_layers(method),
        mergeable=method.mergeable,
        quantised=not issubclass(part, ParameterPart),
        mixed_rows="one base call" if in_place else "a base call a group",
    )


def _layers(method: Method) -> tuple[str, ...]:
    places = {OutputPart: "blocks", AttentionPart: "attention", InputPart: "input", ParameterPart: "any"}
    for part, place in places.items():
        if issubclass(method.part, part):
            return (place,)
    assert issubclass(method.part, WeightPart)
    return tuple(dict.fromkeys(kind.name for kind in KINDS if _adapts(method, kind)))


def _adapts(method: Method, kind: Kind) -> bool:
    """Whether the method, with its default options, takes an ordinary layer of this kind."""
    layer = _layer(kind)
    if layer is None:
        return False
    W = kind.dense(layer.weight)  # type: ignore[arg-type]
    part = method.part
    if not kind.matrix and issubclass(part, WeightPart) and part.needs_matrix:
        return False
    facts = SiteFacts(path="layer", role="weight", module=layer, kind=kind.name, shape=tuple(W.shape))
    try:
        return method.refuses(method.config().at("layer"), facts) is None
    except IngraftError:
        return False


def _layer(kind: Kind) -> nn.Module | None:
    """An ordinary layer that this kind, and none before it, claims; no memory is used for it."""
    with torch.device("meta"):
        layers: list[nn.Module] = [
            nn.Linear(512, 512),
            nn.Embedding(512, 512),
            nn.Conv1d(64, 64, 3),
            nn.Conv2d(64, 64, 3),
            nn.Conv3d(64, 64, 3),
            nn.LayerNorm(512),
        ]
        from transformers.pytorch_utils import Conv1D

        layers.append(Conv1D(512, 512))
    return next((layer for layer in layers if next((k for k in KINDS if k.claims(layer)), None) is kind), None)
