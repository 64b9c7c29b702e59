"""`train`: from a recipe to a finished run folder.

The order of things is the point of this file: what can be refused is refused before the model is loaded, what can fail on the disk is
tried before the first step, and the run folder becomes an adapter folder (its manifest is written) only when everything else is in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch

from ingraft import adapt, durable
from ingraft.adapt.control import require_control
from ingraft.adapt.files import CONFIG, WEIGHTS, base_of, save_members, serialised
from ingraft.bases import load_base, load_reader, reserve
from ingraft.data import collate, pad_id
from ingraft.data.dataset import DataSet
from ingraft.data.examples import Example
from ingraft.data.wanted import load_wanted
from ingraft.errors import IngraftError, nearest
from ingraft.evaluate import Scorer, scorer_of, virtual_tokens
from ingraft.evaluate.files import of_files
from ingraft.evaluate.rewards import rewards_of
from ingraft.methods import registry
from ingraft.recipe import Recipe, as_recipe, plain, to_yaml
from ingraft.train import checkpoint, journal, place, recompute, samples
from ingraft.train.attached import ADAPTER, attach, keep_reference, keep_roles
from ingraft.train.crew import crew_of
from ingraft.train.frozen import Frozen, frozen_of
from ingraft.train.lock import locked
from ingraft.train.loop import fit, save
from ingraft.train.machine import environment, keep_freed_memory, peak_memory
from ingraft.train.noise import noisy
from ingraft.train.objectives import Objective, objective_for
from ingraft.train.profile import Profiler
from ingraft.train.report import write_report
from ingraft.train.roofline import meter_of
from ingraft.train.schedule import plan
from ingraft.train.session import Progress, Session
from ingraft.train.stop import Stop, Stopped

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ingraft.bases.reading import Reader

ROWS_TO_START_FROM = 64
"""So many training rows, from the front, are shown to a method that starts from data."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished run.

    Attributes:
        folder: the run folder.
        metrics: {"before": {...}, "after": {...}}, empty without evaluation rows.
        samples: rows with what was expected and what was said before and after.
        steps: optimiser steps made. seconds: of this process.
        skipped, masked: steps left out because something was not finite, or nothing was learned.
        profile: of one step, where it was asked for (see `train.profile`).
        model, tokenizer: the trained model, adapter active, and what it reads rows with.
    """

    folder: Path
    metrics: dict[str, dict[str, float]]
    samples: list[dict[str, str]]
    steps: int
    seconds: float
    skipped: int
    masked: int
    profile: dict[str, Any] | None = None
    model: PreTrainedModel = field(repr=False)
    tokenizer: Reader = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """What a run is made of, before it touches its folder."""

    recipe: Recipe
    model: PreTrainedModel
    tokenizer: Reader
    data: DataSet
    objective: Objective
    scorer: Scorer
    frozen: Frozen | None
    allow_base_mismatch: bool


def train(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    resume_from_checkpoint: str | None = None,
    overwrite_output_dir: bool = False,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    profile: bool = False,
    quiet: bool = False,
) -> Run:
    """Train an adapter from a recipe and write its run folder.

    Args:
        recipe: a `Recipe`, a mapping with its keys, or a YAML file.
        resume_from_checkpoint: "last", or a checkpoint folder of this run; the result has the same bits as a run that was never stopped.
            "last" begins anew where no checkpoint was written yet.
        overwrite_output_dir: remove a former run in the output folder first.
        trust_remote_code: let the base's own Python code run.
        allow_base_mismatch: start from an adapter although it was trained on another base.
        profile: look at where the time of one step goes, and keep that in the run folder.
        quiet: say nothing on the way.

    Raises:
        IngraftError: anything wrong with recipe, data, base, method or folder; the loss stays not finite; the disk refused.
        KeyboardInterrupt: Ctrl-C, after a checkpoint of the last completed step was written.
        SystemExit: with code 143 after SIGTERM, likewise.
    """
    began = time.perf_counter()
    recipe = as_recipe(recipe, also=place.absent)
    folder = Path(recipe.output_dir)
    place.check(recipe, resume_from_checkpoint, overwrite=overwrite_output_dir)
    there = folder.exists()
    notes = journal.Journal(folder / place.LOG, quiet=quiet)
    notes.listen()
    try:
        keep_freed_memory()
        prepared = _prepare(recipe, notes, trust_remote_code, allow_base_mismatch)
        with locked(folder):
            try:
                return _run(prepared, folder, notes, resume_from_checkpoint, overwrite_output_dir, profile, began)
            except IngraftError:
                place.undo(folder)
                raise
    finally:
        if not there:
            with contextlib.suppress(OSError):  # it is not empty: as it should be
                folder.rmdir()
        notes.hush()


def _prepare(recipe: Recipe, notes: journal.Journal, trust_remote_code: bool, allow_base_mismatch: bool) -> Prepared:
    """Data, base, adapter and objective, nothing written yet."""
    tokenizer = load_reader(recipe.model, recipe.task, trust_remote_code, recipe.quantization)
    reserve(tokenizer, virtual_tokens(recipe.method, recipe.method_config, recipe.init_adapter))
    data = load_wanted(recipe, tokenizer)
    for line in data.report.lines():
        notes.say(line)
    if not any(example.learned for example in data.train):
        raise IngraftError(f"{recipe.data.named}: no row has a learned token, so there is nothing to train on.")
    steps = plan(recipe, len(data.train))
    if problems := registry.make_config(recipe.method, recipe.method_config).in_steps(steps.total):
        raise IngraftError(*(f"method_config: {text}" for text in problems))
    torch.manual_seed(recipe.seed)  # the fresh head of a classifier
    labels = list(data.labels) if data.labels is not None else None
    held = recipe.quantization
    base = load_base(
        recipe.model, recipe.dtype, trust_remote_code, recipe.task, labels=labels, quantization=held, scale=data.scale
    )
    model = base.model
    recompute.enable(model, recipe)
    recipe = attach(model, recipe, base.fresh, allow_base_mismatch)
    objective = objective_for(recipe.task, model, pad_id(tokenizer), recipe.losses)
    if objective.reference:
        keep_reference(model, recipe, allow_base_mismatch)
    kind, rewards = scorer_of(recipe.task), None
    if kind.rewarded:
        rewards = rewards_of(recipe, model, objective.pad_id, allow_base_mismatch=allow_base_mismatch)
    scorer = kind(model, tokenizer, data.labels, recipe.losses, rewards)
    with _packed(recipe, model):  # a base that cannot is refused before anything is written
        frozen = frozen_of(recipe, model, objective, data.train, steps)
    return Prepared(
        recipe=recipe,
        model=model,
        tokenizer=base.tokenizer,
        data=data,
        objective=objective,
        scorer=scorer,
        frozen=frozen,
        allow_base_mismatch=allow_base_mismatch,
    )


def _packed(recipe: Recipe, model: PreTrainedModel) -> contextlib.AbstractContextManager[None]:
    return adapt.packing(model) if recipe.data.packing else contextlib.nullcontext()


def _run(
    prepared: Prepared,
    folder: Path,
    notes: journal.Journal,
    resume: str | None,
    overwrite: bool,
    profile: bool,
    began: float,
) -> Run:
    from accelerate import Accelerator

    recipe, data, model = prepared.recipe, prepared.data, prepared.model
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    if accelerator.num_processes > 1:
        raise IngraftError("Training on several processes comes later; start a single one.")
    who = checkpoint.identity(recipe, data.train, data.eval, _behind_names(prepared))
    found = checkpoint.find(folder, resume, who) if resume is not None else None
    options = _start(prepared, found)
    crew = crew_of(
        recipe,
        model,
        prepared.tokenizer,
        prepared.objective,
        data,
        prepared.scorer.rewards,
        prepared.allow_base_mismatch,
    )
    learner = crew.learners[0]
    part = shown_part(data)
    shown = samples.choose(data.parts[part].examples, max(samples.COUNT, recipe.eval_samples))
    session = Session(
        recipe=recipe,
        plan=plan(recipe, len(data.train)),
        model=model,
        objective=prepared.objective,
        learners=crew.learners,
        source=crew.source,
        kept=crew.kept,
        shown=(part, shown[: recipe.eval_samples]),
        scorer=prepared.scorer,
        data=data,
        folder=folder,
        journal=notes,
        stop=Stop(),
        accelerator=accelerator,
        who=who,
        metric=recipe.metric_for_best_model.removeprefix("eval_"),
        meter=meter_of(recipe, model),
        frozen=prepared.frozen,
    )
    progress = _begin(session, found, resume, overwrite)
    progress.options = options
    if profile:
        profiler = Profiler(folder / place.PROFILE, progress.step, session.plan.total)
        session = dataclasses.replace(session, profiler=profiler)
    trained = sum(p.numel() for p in learner.parameters.values())
    notes.say(
        f"{recipe.method}: {trained:,} trained parameters; {session.plan.total} steps of {session.plan.effective} rows, "
        f"{len(data.train):,} rows an epoch."
    )
    kept = prepared.frozen.opened(folder, notes.say) if prepared.frozen is not None else contextlib.nullcontext()
    with session.stop.listening(), _packed(recipe, model), kept, noisy(model, ADAPTER, recipe):
        try:
            if not progress.before:
                progress.before = _measure_base(prepared, session, shown)
            fit(session, progress)
            if recipe.load_best_model_at_end and learner.best_tensors:
                learner.use_best()
                notes.say(f"The best evaluation was at step {learner.best_step}; that adapter is kept.")
            after = _measure(prepared, session, shown)
        except Stopped:
            _leave(session, progress)
        return _result(prepared, session, progress, after, shown, began)


def _behind_names(prepared: Prepared) -> dict[str, str]:
    """Digests of what the recipe only names: other weights or rows may lie under the same name when a run is gone on with."""
    recipe, found = prepared.recipe, dict[str, str]()
    for part, value in base_of(prepared.model, ADAPTER).items():
        found[f"base's {part}"] = str(value)
    if prepared.data.mixture.weighted:
        found["rows of each file in an epoch"] = ", ".join(map(str, prepared.data.mixture.quotas))
    if recipe.data.test is not None:
        found["test rows"] = checkpoint.digest(prepared.data.test)
    beside = {key: getattr(recipe, key) for key in ("init_adapter", "reference_adapter", "reward_adapter")}
    for name, folder in {**recipe.adapters, **beside}.items():
        if folder is not None:
            found[f"adapter {name}"] = checkpoint.content(Path(folder))
    if recipe.reward_function is not None:
        found["reward function"] = checkpoint.content(Path(recipe.reward_function.rpartition(":")[0]))
    return found


def _result(
    prepared: Prepared,
    session: Session,
    progress: Progress,
    after: Mapping[str, Any],
    shown: Sequence[Example],
    began: float,
) -> Run:
    """The finished run, written. A signal that comes now is too late to matter: what is left takes a second."""
    learner, data = session.learners[0], prepared.data
    run = Run(
        folder=session.folder,
        metrics={"before": progress.before["metrics"], "after": after["metrics"]} if after["metrics"] else {},
        samples=[
            {**question, "before": was, "after": now}
            for question, was, now in zip(
                prepared.scorer.questions(data.parts[shown_part(data)], shown),
                progress.before["answers"],
                after["answers"],
                strict=True,
            )
        ],
        steps=progress.step,
        seconds=time.perf_counter() - began,
        skipped=learner.skipped,
        masked=progress.masked,
        profile=session.profiler.found if session.profiler is not None else None,
        model=prepared.model,
        tokenizer=prepared.tokenizer,
    )
    _finish(run, prepared, session)
    for text in _remarks(run):
        session.journal.say(text)
    return run


def _start(prepared: Prepared, found: checkpoint.Found | None) -> dict[str, Any]:
    """Let an adapter whose method starts from data see some, or take the shape it took in the run that is gone on with.

    Returns:
        The method's options from then on; empty where data have no say in them.
    """
    recipe, model, objective = prepared.recipe, prepared.model, prepared.objective
    if recipe.init_adapter is not None or not adapt.wants_data(model, ADAPTER):
        return {}
    if found is not None:
        adapt.detach(model, ADAPTER)
        adapt.attach(model, registry.make_config(recipe.method, found.state["options"]), name=ADAPTER, seed=recipe.seed)
        return found.state["options"]
    rows, size = prepared.data.train[:ROWS_TO_START_FROM], recipe.per_device_train_batch_size

    def batches() -> Iterator[dict[str, Any]]:
        for start in range(0, len(rows), size):
            batch = collate(objective.sequences(rows[start : start + size]), objective.pad_id)
            yield {name: x.to(model.device) for name, x in objective.inputs(batch).items()}

    adapt.prepare(model, ADAPTER, batches())
    return plain(require_control(model).require(ADAPTER).config.options())


def _begin(session: Session, found: checkpoint.Found | None, resume: str | None, overwrite: bool) -> Progress:
    """The run folder made ready: emptied, or gone on with; and the disk tried before work is spent."""
    folder, recipe = session.folder, session.recipe
    progress = Progress()
    if found is not None:
        checkpoint.restore(found, [*session.learners, *session.kept])
        progress = Progress(**found.state)
        session.journal.rewind(progress.step)
        session.journal.say(f"Going on from {found.path} (step {progress.step} of {session.plan.total}).")
    else:
        if resume is not None:
            session.journal.say("There is no checkpoint yet; beginning anew.")
        if overwrite or resume is not None:
            place.empty(folder)
    saves = session.plan.total // recipe.save_steps if recipe.save_steps else 1
    cache = session.frozen.bytes if session.frozen is not None else 0
    durable.require_space(folder, cache + checkpoint.forecast(session.learners, recipe.save_total_limit, saves))
    durable.write_file(folder / place.RECIPE, to_yaml(recipe))
    if found is None:
        keep_roles(session.model, recipe, folder)
    if found is None:  # a rehearsal: what cannot be saved should be known now and not in an hour
        durable.remove(checkpoint.save(folder, 0, [*session.learners, *session.kept], {}, session.who, None))
    return progress


def _measure_base(prepared: Prepared, session: Session, shown: Sequence[Example]) -> dict[str, Any]:
    """Metrics and answers from before training: of the base without the adapter, or of what a policy starts from."""
    with prepared.scorer.before():
        found = _measure(prepared, session, shown)
    for name, value in found["metrics"].items():
        session.journal.say(f"before: {name} {value:.4f}")
    metrics = cast(dict[str, float], found["metrics"])
    if metrics:
        named = {f"eval_{name}": value for name, value in metrics.items() if not name.startswith("test_")}
        session.journal.write(step=0, epoch=0.0, **named)
        if session.metric not in metrics:
            raise IngraftError(
                f"metric_for_best_model: {session.metric!r} is not measured here{nearest(session.metric, metrics)}; "
                f"these are: {', '.join(metrics)}."
            )
    return found


def _measure(prepared: Prepared, session: Session, shown: Sequence[Example]) -> dict[str, Any]:
    """Every metric of evaluation and test rows, and answers to the rows that are shown, from the model as it stands."""
    data, poll, size, scorer = (
        prepared.data,
        session.stop.check,
        prepared.recipe.per_device_eval_batch_size,
        prepared.scorer,
    )
    metrics: dict[str, float] = {}
    for part, before, rows in (("eval", "", data.eval), ("test", "test_", data.test)):
        if rows:
            found = scorer.evaluate(data, part, size, poll=poll) | of_files(scorer, data, part, size, poll=poll)
            metrics |= {f"{before}{name}": value for name, value in found.items()}
    return {"metrics": metrics, "answers": scorer.answers(data.parts[shown_part(data)], shown, poll)}


def shown_part(data: DataSet) -> str:
    """The part of the data that samples are taken from."""
    return "eval" if data.eval else "train"


def _leave(session: Session, progress: Progress) -> NoReturn:
    """After a signal: keep the last completed step, say how to go on, and end with the signal's exit code."""
    text = "No step was complete, so there is nothing to go on from."
    complete = (
        progress.step == session.plan.total or progress.early
    )  # the best adapter may be in place of the last by now
    if progress.step and (progress.saved == progress.step or not complete):
        if progress.saved != progress.step:
            save(session, progress)
        text = f"Stopped after step {progress.step}; go on with --resume-from-checkpoint last."
    if session.stop.received == signal.SIGTERM:
        session.journal.say(text)
        raise SystemExit(143)
    raise KeyboardInterrupt(text)


