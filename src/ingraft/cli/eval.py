"""`ingraft eval`: loss and metrics of a base, or of a base with an adapter, on a data set, computed as training computes them.

Without --data the rows that the adapter's own run held out are scored, so that the loss must come out as the run logged it. Each metric has an interval, and with
--against the difference from another adapter or from the base alone, on the same rows; what these are is told in `evaluate.resampling`. With --shots the base is asked
in words instead, see `data.demonstrations`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ingraft.cli.options import MAPPING, adapter_option, given, trust_option, verb
from ingraft.cli.output import Output
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.cli.sources import Opened
    from ingraft.data import DataSet
    from ingraft.data.demonstrations import Shots
    from ingraft.evaluate import Scorer
    from ingraft.evaluate.outcomes import Outcomes
    from ingraft.evaluate.resampling import Resampling
    from ingraft.recipe import Recipe


@verb(
    "model",
    "quantization",
    "task",
    "data",
    "preference",
    "embed",
    "reward_adapter",
    "reward_function",
    "rl",
    "dtype",
    "per_device_eval_batch_size",
    "seed",
)
@adapter_option
@trust_option
@click.option(
    "--against", metavar="DIR|base", help="compare with this adapter, or with the base alone, on the same rows"
)
@click.option(
    "--confidence",
    type=float,
    default=0.95,
    show_default=True,
    metavar="NUMBER",
    help="of the intervals, from 0.5 to 1",
)
@click.option(
    "--resamples",
    type=click.IntRange(100),
    default=2000,
    show_default=True,
    metavar="INTEGER",
    help="draws of the rows behind an interval",
)
@click.option(
    "--shots",
    type=click.IntRange(0),
    metavar="INTEGER",
    help="ask the base in words, behind so many answered rows (0: none); of labelled rows the likeliest label word counts",
)
@click.option(
    "--shots-from",
    metavar="FILE",
    help="rows to show; by default the training rows of the recipe, or of --data where --data.eval splits it",
)
@click.option(
    "--shots-select",
    type=click.Choice(["fixed", "random", "nearest"]),
    default="fixed",
    show_default=True,
    help="the same rows for all, drawn for each, or those nearest to each by the base's own states",
)
@click.option(
    "--question",
    metavar="TEXT",
    help="with --shots: put around a labelled row; holds {text} and may hold {text2} and {labels}",
)
@click.option(
    "--label-words",
    multiple=True,
    metavar=MAPPING,
    help="with --shots: what is written for a label; write `--label-words.LABEL WORD`, as often as needed",
)
@click.option(
    "--calibrate",
    is_flag=True,
    help="with --shots: divide by what the model says of each label where the text says nothing",
)
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    against: str | None,
    confidence: float,
    resamples: int,
    shots: int | None,
    shots_from: str | None,
    shots_select: str,
    question: str | None,
    label_words: tuple[str, ...],
    calibrate: bool,
    **arguments: Any,
) -> None:
    """Score a base, or a base with an adapter, on a data set.

    Rows named with --data are all scored. Without it, those that the recipe of the adapter (or of --config) holds out.
    """
    from ingraft.bases import HEADS
    from ingraft.bases.heads import scale_of
    from ingraft.cli.contenders import contenders, folders
    from ingraft.cli.sources import model_labels, open_model, settle
    from ingraft.data.wanted import load_wanted
    from ingraft.evaluate import hold
    from ingraft.evaluate.resampling import Resampling, compared

    output = Output(as_json=as_json)
    overrides = given(arguments)
    first = next(iter(folders(adapter, against)), None)
    recipe = settle(overrides, config=config, adapter=first)
    how = Resampling(confidence=confidence, count=resamples, seed=recipe.seed)
    asked = _shots(recipe, shots, shots_from, shots_select, question, label_words, calibrate)
    if asked is not None:
        recipe = _prompted(recipe)
    split = "data.eval" in overrides
    parts = _parts(recipe, whole="data.train" in overrides and not split)
    if asked is not None and asked.count and parts == ["train"] and shots_from is None:
        raise IngraftError(
            f"--shots {asked.count}: all rows of --data are asked, so none are left to show. Name some with --shots-from FILE, or hold some out with --data.eval."
        )
    opened = open_model(
        recipe,
        first,
        output,
        trust_remote_code=trust_remote_code,
        allow_base_mismatch=allow_base_mismatch,
        reference=True,
    )
    two = None
    if against is not None:
        two = contenders(opened, adapter, against, allow_base_mismatch=allow_base_mismatch)
        if HEADS[recipe.task].fresh and any(one.name is None for one in two):
            output.say("note: the base has no head of its own for this task; it is asked with the head as it was drawn")
    hold(opened.tokenizer, opened.model)
    data = load_wanted(recipe, opened.tokenizer, model_labels(opened), scale_of(opened.model))
    output.say(*(f"note: {note}" for note in data.report.notes))
    scorers = {part: _scorer(opened, data, part, first, asked, shots_from, allow_base_mismatch) for part in parts}
    found: dict[str, Any] = {}
    for part, scorer in scorers.items():
        size, rows = recipe.per_device_eval_batch_size, data.parts[part]
        found[part] = {"rows": len(rows.examples), "source": ", ".join(origin.file for origin in rows.origins)}
        told = [dict[str, Any]() for _ in two or (None,)]
        for at, some in _by_file(data, part).items():
            outcomes: list[Outcomes] = []
            for one in two or (None,):
                with one.answering(opened.model) if one is not None else nullcontext():
                    outcomes.append(scorer.outcomes(some, part, size))
            for values, each in zip(told, outcomes, strict=True):
                values |= _told(each, how, at)
            if two is not None and at and len(some.parts[part].examples) < 2:
                output.say(f"note: {at[1:]} has a single row, so nothing is compared on it alone")
            elif two is not None:
                apart = compared(outcomes[0], outcomes[1], how)
                differences = {f"{name}{at}": dataclasses.asdict(difference) for name, difference in apart.items()}
                told[0]["difference"] = told[0].get("difference", {}) | differences
        found[part] |= told[0] | ({"against": told[1]} if two is not None else {})
        output.say(*(f"note: {note}" for note in scorer.notes))
    named: dict[str, Any] = {
        "model": recipe.model,
        "adapter": adapter,
        "against": against,
        "task": recipe.task,
        "confidence": confidence,
    }
    if asked is not None:
        named["shots"] = dataclasses.asdict(asked)
    output.result({**named, **found})
    for part in parts:
        _show(output, found[part], f"{part}_" if len(parts) > 1 else "", adapter, against)


def _parts(recipe: Recipe, *, whole: bool) -> list[str]:
    """The parts of the data that are scored."""
    if whole:
        return ["train"]
    held = [part for part, rows in (("eval", recipe.data.eval), ("test", recipe.data.test)) if rows]
    if not held:
        raise IngraftError("--data FILE is needed: the recipe holds no rows out.")
    return held


def _shots(
    recipe: Recipe,
    count: int | None,
    source: str | None,
    select: str,
    question: str | None,
    words: tuple[str, ...],
    calibrate: bool,
) -> Shots | None:
    """How rows are asked in words, if they are.

    Raises:
        IngraftError: something that belongs to --shots without it; label words that say nothing.
    """
    from ingraft.data.demonstrations import QUESTION, Shots

    if count is None:
        given = {"--shots-from": source, "--question": question, "--label-words": words, "--calibrate": calibrate}
        if alone := [name for name, value in given.items() if value]:
            raise IngraftError(f"{', '.join(alone)}: only with --shots (--shots 0 asks without showing anything).")
        return None
    pairs = [word.partition("=") for word in words]
    if bad := [word for word, (label, _, text) in zip(words, pairs, strict=True) if not label or not text]:
        raise IngraftError(*(f"--label-words {word!r}: write `--label-words.LABEL WORD`." for word in bad))
    return Shots(
        count=count,
        select=select,  # type: ignore[arg-type] - click has looked at it
        seed=recipe.seed,
        question=QUESTION if question is None else question,
        words={label: text for label, _, text in pairs},
        calibrate=calibrate,
    )


def _prompted(recipe: Recipe) -> Recipe:
    """The recipe for the task in which a base is asked in words.

    Raises:
        IngraftError: there is none for this task.
    """
    from ingraft.evaluate import SCORERS, scorer_of

    task = scorer_of(recipe.task).prompted
    if task is None:
        known = ", ".join(name for name in SCORERS if scorer_of(name).prompted is not None)
        raise IngraftError(f"--shots: task {recipe.task} cannot be asked in words; these can: {known}.")
    return dataclasses.replace(recipe, task=task)


def _scorer(
    opened: Opened,
    data: DataSet,
    part: str,
    folder: str | None,
    asked: Shots | None,
    shots_from: str | None,
    allow_base_mismatch: bool,
) -> Scorer:
    """What scores a part, told what answers earn where they do, or what to show."""
    from ingraft.data import pad_id, read_rows, task_of
    from ingraft.evaluate import scorer_of
    from ingraft.evaluate.rewards import rewards_of
    from ingraft.evaluate.scorer import ready
    from ingraft.evaluate.shots import ShotScorer

    recipe = opened.recipe
    if asked is not None:
        pool = (
            data.parts["train"].records
            if shots_from is None
            else task_of(recipe.task).read(read_rows(shots_from), recipe.data.format)[1]
        )
        known = [
            record for one in data.parts.values() for record in one.records
        ]  # what may be chosen, whatever is shown
        tokenizer = cast("PreTrainedTokenizerBase", opened.tokenizer)
        return ShotScorer(opened.model, tokenizer, asked, pool if asked.count else [], [*known, *pool])
    rewards = None
    if scorer_of(recipe.task).rewarded:
        run = Path(folder) if folder is not None else None
        pad = pad_id(opened.tokenizer)
        found = rewards_of(recipe, opened.model, pad, run, allow_base_mismatch=allow_base_mismatch)
        rewards = found if found.sources else None
    return ready(opened.model, opened.tokenizer, data, part, recipe.losses, rewards)


def _by_file(data: DataSet, part: str) -> dict[str, DataSet]:
    """All rows of a part, and those of each of its files where it has several, by what is put behind a metric's name."""
    origins = data.parts[part].origins
    files = {f"@{origin.name}": data.of(part, origin) for origin in origins if len(origins) > 1 and origin.examples}
    return {"": data, **files}


