"""Adapters inside a model: the verbs of Ingraft's Python interface."""

from ingraft.adapt.building import base_parameters, expected_count, parameters, training_state
from ingraft.adapt.combining import combine, convert
from ingraft.adapt.files import load, save
from ingraft.adapt.hooks import after_step, grouped, param_groups, penalty, prepare, rate, wants_data
from ingraft.adapt.lifecycle import activate, attach, context, detach, disabled, dropout_step, rows, trainable
from ingraft.adapt.merging import merge, unmerge
from ingraft.adapt.packed import make_dense
from ingraft.adapt.packing import packing
from ingraft.adapt.shelf import Shelf
from ingraft.adapt.summary import base_size, status
from ingraft.adapt.tokens import add_tokens

__all__ = [
    "Shelf",
    "activate",
    "add_tokens",
    "after_step",
    "attach",
    "base_parameters",
    "base_size",
    "combine",
    "context",
    "convert",
    "detach",
    "disabled",
    "dropout_step",
    "expected_count",
    "grouped",
    "load",
    "make_dense",
    "merge",
    "packing",
    "param_groups",
    "parameters",
    "penalty",
    "prepare",
    "rate",
    "rows",
    "save",
    "status",
    "trainable",
    "training_state",
    "unmerge",
    "wants_data",
]
