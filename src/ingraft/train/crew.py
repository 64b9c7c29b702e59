"""Who learns in a run, and from which rows: one adapter from the data's, or a policy and its value function from answers that the policy samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import torch

from ingraft import adapt
from ingraft.errors import IngraftError
from ingraft.evaluate.judges import VALUE
from ingraft.recipe import Recipe
from ingraft.train.attached import ADAPTER, attach_value
from ingraft.train.learner import Learner, make_learner
from ingraft.train.objectives import Objective
from ingraft.train.objectives.sampled import PpoObjective, ValueObjective
from ingraft.train.reptile import Rounds
from ingraft.train.rollouts import Rollouts
from ingraft.train.schedule import plan
from ingraft.train.session import Order, Source

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.bases.reading import Reader
    from ingraft.data.dataset import DataSet
    from ingraft.evaluate.rewards import Rewards
    from ingraft.train.checkpoint import Kept


@dataclass(frozen=True, kw_only=True, eq=False)
class Crew:
    """What the loop is given.

    Attributes:
        learners: the run's adapter first.
        source: of rows. kept: what of it has a state.
    """

    learners: Sequence[Learner]
    source: Source
    kept: Sequence[Kept] = ()


def crew_of(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: Reader,
    objective: Objective,
    data: DataSet,
    rewards: Rewards | None,
    allow_base_mismatch: bool = False,
) -> Crew:
    """The crew of a run whose adapter is attached. A value function is attached here.

    Args:
        rewards: what answers earn, for a task that samples.
    """
    steps = plan(recipe, len(data.train))
    order = Order(data.train, steps, recipe.seed, data.mixture)
    policy = _learner(recipe, model, ADAPTER)
    if not isinstance(objective, PpoObjective):
        if recipe.meta.inner_steps:
            if adapt.training_state(model, ADAPTER):
                text = "counts what it saw while training, which does not go part of a way; choose another method"
                raise IngraftError(f"meta.inner_steps: {recipe.method} {text}.")
            rounds = Rounds(recipe, steps, data.parts["train"], policy)
            return Crew(learners=[policy], source=rounds, kept=[rounds])
        return Crew(learners=[policy], source=order)
    assert rewards is not None, "an objective that samples has a scorer that is rewarded"
    learners, judge = [policy], None
    if objective.valued:
        judge = attach_value(model, recipe, allow_base_mismatch)
        objective.value = ValueObjective(model, objective.pad_id, judge, recipe.losses)
        value = _learner(recipe, model, VALUE, {"head": judge.head_1D})
        learners.append(value)
    writes_with = cast("PreTrainedTokenizerBase", tokenizer)
    rollouts = Rollouts(
        recipe, steps, model, writes_with, data.parts["train"], order.rows, rewards, judge, objective.pad_id
    )
    return Crew(learners=learners, source=rollouts, kept=[rollouts])


def _learner(
    recipe: Recipe, model: PreTrainedModel, name: str, beside: dict[str, torch.nn.Parameter] | None = None
) -> Learner:
    """The learner of an attached adapter.

    Args:
        beside: what is trained with it and no part of it; the learner is then an aide.
    """
    rate = partial(adapt.rate, model, name)
    made = make_learner(
        name,
        {**adapt.parameters(model, name), **(beside or {})},
        recipe,
        model.dtype == torch.float16,
        factor=lambda parameter: 1.0 if beside and parameter in beside else rate(parameter),
        state=adapt.training_state(model, name),
    )
    made.aide = beside is not None
    return made
