"""Measuring a model on encoded rows: loss, classes, choices, answers. Training and `ingraft eval` both call this, so a number means the
same in a log, a report and a terminal. Names resolve lazily; nothing here is imported before it is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingraft.evaluate.choices import ChoiceRow, ChoiceScores, choice_rows, choices_of, score_along, score_choices
    from ingraft.evaluate.classes import ClassScores, score_classes
    from ingraft.evaluate.generation import generate
    from ingraft.evaluate.loss import LossScores, paired_difference, score_loss
    from ingraft.evaluate.room import hold, virtual_tokens
    from ingraft.evaluate.scorer import SCORERS, Asked, Scorer, evaluate, scorer_of

_HOME = {
    "choices": ("ChoiceRow", "ChoiceScores", "choice_rows", "choices_of", "score_along", "score_choices"),
    "classes": ("ClassScores", "score_classes"),
    "generation": ("generate",),
    "loss": ("LossScores", "paired_difference", "score_loss"),
    "room": ("hold", "virtual_tokens"),
    "scorer": ("SCORERS", "Asked", "Scorer", "evaluate", "scorer_of"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "SCORERS",
    "Asked",
    "ChoiceRow",
    "ChoiceScores",
    "ClassScores",
    "LossScores",
    "Scorer",
    "choice_rows",
    "choices_of",
    "evaluate",
    "generate",
    "hold",
    "paired_difference",
    "score_along",
    "score_choices",
    "score_classes",
    "score_loss",
    "scorer_of",
    "virtual_tokens",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE[name]}"), name)
    globals()[name] = value
    return value
