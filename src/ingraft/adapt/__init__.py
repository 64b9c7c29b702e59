"""Adapters inside a model: the verbs of Ingraft's Python interface."""

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
    "merge",
    "parameters",
    "rows",
    "status",
    "trainable",
    "unmerge",
]
