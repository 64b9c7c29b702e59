"""Roles that adapters play for each other over one base in memory.

The *policy* is the adapter that acts and is trained. The *reference* is what it was at first: a frozen adapter of that name, or the bare base where
training started from none. "All adapters off" is the wrong reference as soon as a supervised adapter was the start (TRL issue 495), because
the policy would then be pulled back over the way that supervised training had gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ingraft import adapt
from ingraft.adapt.control import control_of
from ingraft.adapt.lifecycle import acting_kept

REFERENCE = "reference"
"""The adapter's name in the model, and its folder in a run's."""


@contextmanager
def as_base(model: nn.Module) -> Iterator[None]:
    """Inside the block the model answers as if it had no adapters."""
    if control_of(model) is None:
        yield
    else:
        with adapt.disabled(model):
            yield


@contextmanager
def as_reference(model: nn.Module) -> Iterator[None]:
    """Inside the block the model answers as the reference."""
    control = control_of(model)
    if control is None:
        yield
    elif REFERENCE in control.adapters:
        with acting_kept(model):
            adapt.activate(model, REFERENCE)
            yield
    else:
        with adapt.disabled(model):
            yield
