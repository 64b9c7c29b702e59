"""Learning rates and positions as pure functions of the step, so that a resumed run has nothing to restore but a number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ingraft.recipe import Recipe
from ingraft.train.objectives import objective_kind


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How long a run is.

    Attributes:
        rows: rows an epoch.
        effective: rows an optimiser step.
        steps_per_epoch: the last step of an epoch may have fewer rows.
        repeats: optimiser steps in a row that are about the same rows.
        total: optimiser steps of the whole run.
        warmup: steps until the peak learning rate.
    """

    rows: int
    effective: int
    steps_per_epoch: int
    total: int
    warmup: int
    repeats: int = 1

    def position(self, step: int) -> tuple[int, int]:
        """Epoch and batch within it of a step, both from 0."""
        epoch, within = divmod(step, self.steps_per_epoch)
        return epoch, within // self.repeats


def plan(recipe: Recipe, rows: int) -> Plan:
    """The length of a run over so many rows."""
    effective = recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps
    repeats = recipe.rl.num_epochs * recipe.rl.num_mini_batches if objective_kind(recipe.task).samples else 1
    steps_per_epoch = max(1, math.ceil(rows / effective)) * repeats
    total = recipe.max_steps if recipe.max_steps > 0 else math.ceil(recipe.num_train_epochs * steps_per_epoch)
    warmup = recipe.warmup_steps or math.ceil(recipe.warmup_ratio * total)
    if recipe.lr_scheduler_type == "constant":
        warmup = 0
    return Plan(
        rows=rows,
        effective=effective,
        steps_per_epoch=steps_per_epoch,
        total=total,
        warmup=min(warmup, total),
        repeats=repeats,
    )


def factor(kind: str, step: int, total: int, warmup: int) -> float:
    """What the peak learning rate is multiplied by at a step (from 0).

    The first step of a warm-up already moves: transformers begins at exactly 0, which spends a step on nothing.

    Args:
        kind: constant, constant_with_warmup, linear or cosine.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if kind in ("constant", "constant_with_warmup"):
        return 1.0
    done = (step - warmup) / max(1, total - warmup)
    return 1.0 - done if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
