"""`cache_frozen`: what the blocks below the lowest adapted one make of a row is worked out once and kept for the epochs after.

*Kept* are the hidden states of a row's real tokens, in the base's dtype, in one file without a name in the run folder: whatever ends the process, the
system takes the file away with it. All of its room is taken before the first step (on Linux). It is read and not mapped, because pages of a mapped file
count as memory of the process, and because a disk that fails is then an error and not a signal.

*What is promised.* A run with the cache is a function of recipe and data like any other, so one that is stopped anywhere and goes on ends with the
same bits, although the cache of the first process is gone. Products of other sizes round otherwise, so what is kept of a row must not depend
on when it is made and beside which rows it is wanted. It is made beside the same rows always: those of its batch in the first epoch
(`groups`). In that epoch each step makes what it needs. A run that goes on later makes a row's group when the row first turns up.

Against the run without the cache, states agree up to rounding: there a row's lower blocks run beside other rows, behind other padding, in each
epoch. Losses and adapters agree as far as that carries; in the first epoch to the bit, unless steps were cut to fit memory or `TOKENS`.

*What it costs.* Disk: width x bytes of a number for each token of the training rows (SmolLM2 in bfloat16: 1.2 kB). Reading and
writing are hundredths of the blocks' own work, even on MiniLM (docs/lab-notes.md). Evaluations are not served: their rows are others, and seen too seldom.

Refused is whatever would make something else of a row in another epoch (`adapt/below.py`), and a run in which no row comes twice.
"""

from __future__ import annotations

import io
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft import durable
from ingraft.adapt.below import Below, below
from ingraft.data import batches
from ingraft.data.batching import longest_first
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.evaluate.loss import Poll, device_of
from ingraft.evaluate.modes import unnoticed
from ingraft.recipe import Recipe
from ingraft.train.objectives import Objective
from ingraft.train.profile import phase
from ingraft.train.roofline import Meter
from ingraft.train.schedule import Plan

TOKENS = 4096
"""Padding included, so many tokens go through the frozen blocks at once at most, or one row."""


