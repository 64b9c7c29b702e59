"""What is learned: one file an objective. A new one is a subclass of `Objective` and a line in `objective_for`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ingraft.errors import IngraftError
from ingraft.train.objectives.base import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ingraft.evaluate import ChoiceRow

__all__ = ["Objective", "objective_for"]


def objective_for(task: str, model: PreTrainedModel, pad_id: int, choices: Sequence[ChoiceRow] = ()) -> Objective:
    """The objective of a task.

    Args:
        choices: for sft, the evaluation rows as choices between label words.

    Raises:
        IngraftError: a task that cannot be trained yet.
    """
    if task in ("sft", "lm"):
        from ingraft.train.objectives.causal import CausalObjective

        return CausalObjective(model, pad_id, task, choices)
    if task == "classify":
        from ingraft.train.objectives.classify import ClassifyObjective

        return ClassifyObjective(model, pad_id)
    raise IngraftError(f"task: {task!r} comes later; today sft, lm and classify can be trained.")
