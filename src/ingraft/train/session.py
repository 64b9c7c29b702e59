"""What a run works with and how far it is, for the loop and for what the loop calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn

from ingraft.data import batches
from ingraft.data.batching import longest_first
from ingraft.data.dataset import DataSet
from ingraft.data.examples import Example
from ingraft.data.mixing import Mixture
from ingraft.evaluate.scorer import Scorer
from ingraft.recipe import Recipe
from ingraft.train import checkpoint
from ingraft.train.frozen import Frozen
from ingraft.train.journal import Journal
from ingraft.train.learner import Learner
from ingraft.train.objectives import Objective
from ingraft.train.profile import Profiler
from ingraft.train.roofline import Meter
from ingraft.train.schedule import Plan
from ingraft.train.stop import Stop


@dataclass(kw_only=True)
class Progress:
    """How far a run is; all of it goes into checkpoints.

    Attributes:
        step: optimiser steps made.
        evaluated, saved: the last step that was evaluated, or written as a checkpoint.
        masked: steps without a single learned token.
        micro_batch: rows that go through at once, as the memory allows; 0 before that is settled.
        early: whether early stopping ended it.
        rate: the peak learning rate, as asked for or as found; 0 before that is settled.
        loss_sum, units, steps: since the last line of the log, for its means.
        noticed: by name the sum and the count of what the objective noticed, likewise.
        before: what the run found before its first step (metrics, samples).
        options: the method's, once data have had a say in them; empty where they have none.
    """

    step: int = 0
    evaluated: int = 0
    saved: int = 0
    masked: int = 0
    micro_batch: int = 0
    early: bool = False
    rate: float = 0.0
    loss_sum: float = 0.0
    units: int = 0
    steps: int = 0
    noticed: dict[str, list[float]] = field(default_factory=dict[str, list[float]])
    before: dict[str, Any] = field(default_factory=dict[str, Any])
    options: dict[str, Any] = field(default_factory=dict[str, Any])

    def notice(self, taken: Mapping[str, tuple[float, float]]) -> None:
        """Add sums and counts to those since the last line."""
        for name, (total, count) in taken.items():
            was = self.noticed.get(name, [0.0, 0.0])
            self.noticed[name] = [was[0] + total, was[1] + count]


@dataclass(frozen=True, kw_only=True, eq=False)
class Session:
    """Everything a run works with, settled before its first step.

    Attributes:
        who: the run's identity, for its checkpoints.
        scorer: measures what was learned.
        metric: what best means.
        meter: counts the work of steps.
        frozen: what the frozen blocks make of each row, where that is kept.
        profiler: looks at one of them, where that is wanted.
        source: gives each step its rows.
        kept: what has a state of its own beside the learners, for checkpoints.
        shown: rows that are answered at every evaluation, with the part they are of.
    """

    recipe: Recipe
    plan: Plan
    model: nn.Module
    objective: Objective
    learners: Sequence[Learner]
    scorer: Scorer
    data: DataSet
    folder: Path
    journal: Journal
    stop: Stop
    accelerator: Accelerator
    who: dict[str, Any]
    metric: str
    meter: Meter
    source: Source
    kept: Sequence[checkpoint.Kept] = ()
    shown: tuple[str, Sequence[Example]] = ("eval", ())
    frozen: Frozen | None = None
    profiler: Profiler | None = None


class Source(Protocol):
    """Where the rows of the steps come from."""

    @property
    def longest(self) -> Sequence[Example]:
        """Rows of which one is as long as any."""
        ...

    def rows(self, step: int, poll: Callable[[], None]) -> list[Example]:
        """The rows of a step, longest first.

        Args:
            poll: may raise to stop.
        """
        ...

    def taken(self) -> Mapping[str, tuple[float, float]]:
        """Sums and counts of what it noticed since the last call."""
        ...

    def behind(self, step: int) -> None:
        """Called when so many steps are made."""
        ...


class Order:
    """Which rows of the data each step sees; the batches of the epoch at hand are kept."""

    def __init__(self, examples: Sequence[Example], plan: Plan, seed: int, mixture: Mixture) -> None:
        self._examples, self._plan, self._seed, self._mixture = examples, plan, seed, mixture
        self._epoch, self._batches = -1, list[list[int]]()

    @property
    def longest(self) -> Sequence[Example]:
        return self._examples

    def taken(self) -> Mapping[str, tuple[float, float]]:
        return {}

    def behind(self, step: int) -> None:
        del step

    def rows(self, step: int, poll: Callable[[], None] = lambda: None) -> list[Example]:
        epoch, index = self._plan.position(step)
        if epoch != self._epoch:
            self._epoch, held = epoch, self._mixture.epoch(epoch)
            made = batches([self._examples[i] for i in held], self._plan.effective, self._seed, epoch)
            self._batches = [[held[i] for i in batch] for batch in made]
        return longest_first(self._examples[i] for i in self._batches[index])


@dataclass(kw_only=True)
class Clock:
    """Seconds, tokens and work since the last line of the log. Not kept in checkpoints: they describe a machine at an hour."""

    seconds: float = 0.0
    tokens: int = 0
    learned: int = 0
    steps: int = 0
    work: int = 0
