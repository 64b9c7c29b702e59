"""What a method can do, found by trying: nothing here is written down twice.

Each kind of layer, and a small model with its weights kept in packed blocks, is given the method as `attach` gives it, with default options; what is
refused there is refused here. The layers are small but as wide as the default block sizes want, and are made anew for each trial.

A method over others (`Method.over`) is tried on a pair of adapters of each sort that it could find: of low rank, and of the first method of the catalogue
that adds to what a module returns.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from itertools import islice
from typing import Any, cast

import torch
from torch import nn

from ingraft.adapt.building import own_sizes
from ingraft.adapt.control import control_of, part_of
from ingraft.adapt.lifecycle import attach, detach
from ingraft.adapt.select import all_linear, base_modules, select
from ingraft.adapt.weights import KINDS, kind_of
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import (
    AddingPart,
    AttentionPart,
    InputPart,
    Method,
    MethodConfig,
    OutputPart,
    ParameterPart,
    Part,
    ShortcutPart,
    WeightPart,
)
from ingraft.quant.formats import FILE_FORMATS, QUANTISERS
from ingraft.quant.layers import QuantizedEmbedding, QuantizedLinear, quantised

ATTENTION, STACK = "multihead-attention", "experts"
OWN_CODE = (ATTENTION, STACK)
"""Modules that apply matrices in code of their own: `nn.MultiheadAttention`, and stacks named in `target_parameters`. A method on weights has only its
definition there."""

PACKED_ONLY = "quantised linear"
"""A linear layer whose weight was packed while it was loaded, for methods that need one."""

PLACES: dict[type[Part], str] = {OutputPart: "blocks", AttentionPart: "attention", InputPart: "input"}
"""Where in a transformer a part acts that is no change of a layer's weight."""

WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a method can do.

    Attributes:
        layers: the place in a transformer where it acts and the kinds of layer it adapts; "any" if it takes all.
        one_call: those of `layers` at which a batch whose rows belong to different adapters takes one base call. A layer whose class has a forward of its
            own (a scaled embedding) counts as `OWN_CODE`.
        mergeable: whether it can be written into the base's weights.
        quantised: whether it trains, at its default sites, over a base whose linear layers are kept in packed blocks (nf4, int8).
        kept: the same over a GGUF file's own blocks, which hold the embedding and the head as well and have no original.
    """

    layers: tuple[str, ...]
    one_call: tuple[str, ...]
    mergeable: bool
    quantised: bool
    kept: bool

    @property
    def mixed_rows(self) -> str:
        """How such a batch runs, in words."""
        if not self.one_call:
            return "a base call a group"
        if self.one_call == self.layers:
            return "one base call"
        return f"one base call at {', '.join(self.one_call)}; a base call a group elsewhere"


@functools.cache
def capabilities(name: str) -> Capabilities:
    """What a method can do. Imports the method's file and tries it.

    Raises:
        IngraftError: there is no such method.
    """
    method = registry.load(name)
    with torch.random.fork_rng(devices=[]):
        layers, one_call = _layers(method)
        return Capabilities(
            layers=layers,
            one_call=one_call,
            mergeable=method.mergeable,
            quantised=_taken(method, _packed_model(kept=False)),
            kept=_taken(method, _packed_model(kept=True)),
        )


# ------------------------------------------------------------------------------------------------------------------- kinds of layer


class _Around(nn.Module):
    """A model of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


