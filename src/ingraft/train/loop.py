"""The training loop: steps, evaluations, checkpoints.

A step is a pure function of (tensors, moments, step number): the rows of step n are batch n of an order that depends on seed and epoch,
dropout depends on step and row, the learning rate on the step. Nothing else enters, so a run that is stopped anywhere and goes on from its
last checkpoint ends with the same bits.

The loop trains a list of adapters over one base. Each has its own optimiser and its own gradients; all see the same rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ingraft import adapt
from ingraft.adapt.control import child_name, shared_name
from ingraft.data import row_ids
from ingraft.data.examples import Example
from ingraft.data.tasks import task_of
from ingraft.errors import IngraftError
from ingraft.methods.registry import record
from ingraft.train import checkpoint, finder, memory, recompute
from ingraft.train.evaluations import evaluate
from ingraft.train.frozen import groups
from ingraft.train.journal import RATE
from ingraft.train.learner import Learner
from ingraft.train.machine import peak_memory
from ingraft.train.objectives.base import finite
from ingraft.train.profile import phase
from ingraft.train.schedule import factor
from ingraft.train.session import Clock, Progress, Session

PATIENCE = 5
"""Steps in a row that may be not finite before the run gives up."""


def fit(session: Session, progress: Progress) -> None:
    """Train until the plan is done, early stopping ends it, or a signal comes.

    Raises:
        Stopped: a signal came; `progress` says what is complete.
        IngraftError: the loss stays not finite, or the disk refused.
    """
    recipe, plan = session.recipe, session.plan
    clock = Clock()
    adapt.trainable(session.model, *(learner.name for learner in session.learners))
    adapting(session.model, session.learners, True)
    together = groups(session.data.train, plan, recipe) if session.objective.reference else []
    session.objective.begin(together)
    _settle(session, progress)
    progress.rate = progress.rate or _peak_rate(session, progress)
    session.journal.begin(progress.step, plan.total)
    try:
        unfinished = progress.step and _due(progress.step, recipe.eval_steps) and progress.evaluated < progress.step
        if session.data.eval and unfinished:
            evaluate(session, progress)  # the checkpoint was written on the way out of this evaluation
        while progress.step < plan.total and not progress.early:
            session.stop.check()
            rows = session.source.rows(progress.step, session.stop.check)
            progress.notice(session.source.taken())
            norms = watched_step(session, progress, clock, rows)
            progress.step += 1
            session.source.behind(progress.step)
            values: dict[str, float] = {}
            if _due(progress.step, recipe.logging_steps) or progress.step == plan.total:
                values = log_line(session, progress, clock, norms)
            session.journal.step(progress.step, values)
            if session.data.eval and _due(progress.step, recipe.eval_steps):
                evaluate(session, progress)
            if _due(progress.step, recipe.save_steps):
                save(session, progress)
        if recipe.save_steps and progress.saved != progress.step:
            save(session, progress)  # what follows (the best adapter, the last evaluation) may be cut short too
        if session.frozen is not None:
            session.journal.say(session.frozen.summary)
    finally:
        session.journal.end()
        adapting(session.model, session.learners, False)


def _settle(session: Session, progress: Progress) -> None:
    """How many rows go through at once, and which blocks recompute themselves. A run that goes on keeps to its rows, so that its bits are
    the same; recomputed blocks change none.
    """
    recipe = session.recipe
    asked = progress.micro_batch or recipe.per_device_train_batch_size
    if progress.micro_batch:
        recipe = dataclasses.replace(recipe, auto_find_batch_size=False)
    choice = memory.choose(session.model, session.objective, session.source.longest, recipe, asked)
    for line in choice.why:
        session.journal.say(line)
    progress.micro_batch = choice.rows
    if recipe.gradient_checkpointing:
        recompute.use(session.model, choice.recomputed)
        adapting(session.model, session.learners, True)


def _peak_rate(session: Session, progress: Progress) -> float:
    """The learning rate that the recipe names, or the one that a range test finds."""
    recipe, objective = session.recipe, session.objective
    if isinstance(recipe.learning_rate, float):
        return recipe.learning_rate
    own, size, poll = record(recipe.method).learning_rate, progress.micro_batch, session.stop.check
    examples = [row for row in session.data.train if objective.units(row)]
    rows = [examples[n * len(examples) // finder.WATCHED] for n in range(min(finder.WATCHED, len(examples)))]

    def step_at(number: int, rate: float) -> None:
        batch = session.source.rows(number, poll)
        units = sum(map(objective.units, batch))
        for learner in session.learners:
            if not units:
                continue
            if finite(fitting_gradients(session, progress, learner, batch, units)):
                learner.apply(rate, recipe.max_grad_norm)
            else:
                learner.skip()

    def watched() -> float:
        adapting(session.model, session.learners, False)
        with torch.no_grad():
            objective.ready(rows, size, poll=poll)
            parts = [objective.loss(objective.batch(rows[n : n + size])) for n in range(0, len(rows), size)]
        adapting(session.model, session.learners, True)
        return float(sum(parts)) / sum(map(objective.units, rows))

    session.journal.say(
        f"learning_rate auto: up to {finder.STEPS} steps at rates around {own:g}, {recipe.method}'s own."
    )
    tested = finder.range_test(session.learners, own, step_at, watched)
    session.meter.taken()  # the test is in no count of the run's steps
    objective.taken()
    if session.frozen is not None:
        session.frozen.taken()
    session.journal.write(step=0, found_learning_rate=tested.rate, range_test=tested.curve)
    why = "where the loss fell fastest" if tested.falls else "the method's own, for the loss fell at no rate"
    session.journal.say(f"learning_rate: {tested.rate:.2g}, {why}.")
    return tested.rate


def watched_step(session: Session, progress: Progress, clock: Clock, rows: Sequence[Example]) -> list[float | None]:
    """`step`, looked at by the profiler where it is this one's turn."""
    if session.profiler is None:
        return step(session, progress, clock, rows)
    about: dict[str, Any] = {"rows": len(rows), "tokens": sum(map(len, rows))}
    seconds, work = clock.seconds, clock.work
    with session.profiler.around(progress.step, about):
        norms = step(session, progress, clock, rows)
        about["seconds"] = clock.seconds - seconds
        about["roofline"] = session.meter.ratio(about["seconds"], clock.work - work)
    return norms


