"""Adapters inside a model: the verbs of Ingraft's Python interface."""

from ingraft.adapt.files import load, save
from ingraft.adapt.lifecycle import (
    activate,
    attach,
    base_parameters,
    detach,
    disabled,
    dropout_step,
    expected_count,
    parameters,
    rows,
    status,
    trainable,
)
from ingraft.adapt.merging import merge, unmerge

__all__ = [
    "activate",
    "attach",
    "base_parameters",
    "detach",
    "disabled",
    "dropout_step",
    "expected_count",
    "load",
    "merge",
    "parameters",
    "rows",
    "save",
    "status",
    "trainable",
    "unmerge",
]