class _Experts(nn.Module):
    """Matrices stacked in one tensor, as a mixture of experts keeps them."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH))


def _layers(method: Method) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """`Capabilities.layers` and `one_call`."""
    places = tuple(word for part, word in PLACES.items() if issubclass(method.part, part))
    if issubclass(method.part, AttentionPart | InputPart):
        return places, places
    tried = {name: _tried(method, make) for name, make in _kinds().items() if name != STACK or not places}
    if not any(tried.values()):
        tried = {PACKED_ONLY: _tried(method, lambda: _packed(nn.Linear(WIDTH, WIDTH), kept=False))}
    found = tuple(name for name, calls in tried.items() if calls is not None)
    if issubclass(method.part, ParameterPart):
        return (("any",) if len(found) == len(tried) else found), ()
    return (*places, *found), (*places, *(name for name in found if tried[name] == 1))


def _kinds() -> Mapping[str, Callable[[], nn.Module]]:
    """An ordinary layer of each kind that is not packed, with a bias where it can have one."""
    from transformers.pytorch_utils import Conv1D

    makers: tuple[Callable[[], nn.Module], ...] = (
        lambda: nn.Linear(WIDTH, WIDTH),
        lambda: Conv1D(WIDTH, WIDTH),
        lambda: nn.Embedding(WIDTH, WIDTH),
        lambda: nn.Conv1d(64, 64, 3),
        lambda: nn.Conv2d(64, 64, 3),
        lambda: nn.Conv3d(64, 64, 3),
        lambda: nn.LayerNorm(WIDTH),
    )
    made = {kind.name: make for make in makers if (kind := kind_of(make())) is not None}
    assert set(made) == {kind.name for kind in KINDS}, "an ordinary layer for every kind"
    return made | {ATTENTION: lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True), STACK: _Experts}


def _tried(method: Method, make: Callable[[], nn.Module]) -> int | None:
    """How many base calls two groups of rows take at such a layer, 1 or 2; None if the method refuses it."""
    model = _Around(make())
    stacked = isinstance(model.layer, _Experts) and issubclass(method.part, WeightPart)
    where: dict[str, Any] = (
        {"target_modules": (), "target_parameters": ("layer.stack",)} if stacked else {"target_modules": ("layer",)}
    )
    if method.over is not None:
        return 1 if any(_over(method, _Around(make()), member, where) for member in _members()) else None
    try:
        attach(model, _config(method, **where), "tried", seed=0)
    except IngraftError:
        return None
    part, kind = part_of(model.layer, "tried"), kind_of(model.layer)
    if isinstance(part, OutputPart):
        return 1
    return 1 if isinstance(part, ShortcutPart) and kind is not None and part.holds(kind.name) else 2


def _config(method: Method, **where: Any) -> MethodConfig:
    """Default options; an option that lists numbers, and none by default, gets one, since nothing would be trained."""
    hints = typing.get_type_hints(method.config)
    own = [
        field.name for field in fields(method.config) if field.default == () and hints[field.name] == tuple[int, ...]
    ]
    return method.config(**dict.fromkeys(own, (0,)), **where)


def _members() -> Iterator[Method]:
    """Methods whose adapters another could act on, one of each sort."""
    known = (registry.load(name) for name in registry.records())
    yield registry.load(registry.LOW_RANK)
    yield from islice((one for one in known if issubclass(one.part, AddingPart) and one.over is None), 1)


def _over(method: Method, model: nn.Module, member: Method, where: dict[str, Any]) -> bool:
    """Whether a method over adapters could act on two of this sort."""
    if control_of(model) is not None:
        detach(model)
    names = ("first", "second")
    probe = replace(method, over=lambda config: names)
    config = method.config()
    try:
        for name in names:
            attach(model, _config(member, **where), name, seed=0)
        sites, _, _ = select(model, config, probe)
        own_sizes(model, probe, config, sites)
    except IngraftError:
        return False
    return True


# ------------------------------------------------------------------------------------------------------------------- packed bases


def _taken(method: Method, model: nn.Module) -> bool:
    """Whether a model takes the method at its default sites. It is left as it was."""
    try:
        if method.over is not None:
            return any(_over(method, model, member, {}) for member in _members())
        attach(model, _config(method), "tried", seed=0)
    except IngraftError:
        return False
    finally:
        if control_of(model) is not None:
            detach(model)
    return True


@functools.cache
def _packed_model(*, kept: bool) -> nn.Module:
    """A small language model with biases, packed as loading packs it: its linear layers but the head, or all matrices of a GGUF."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        vocab_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_bias=True,
        mlp_bias=True,
    )
    model = LlamaForCausalLM(config)
    for path in all_linear(model, base_modules(model)) + (["lm_head"] if kept else []):
        model.set_submodule(path, _packed(cast(nn.Linear, model.get_submodule(path)), kept=kept))
    if kept:
        made = QuantizedEmbedding(next(iter(FILE_FORMATS.values())), model.model.embed_tokens)
        made.weight.data.zero_()
        model.set_submodule("model.embed_tokens", made)
    return model


def _packed(layer: nn.Linear, *, kept: bool) -> QuantizedLinear:
    """A layer as loading packs it: its original at hand, unless the blocks are the original."""
    made = quantised(layer, next(iter(QUANTISERS.values())))
    assert made.origin is not None
    original = layer.weight.detach()
    made.origin = replace(made.origin, read=None if kept else lambda: original)
    return made
