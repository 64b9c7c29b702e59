"""Data: from a user's file to batches. Names resolve lazily, so that reading and checking a file loads neither torch
nor transformers.

No module here has the name of a function it exports: the module would take the function's place in this namespace.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingraft.data.batching import batches, padding_share
    from ingraft.data.chat import encode_prompt, prompt_messages, render
    from ingraft.data.dataset import DataSet, load
    from ingraft.data.examples import IGNORED, Example, encode_lm, encode_sft
    from ingraft.data.formats import FORMATS, detect, read_records
    from ingraft.data.labelled import encode_classify, label_names
    from ingraft.data.readers import check_source, read_rows
    from ingraft.data.report import DataReport, PartReport
    from ingraft.data.rows import Row
    from ingraft.data.show import preview
    from ingraft.data.splits import split
    from ingraft.data.tasks import TASKS, Settings, Task, task_of
    from ingraft.data.tensors import collate, pad_id, row_ids

_HOME = {
    "batching": ("batches", "padding_share"),
    "chat": ("encode_prompt", "prompt_messages", "render"),
    "tensors": ("collate", "pad_id", "row_ids"),
    "examples": ("IGNORED", "Example", "encode_lm", "encode_sft"),
    "labelled": ("encode_classify", "label_names"),
    "formats": ("FORMATS", "detect", "read_records"),
    "dataset": ("DataSet", "load"),
    "show": ("preview",),
    "readers": ("check_source", "read_rows"),
    "report": ("DataReport", "PartReport"),
    "rows": ("Row",),
    "splits": ("split",),
    "tasks": ("TASKS", "Settings", "Task", "task_of"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "check_source",
    "FORMATS",
    "IGNORED",
    "TASKS",
    "DataReport",
    "DataSet",
    "Example",
    "PartReport",
    "Row",
    "Settings",
    "Task",
    "batches",
    "collate",
    "detect",
    "encode_classify",
    "encode_lm",
    "encode_prompt",
    "encode_sft",
    "label_names",
    "load",
    "pad_id",
    "padding_share",
    "preview",
    "prompt_messages",
    "read_records",
    "read_rows",
    "render",
    "row_ids",
    "split",
    "task_of",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value
