"""Running a model without changing it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from ingraft.adapt.control import control_of


@contextmanager
def scoring(model: nn.Module) -> Iterator[None]:
    """Inside the block the model is in evaluation mode, adapters too, and builds no graph; modes are put back as they were."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextmanager
def unnoticed(model: nn.Module) -> Iterator[None]:
    """`scoring` that leaves no trace even in the step that dropout is a function of, which a forward pass may move on."""
    control = control_of(model)
    before = control.call if control is not None else None
    try:
        with scoring(model):
            yield
    finally:
        if control is not None and before is not None:
            control.call = before
