"""Whole modules in Hugging Face PEFT's files: those it trains in full beside an adapter, and the task that makes it do so unasked.

PEFT names them by ends of strings ("classifier" means `pre_classifier` too), and a task of classification or of answering questions adds the
head to them: such a file without the head's tensors is one that it cannot load. So a task is written where it says nothing false.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ingraft.adapt.control import Adapter
from ingraft.adapt.select import base_modules
from ingraft.adapt.swap import original_class
from ingraft.methods.contract import PeftLayout

TASKS = (
    ("ForCausalLM", "CAUSAL_LM"),
    ("LMHeadModel", "CAUSAL_LM"),
    ("ForSequenceClassification", "SEQ_CLS"),
    ("ForTokenClassification", "TOKEN_CLS"),
    ("ForQuestionAnswering", "QUESTION_ANS"),
    ("ForConditionalGeneration", "SEQ_2_SEQ_LM"),
)
"""PEFT's task types by the end of a model's class name; PEFT cannot load a soft prompt without one."""

HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""By task: the ends of the paths of modules that PEFT trains in full beside every adapter, asked or not, and misses in a file without them."""


def task_of(model: nn.Module) -> str | None:
    """PEFT's task type for this class of model, or None."""
    return task_named(original_class(model).__name__)


def task_named(name: str) -> str | None:
    """PEFT's task type for a class of this name, or None."""
    return next((task for ending, task in TASKS if name.endswith(ending)), None)


def inside_of(layout: PeftLayout | None) -> str:
    """What PEFT puts before a module's path: around a soft prompt it wraps the model once, around everything else twice."""
    return "base_model." if layout is not None and layout.stacked else "base_model.model."


def heads_of(modules: Collection[str], task: str | None) -> set[str]:
    """Paths of the modules that PEFT trains in full beside any adapter of this task."""
    return {path for path in modules if path and path.endswith(HEADS.get(task or "", ()))}


def frozen_heads(model: nn.Module, adapter: Adapter, layout: PeftLayout | None, task: str | None) -> set[str]:
    """Paths of the modules with parameters that PEFT would look for in a file of this task, and that the adapter does not train."""
    if layout is None or layout.bare or layout.fields.get("modules_to_save", "") is None:
        return set()  # their config has no such field
    modules = base_modules(model)
    return {path for path in _owners(modules) if within(path, heads_of(modules, task))} - set(adapter.saved_whole)


def written_task(model: nn.Module, adapter: Adapter, layout: PeftLayout | None) -> str | None:
    """The task, where it says nothing false: with one that has a head PEFT wants that head in the file. A soft prompt cannot do without a
    task; beside it stands a copy of the base's head (`writing.py`)."""
    task = adapter.facts.get("task_type") or task_of(model)
    heads = frozen_heads(model, adapter, layout, task)
    return None if heads and layout is not None and not layout.stacked else task


def written_class(model: nn.Module) -> dict[str, str] | None:
    """As PEFT writes it where a config has no task, so that its `AutoPeftModel` finds the class."""
    cls = original_class(model)
    if not cls.__module__.startswith("transformers."):
        return None  # nobody else could import it
    return {"base_model_class": cls.__name__, "parent_library": cls.__module__}


def _owners(modules: Mapping[str, nn.Module]) -> set[str]:
    """Paths of the modules that have parameters of their own."""
    return {path for path, module in modules.items() if any(p is not None for p in module._parameters.values())}


def written_whole(modules: Mapping[str, nn.Module], adapter: Adapter, start: str) -> list[str]:
    """modules_to_save in names that PEFT, which compares ends of strings, resolves to the same modules.

    Args:
        start: what PEFT puts before a path; a name may reach into it to mean `classifier` and not `pre_classifier`.
    """
    whole = set(adapter.saved_whole)
    given = adapter.config.modules_to_save
    reached = {path for path in modules if path and any(path.endswith(name) for name in given)}
    if {path for path in _owners(modules) if within(path, reached)} == whole:
        return sorted(given)
    last = start.rstrip(".").rpartition(".")[2]
    alike = {path for path in whole if any(other.endswith(path) for other in modules if not within(other, whole))}
    return sorted(f"{last}.{path}" if path in alike else path for path in whole)


def read_whole(model: nn.Module, raw: Mapping[str, Any], start: str) -> Iterator[str]:
    """Paths of the modules that PEFT trains in full: those whose full name, PEFT's own beginning included, ends in one of the names."""
    names = raw.get("modules_to_save") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    for path in base_modules(model):
        if path and (start + path).endswith(names):
            yield path


def with_heads(model: nn.Module, raw: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """A config with the heads named that its task implies and the file holds; PEFT did not always name them.

    Args:
        keys: the names of the file's tensors.
    """
    names = raw.get("modules_to_save") or ()
    named = (names,) if isinstance(names, str) else names
    task = raw.get("task_type")
    heads = (
        heads_of(list(base_modules(model)), task) if isinstance(task, str) and isinstance(named, list | tuple) else ()
    )
    held = {head for head in heads for key in keys if f".{head}." in key and not head.endswith(tuple(named))}
    return {**raw, "modules_to_save": [*named, *sorted(held)]} if held else dict(raw)


def within(path: str, tops: Collection[str]) -> bool:
    """Whether a path is one of these, or lies in one."""
    return any(path == top or path.startswith(top + ".") for top in tops)