def _finish(run: Run, prepared: Prepared, session: Session) -> None:
    """The result: adapter, metrics, report, and the manifest that makes the folder complete."""
    recipe, learner = prepared.recipe, session.learners[0]
    config, weights, facts = serialised(run.model, ADAPTER)
    about: dict[str, Any] = {
        "task": recipe.task,
        "labels": list(prepared.data.labels) if prepared.data.labels is not None else None,
        "scale": list(prepared.data.scale) if prepared.data.scale is not None else None,
        "seed": recipe.seed,
        "steps": run.steps,
        "metrics": run.metrics,
        "skipped_steps": run.skipped,
        "masked_steps": run.masked,
        "best_step": learner.best_step if recipe.load_best_model_at_end else None,
        "peak_memory": peak_memory(),
        "training_rows": session.who["training rows"],
        **environment(),
    }
    with durable.completion(run.folder, {**facts, "run": about}) as tmp:
        durable.write_file(tmp / CONFIG, config)
        durable.write_file(tmp / WEIGHTS, weights)
        save_members(run.model, ADAPTER, tmp)
        durable.write_json(tmp / place.METRICS, run.metrics)
        log = journal.entries(session.journal.path)
        text = write_report(
            recipe=recipe,
            metrics=run.metrics,
            samples=run.samples,
            log=log,
            data=prepared.data.report.lines(),
            about=about,
            trained=sum(p.numel() for p in learner.parameters.values()),
            total=adapt.base_size(run.model),
        )
        durable.write_file(tmp / place.REPORT, text)


def _remarks(run: Run) -> list[str]:
    """Counters that are above zero."""
    found: list[str] = []
    if run.skipped:
        found.append(f"warning: {run.skipped} steps were left out because loss or gradient was not finite.")
    if run.masked:
        found.append(f"warning: {run.masked} steps had no learned token and changed nothing.")
    return found