def groups(examples: Sequence[Example], plan: Plan, recipe: Recipe) -> list[list[Example]]:
    """The rows whose states are made together: those that go through at once in the first epoch, if memory has no say, and at most `TOKENS`."""
    found: list[list[Example]] = []
    for batch in batches(examples, plan.effective, recipe.seed, 0):
        rows = longest_first([examples[i] for i in batch])
        while rows:
            size = max(1, min(recipe.per_device_train_batch_size, TOKENS // len(rows[0])))
            found.append(rows[:size])
            rows = rows[size:]
    return found


class Frozen:
    """The states of all training rows, as far as they were made. Usable inside `opened`.

    Attributes:
        bytes: what all of them take on disk.
    """

    def __init__(self, found: Below, objective: Objective, together: Sequence[Sequence[Example]]) -> None:
        """Args:
        objective: makes the batches. together: see `groups`; every training row is in one of them.
        """
        self._below, self._objective, self._groups = found, objective, together
        self._token = found.width * torch.empty((), dtype=found.dtype).element_size()
        self._group_of = {row.row_id: number for number, group in enumerate(together) for row in group}
        self._at: dict[int, int] = {}
        self.bytes = 0
        for group in together:
            for row in group:
                self._at[row.row_id] = self.bytes
                self.bytes += len(row) * self._token
        self._made: set[int] = set()
        self._file: io.FileIO | None = None
        self._lately, self._counts = Counter[str](), Counter[str]()  # since the last look, and in all

    @contextmanager
    def opened(self, folder: Path, say: Callable[[str], None]) -> Iterator[None]:
        """Inside the block there is a file in this folder for the states, all of its room taken.

        Args:
            say: told what is kept.

        Raises:
            IngraftError: there is no such room.
        """
        with ExitStack() as stack:
            try:
                file = stack.enter_context(tempfile.TemporaryFile(dir=folder, prefix=".ingraft.", buffering=0))
                if sys.platform == "linux":
                    os.posix_fallocate(file.fileno(), 0, self.bytes)
            except OSError as error:
                text = f"{megabytes(self.bytes)} cannot be taken in {folder}: {error.strerror or error}"
                raise IngraftError(
                    f"cache_frozen: {text}. Make room, choose another output_dir, or leave it false."
                ) from error
            say(
                f"cache_frozen: the lower {len(self._below.blocks)} of {self._below.total} blocks run once for each of {len(self._at):,} rows; what "
                f"they make takes {megabytes(self.bytes)} on disk until the run ends."
            )
            self._file, self._made = cast(io.FileIO, file), set()
            try:
                yield
            finally:
                self._file = None

    def require(self, rows: Sequence[Example], meter: Meter, poll: Poll | None = None) -> None:
        """Make the states of these rows, and of those made together with them, as far as that was not done.

        Args:
            meter: counts the work.
            poll: called between groups; may raise to stop.
        """
        lacking = [number for row in rows if (number := self._group_of[row.row_id]) not in self._made]
        self._count(given=len(rows), kept=len(rows) - len(lacking))
        for number in dict.fromkeys(lacking):
            if poll is not None:
                poll()
            group = self._groups[number]
            inputs = self._objective.inputs(self._objective.batch(group))
            with unnoticed(self._below.model), meter.micro_batch("frozen blocks", inputs, 0), phase("forward"):
                x_BTD = self._below.states(inputs).cpu()
            for row, x_TD in zip(group, x_BTD, strict=True):
                self._write(self._at[row.row_id], x_TD[: len(row)])
            self._made.add(number)
            self._count(made=len(group))

    @contextmanager
    def given(self, rows: Sequence[Example]) -> Iterator[None]:
        """Inside the block one forward pass of the model, on the batch of these rows, takes their states from the file.

        Args:
            rows: of which `require` knows.
        """
        x_BTD = torch.zeros(len(rows), max(map(len, rows)), self._below.width, dtype=self._below.dtype)
        for row, x_TD in zip(rows, x_BTD, strict=True):
            self._read(self._at[row.row_id], x_TD[: len(row)])
        with self._below.given(x_BTD.to(device_of(self._below.model))):
            yield

    def taken(self) -> dict[str, Any]:
        """For a line of the log: what was spared since the last call."""
        counts, self._lately = self._lately, Counter[str]()
        return {"cached_rows": counts["kept"], "blocks_spared": self._spared(counts), "cache_bytes": self.bytes}

    @property
    def summary(self) -> str:
        """What was spared in all, as a sentence."""
        counts = self._counts
        return (
            f"cache_frozen: {counts['kept']:,} of {counts['given']:,} rows came from the cache; {self._spared(counts):.0%} of the blocks' forward passes "
            f"were not made, for {megabytes(self.bytes)} on disk."
        )

    def _spared(self, counts: Counter[str]) -> float:
        """The share of the forward passes, a row through a block, that was not made."""
        lower = (counts["given"] - counts["made"]) * len(self._below.blocks)
        return lower / max(1, counts["given"] * self._below.total)

    def _count(self, **rows: int) -> None:
        self._lately.update(rows)
        self._counts.update(rows)

    def _write(self, at: int, x_TD: Tensor) -> None:
        assert self._file is not None, "opened was not entered"
        data = _bytes(x_TD.contiguous())
        self._file.seek(at)
        try:
            while data:
                data = data[self._file.write(data) :]
        except OSError as error:
            raise IngraftError(
                f"cache_frozen: what is kept of a row cannot be written: {error.strerror or error}. Make room and go on from the last checkpoint."
            ) from error

    def _read(self, at: int, x_TD: Tensor) -> None:
        """Fill a contiguous tensor."""
        assert self._file is not None, "opened was not entered"
        data = _bytes(x_TD)
        self._file.seek(at)
        try:
            while data:
                if not (count := self._file.readinto(data)):
                    raise OSError("the file ends before it")
                data = data[count:]
        except OSError as error:
            raise IngraftError(
                f"cache_frozen: what was kept of a row cannot be read again: {error.strerror or error}. Go on from the last checkpoint."
            ) from error


def frozen_of(
    recipe: Recipe, model: nn.Module, objective: Objective, rows: Sequence[Example], plan: Plan
) -> Frozen | None:
    """The cache of a run, nothing written yet; None if the recipe asks for none.

    Args:
        rows: all training rows. model: with what is trained.

    Raises:
        IngraftError: it cannot be right here, no row comes twice, or the disk is too small.
    """
    if not recipe.cache_frozen:
        return None
    if plan.total <= plan.steps_per_epoch:
        raise IngraftError(
            f"cache_frozen: {plan.total} steps are no more than the {plan.steps_per_epoch} of one pass over the rows, so no row comes twice. Leave "
            "it false, or train longer."
        )
    by_length = sorted(rows, key=lambda row: (len(row), row.row_id))
    short = by_length[0]
    other = next((row for row in by_length if len(row) > len(short)), by_length[-1])
    batch = objective.batch([other, short])
    with unnoticed(model):
        found = below(model, objective.inputs(batch))
    made = Frozen(found, objective, groups(rows, plan, recipe))
    try:
        durable.require_space(recipe.output_dir, made.bytes)
    except IngraftError as error:
        raise IngraftError(
            f"cache_frozen: what the lower {len(found.blocks)} blocks make of {len(rows):,} rows is kept on disk. {error.problems[0]} Or leave it false."
        ) from error
    return made


def _bytes(x: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, x.view(torch.uint8).numpy())).cast("B")


def megabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e6:,.1f} MB"
