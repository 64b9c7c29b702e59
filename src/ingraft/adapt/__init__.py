"""Adapters inside a model: the verbs of Ingraft's Python interface."""

from ingraft.adapt.building import base_parameters, expected_count, parameters
from ingraft.adapt.files import load, save
from ingraft.adapt.hooks import after_step, penalty, prepare, rate
from ingraft.adapt.lifecycle import activate, attach, context, detach, disabled, dropout_step, rows, trainable
from ingraft.adapt.merging import merge, unmerge
from ingraft.adapt.summary import status

__all__ = [
    "activate",
    "after_step",
    "attach",
    "base_parameters",
    "context",
    "detach",
    "disabled",
    "dropout_step",
    "expected_count",
    "load",
    "merge",
    "parameters",
    "penalty",
    "prepare",
    "rate",
    "rows",
    "save",
    "status",
    "trainable",
    "unmerge",
]