def step(session: Session, progress: Progress, clock: Clock, rows: Sequence[Example]) -> list[float | None]:
    """One optimiser step of every adapter. Returns the gradients' norms, None where the step was skipped."""
    began = time.perf_counter()
    recipe, plan, objective = session.recipe, session.plan, session.objective
    units = sum(map(objective.units, rows))
    if not units:
        progress.masked += 1
        return [0.0 for _ in session.learners]
    rate = progress.rate * factor(recipe.lr_scheduler_type, progress.step, plan.total, plan.warmup)
    norms: list[float | None] = []
    loss_sum = 0.0
    for learner in session.learners:
        if len(session.learners) > 1:
            adapt.activate(session.model, learner.name)
        total = fitting_gradients(session, progress, learner, rows, units)
        norm = None
        if finite(total):
            behind = partial(adapt.after_step, session.model, progress.step + 1, plan.total, learner.name)
            with phase("optimiser"):
                norm = learner.apply(rate, recipe.max_grad_norm, behind)
        else:
            learner.skip()
        if norm is None and learner.skipped_in_row >= PATIENCE:
            names = ", ".join(str(row.row_id) for row in rows)
            raise IngraftError(
                f"The loss or its gradient was not finite in {PATIENCE} steps in a row (the last: step {progress.step + 1}, rows {names}). "
                "Lower learning_rate, or train in dtype float32; the last checkpoint is from before."
            )
        norms.append(norm)
        loss_sum += float(total) if norm is not None and not learner.aide else 0.0
        if norm is not None:
            progress.notice(objective.role(learner.name).taken())
    if any(norm is not None for norm in norms):
        progress.loss_sum += loss_sum / sum(not learner.aide for learner in session.learners)
        progress.units += units
        progress.steps += 1
    if len(session.learners) > 1:
        adapt.activate(session.model, session.learners[0].name)
    clock.seconds += time.perf_counter() - began
    sequences = objective.sequences(rows)
    clock.tokens += sum(map(len, sequences))
    clock.learned += sum(sequence.learned for sequence in sequences)
    clock.steps += 1
    clock.work += session.meter.taken()
    return norms


def fitting_gradients(
    session: Session, progress: Progress, learner: Learner, rows: Sequence[Example], units: int
) -> torch.Tensor:
    """`gradients`, begun again with half the rows at once where memory runs out."""
    while True:
        size = min(progress.micro_batch, len(rows))
        try:
            return gradients(session, learner, rows, units, progress.step, size)
        except (RuntimeError, MemoryError) as error:
            if not memory.exhausted(error):
                raise
            if size == 1 or not session.recipe.auto_find_batch_size:
                raise IngraftError(memory.advice(size, max(rows, key=len))) from error
        memory.give_back()  # behind the handler: until its end the error holds on to the tensors of the step
        progress.micro_batch = size // 2
        session.journal.say(
            f"Step {progress.step + 1} ran out of memory with {size} rows at a time and is made again with {size // 2}; the effective batch "
            "is as it was."
        )


