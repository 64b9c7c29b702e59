"""An adapter to start from: Reptile (Nichol, Achiam and Schulman 2018, "On First-Order Meta-Learning Algorithms", algorithm 2 with one task a round).

A run over several files, each a task of its own, goes in rounds. A round takes `meta.inner_steps` ordinary steps on one file, with an optimiser that knows nothing of the
rounds before; then the adapter goes back to where the round began and from there `meta.step_size` of the way to where it ended. What is left is a place
from which each file's task is a few steps away, and so, it is hoped, is a task of the same kind that no file is about: `--init-adapter` starts there.

The share of the way falls evenly to nothing over the run, as in the paper. The files come in cycles, every file once a cycle in an order drawn from the seed, and a file's rows as its
own run would see them. What a round began with is kept in checkpoints, so a run that is stopped within one goes on with the same bits.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ingraft.data import batches
from ingraft.data.batching import longest_first
from ingraft.data.examples import Example
from ingraft.data.mixing import Part
from ingraft.recipe import Recipe
from ingraft.train.learner import Learner
from ingraft.train.schedule import Plan


class Rounds:
    """The rows of each step, and what happens to the adapter at the end of a round. Kept in checkpoints."""

    name = "round"

    def __init__(self, recipe: Recipe, plan: Plan, part: Part, learner: Learner) -> None:
        """Args:
        part: the training rows, of several files.
        learner: of the adapter.
        """
        self._inner, self._share = recipe.meta.inner_steps, recipe.meta.step_size
        self._seed, self._plan, self._learner, self._examples = recipe.seed, plan, learner, part.examples
        self._pools = [list(origin.examples) for origin in part.origins]
        self._began: dict[str, Tensor] = {}

    @property
    def longest(self) -> Sequence[Example]:
        return self._examples

    def taken(self) -> Mapping[str, tuple[float, float]]:
        return {}

    def rows(self, step: int, poll: Callable[[], None] = lambda: None) -> list[Example]:
        """The rows of a step, longest first. The first of a round notes where the adapter is."""
        number, within = divmod(step, self._inner)
        if not within:
            self._began = {name: p.detach().clone() for name, p in self._learner.parameters.items()}
            self._learner.optimizer.state.clear()
        cycle, place = divmod(number, len(self._pools))
        pool = self._pools[self._order(cycle)[place]]
        size = self._plan.effective
        epoch, batch = divmod(cycle * self._inner + within, -(-len(pool) // size))
        chosen = batches([self._examples[i] for i in pool], size, self._seed, epoch)[batch]
        return longest_first(self._examples[pool[i]] for i in chosen)

    def behind(self, step: int) -> None:
        """After the step that makes `step` of them: at the end of a round the adapter goes part of the way."""
        if step % self._inner and step < self._plan.total:
            return
        rounds = -(-self._plan.total // self._inner)
        share = self._share * (1 - ((step - 1) // self._inner) / rounds)
        with torch.no_grad():
            for name, p in self._learner.parameters.items():
                p.copy_(torch.lerp(self._began[name], p, share))
        self._began = {}

    def _order(self, cycle: int) -> list[int]:
        order = list(range(len(self._pools)))
        random.Random(f"ingraft rounds {self._seed} {cycle}").shuffle(order)
        return order

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Where the adapter was when the round began, as tensors of one file."""
        return {self.name: {f"{self.name}/{name}": tensor for name, tensor in self._began.items()}}

    def numbers(self) -> dict[str, Any]:
        """The rest of its state: nothing."""
        return {}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Take the state back that `tensors` gave."""
        kept = tensors.get(self.name, {})
        devices = {name: p.device for name, p in self._learner.parameters.items()}
        self._began = {
            key.removeprefix(f"{self.name}/"): x.to(devices[key.removeprefix(f"{self.name}/")])
            for key, x in kept.items()
        }
