"""What a trainer does for methods that want more than gradients: their own rates, a penalty, a word after each step, a look at the data.

Ingraft's own loop calls these. A foreign trainer needs `after_step` behind its optimiser step (transformers' Trainer: `AdapterCallback`), an
optimiser over `param_groups` where a method has several rates, and `prepare` ahead of it where one starts from data; a transformers
model adds the penalty to its loss by itself (`hf.ModelRoot`). A method that wants none of it costs one look at its record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.building import draw_from, parameters
from ingraft.adapt.control import Adapter, Control, host_state, part_of, require_control
from ingraft.adapt.lifecycle import disabled
from ingraft.adapt.site import site_of
from ingraft.adapt.stacked import each_alone
from ingraft.errors import IngraftError
from ingraft.methods.contract import Moment, ObservingPart, Part


def parts_of(model: nn.Module, adapter: Adapter) -> dict[str, Part]:
    """An adapter's own parts by path, those of modules trained in full left out."""
    paths = [path for path in adapter.sites if path not in adapter.beside]
    found = {path: part_of(model.get_submodule(path), adapter.name) for path in paths}
    return each_alone({path: part for path, part in found.items() if part is not None})


def rate(model: nn.Module, name: str, tensor: str) -> float:
    """Factor on the learning rate of one of an adapter's tensors, named as in `parameters`."""
    adapter = require_control(model).require(name)
    return 1.0 if adapter.method.rates is None else adapter.method.rates(adapter.config, tensor.rpartition(".")[2])


def grouped(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, factor: Callable[[str], float]
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices are pulled to zero, biases, norms and scales are not, and each has its factor on the rate."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in sorted(parameters.items(), key=lambda item: item[1].dim() <= 1):
        groups.setdefault((weight_decay if parameter.dim() > 1 else 0.0, factor(name)), []).append(parameter)
    return [{"params": own, "weight_decay": decay, "factor": f} for (decay, f), own in groups.items()]


def param_groups(
    model: nn.Module, learning_rate: float, *names: str, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The trainable tensors of adapters as groups for an optimiser of your own, for methods with several learning rates.

    Args:
        learning_rate: of most tensors; a method's factors are on top of it.
        names: of the adapters; those that act if none is given.
    """
    control = require_control(model)
    found: list[dict[str, Any]] = []
    for name in names or [adapter.name for adapter in acting(control)]:
        own = {tensor: p for tensor, p in parameters(model, name).items() if p.requires_grad}
        for group in grouped(own, weight_decay, partial(rate, model, name)):
            factor = group.pop("factor")
            found.append({**group, "lr": learning_rate * factor})
    return found


def penalty(model: nn.Module) -> Tensor | None:
    """What the adapters that act and train add to the loss; None if they add nothing."""
    control = require_control(model)
    terms: list[Tensor] = []
    for adapter in acting(control):
        if adapter.method.penalty is None:
            continue
        parts = parts_of(model, adapter)
        if any(p.requires_grad for part in parts.values() for p in part.parameters()):
            terms.append(adapter.method.penalty(adapter.config, parts))
    return torch.stack(terms).sum() if terms else None


def acting(control: Control) -> list[Adapter]:
    """The adapters that act on some row."""
    names = dict.fromkeys(name for group in control.call.groups for name in group.names)
    return [control.adapters[name] for name in names]


@torch.no_grad()
def after_step(model: nn.Module, step: int, total: int = 0, *names: str) -> None:
    """Let methods act on their adapters behind an optimiser step, while the gradients are still there.

    Args:
        step: how many optimiser steps are made; total: how many there will be.
        names: of the adapters that made the step; those that act if none is given.
    """
    control = require_control(model)
    chosen = [control.require(name) for name in names] or acting(control)
    for adapter in chosen:
        if adapter.method.update is not None:
            adapter.method.update(adapter.config, parts_of(model, adapter), Moment(step=step, total=total))


def wants_data(model: nn.Module, name: str) -> bool:
    """Whether the adapter's method starts from data."""
    return require_control(model).require(name).method.prepare is not None


@torch.no_grad()
def prepare(model: nn.Module, name: str, batches: Iterable[Mapping[str, Any]]) -> None:
    """Start an adapter from data: the base runs over the batches, the adapter's parts see their layers' inputs.

    Args:
        batches: keyword arguments of the model's forward. Padding is told by `attention_mask`, (rows, tokens), where there is one.

    Raises:
        IngraftError: the method does not start from data, or there are no batches.
    """
    control = require_control(model)
    adapter = control.require(name)
    if adapter.method.prepare is None:
        raise IngraftError(f"prepare: {adapter.method.name} does not start from data.")
    parts = parts_of(model, adapter)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    seen = 0
    try:
        with disabled(model), torch.random.fork_rng(devices=[]):
            draw_from(adapter.seed)
            for batch in batches:
                with _watching(model, parts, batch.get("attention_mask")):
                    model(**batch)
                seen += 1
    finally:
        for module, mode in modes.items():
            module.training = mode
    if not seen:
        raise IngraftError(f"prepare: {adapter.method.name} needs at least one batch of data to start from.")
    adapter.config = adapter.method.prepare(adapter.config, parts)


@contextmanager
def _watching(model: nn.Module, parts: Mapping[str, Part], mask: Tensor | None) -> Iterator[None]:
    """Inside the block, every part is shown what its layer gets."""
    handles = [model.get_submodule(path).register_forward_pre_hook(_shows(part, mask)) for path, part in parts.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shows(part: Part, mask: Tensor | None) -> Callable[..., None]:
    assert isinstance(part, ObservingPart)

    def show(module: nn.Module, args: tuple[Any, ...]) -> None:
        x: Tensor = args[0]
        if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
            x = x[mask.bool()]
        state = host_state(module)
        assert state is not None
        part.observe(
            x.reshape(-1, x.shape[-1]) if x.is_floating_point() and x.dim() > 1 else x, site_of(module, state, part)
        )

    return show