def _told(outcomes: Outcomes, how: Resampling, at: str) -> dict[str, Any]:
    """Metrics, the ends of intervals that a run's log has, and intervals."""
    from ingraft.evaluate.resampling import intervals

    ends = {f"{name}{at}_interval": between for name, between in intervals(outcomes, how).items()}
    return {f"{name}{at}": value for name, value in {**outcomes.metrics(), **outcomes.bounds()}.items()} | ends


def _show(output: Output, found: Mapping[str, Any], prefix: str, adapter: str | None, against: str | None) -> None:
    metrics = [name.removesuffix("_interval") for name in found if name.endswith("_interval")]
    about = {f"{prefix}{name}": found[name] for name in ("rows", "source")}
    if against is None:
        output.facts({**about, **{f"{prefix}{name}": _number(found, name) for name in metrics}})
        return
    output.facts(about)
    header = ["metric", adapter or "base", against, "difference", "p", "test"]
    lines: list[list[str]] = []
    for name in metrics:
        if name in found["difference"]:
            apart = found["difference"][name]
            of = f"{apart['value']:+.6f}{_between(apart['interval'])}", f"{apart['p']:.4f}", apart["test"]
            lines.append([f"{prefix}{name}", _number(found, name), _number(found["against"], name), *of])
    output.table(header, lines)


def _number(found: Mapping[str, Any], name: str) -> str:
    return f"{found[name]:.6f}{_between(found[f'{name}_interval'])}"


def _between(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"
