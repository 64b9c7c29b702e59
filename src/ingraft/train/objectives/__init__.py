"""What is learned: one file an objective. A new one is a subclass of `Objective` and a line in `OBJECTIVES`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING

from ingraft.errors import IngraftError, nearest
from ingraft.train.objectives.base import Objective

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ingraft.recipe import Losses

__all__ = ["OBJECTIVES", "Objective", "objective_for", "objective_kind"]

OBJECTIVES: Mapping[str, str] = {
    "sft": "causal:CausalObjective",
    "lm": "causal:CausalObjective",
    "seq2seq": "causal:CausalObjective",
    "classify": "classify:ClassifyObjective",
    "image-classify": "classify:ClassifyObjective",
    "multi-label": "multi_label:MultiLabelObjective",
    "regress": "regress:RegressObjective",
    "tag": "tag:TagObjective",
    "qa": "qa:QaObjective",
    "embed": "embed:EmbedObjective",
    "reward": "reward:RewardObjective",
    "dpo": "preference:DpoObjective",
    "ipo": "preference:IpoObjective",
    "kto": "preference:KtoObjective",
    "ppo": "sampled:PpoObjective",
    "grpo": "sampled:GrpoObjective",
}
"""Task -> module and class."""


def objective_for(
    task: str,
    model: PreTrainedModel,
    pad_id: int,
    losses: Losses | None = None,
) -> Objective:
    """The objective of a task.

    Args:
        losses: settings that only some objectives have.

    Raises:
        IngraftError: a task that cannot be trained yet.
    """
    return objective_kind(task)(model, pad_id, losses)


def objective_kind(task: str) -> type[Objective]:
    """The class of a task's objective.

    Raises:
        IngraftError: a task that cannot be trained yet.
    """
    if task not in OBJECTIVES:
        raise IngraftError(
            f"task: {task!r} comes later{nearest(task, OBJECTIVES)}; today {', '.join(OBJECTIVES)} can be trained."
        )
    module, name = OBJECTIVES[task].split(":")
    return getattr(import_module(f"{__name__}.{module}"), name)