def gradients(
    session: Session, learner: Learner, rows: Sequence[Example], units: int, number: int, size: int
) -> torch.Tensor:
    """Forward and backward of the effective batch, micro-batch by micro-batch. Returns its summed loss.

    Args:
        units: terms of the loss in all rows. number: of the step. size: rows of a micro-batch.

    Raises:
        Stopped: between two micro-batches; the gradients so far are dropped, nothing else has changed.
    """
    total = torch.zeros((), device=session.accelerator.device)
    frozen = session.frozen
    objective = session.objective.role(learner.name)
    objective.taken()  # what an attempt noticed that ran out of memory
    try:
        if frozen is not None:
            frozen.require(rows, session.meter, session.stop.check)
        adapt.dropout_step(session.model, number)
        objective.ready(rows, size, session.meter, session.stop.check)
        for start in range(0, len(rows), size):
            session.stop.check()
            micro = rows[start : start + size]
            if not any(map(objective.units, micro)):
                continue
            sequences = objective.sequences(micro)
            adapt.dropout_step(session.model, number, row_ids(sequences))
            batch = objective.batch(micro)
            learned = sum(sequence.learned for sequence in sequences)
            given = frozen.given(micro) if frozen is not None else contextlib.nullcontext()
            with given, session.meter.micro_batch(learner.name, batch, learned):
                with phase("forward"):
                    loss = objective.loss(batch)
                with phase("backward"):
                    session.accelerator.backward(loss * (learner.scale / units))
            total += loss.detach()
        if (extra := adapt.penalty(session.model)) is not None:  # once a step; the loss that is reported is the task's
            session.accelerator.backward(extra * learner.scale)
    except BaseException:
        learner.optimizer.zero_grad(set_to_none=True)
        raise
    return total


def log_line(session: Session, progress: Progress, clock: Clock, norms: Sequence[float | None]) -> dict[str, float]:
    """Write the line of a step, and begin new means."""
    recipe, plan = session.recipe, session.plan
    made = max(1, clock.steps)
    seconds = max(clock.seconds, 1e-9)
    unit = task_of(recipe.task).counted[1]
    norm = max((norm for norm in norms if norm is not None), default=float("nan"))
    values: dict[str, Any] = {
        "step": progress.step,
        "epoch": round(progress.step / plan.steps_per_epoch, 4),
        "loss": progress.loss_sum / progress.units if progress.units else float("nan"),
        "learning_rate": progress.rate * factor(recipe.lr_scheduler_type, progress.step - 1, plan.total, plan.warmup),
        "grad_norm": norm,
        "step_seconds": clock.seconds / made,
        f"{unit}{RATE}": clock.tokens / seconds,
        f"learned_{unit}{RATE}": clock.learned / seconds,
        "peak_memory": peak_memory(),
        "roofline": session.meter.ratio(clock.seconds, clock.work),
    }
    if skipped := sum(learner.skipped for learner in session.learners):
        values["skipped_steps"] = skipped
    if progress.masked:
        values["masked_steps"] = progress.masked
    if session.frozen is not None:
        values |= session.frozen.taken()
    values |= {name: total / count if count else None for name, (total, count) in progress.noticed.items()}
    session.journal.write(**values)
    progress.loss_sum, progress.units, progress.steps, progress.noticed = 0.0, 0, 0, {}
    clock.seconds, clock.tokens, clock.learned, clock.steps, clock.work = 0.0, 0, 0, 0, 0
    return values


def save(session: Session, progress: Progress) -> None:
    """Write a checkpoint of the last completed step.

    Raises:
        IngraftError: the disk refused; former checkpoints are still there.
    """
    progress.saved = progress.step
    checkpoint.save(
        session.folder,
        progress.step,
        [*session.learners, *session.kept],
        dataclasses.asdict(progress),
        session.who,
        session.recipe.save_total_limit,
    )


def adapting(model: nn.Module, learners: Sequence[Learner], mode: bool) -> None:
    """Put these adapters, and nothing of the base, into training or evaluation mode.

    The base stays in evaluation mode: frozen, it needs no dropout of its own. Blocks that recompute themselves in backward ask their own
    flag whether to, so with gradient checkpointing that one flag is set, without what lies inside.
    """
    names = {of(learner.name) for learner in learners for of in (child_name, shared_name)}
    flagged = recompute.flagged(model)
    for path, module in model.named_modules():
        if names.intersection(path.split(".")) or module in flagged:
            module.training = mode and getattr(module, "gradient_checkpointing", True) is True


def _due(number: int, every: int) -> bool:
    return every > 0 and number % every == 0
