"""`ingraft rank`: several answers to each prompt, put in order by a person on a local page, as rows for a reward model.

The answers are sampled while the person ranks. Sampling happens in the main thread, where Ctrl-C arrives at once; the page's server needs the others only.
"""

from __future__ import annotations

import json
import sys
import webbrowser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ingraft.cli.options import adapter_option, given, trust_option, verb
from ingraft.cli.output import Output, shorten
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.cli.sources import Opened
    from ingraft.data import Row
    from ingraft.data.records import Message, Ranking, Record
    from ingraft.ranking.answers import Sampling
    from ingraft.ranking.desk import Desk, Prompt, Question

MOST = 9
"""Answers to a prompt: a page has as many keys."""


@verb("model", "data.train", "data.format", "dtype", "quantization")
@adapter_option
@trust_option
@click.option(
    "--output",
    "target",
    metavar="FILE",
    help="the jsonl file of ranked rows; what it holds already is kept and not asked again",
)
@click.option(
    "--num-answers",
    type=click.IntRange(2, MOST),
    default=4,
    show_default=True,
    metavar="INTEGER",
    help="answers to a prompt",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="INTEGER",
    help="longest answer, in tokens",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0, min_open=True),
    default=1.0,
    show_default=True,
    metavar="NUMBER",
    help="higher is freer",
)
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    show_default=True,
    metavar="NUMBER",
    help="sample from the likeliest tokens of this total probability",
)
@click.option("--seed", default=0, show_default=True, metavar="INTEGER", help="of sampling")
@click.option(
    "--sample-only",
    is_flag=True,
    help="write the answers to --output, without an order, and leave; rank that file later",
)
@click.option("--host", default="127.0.0.1", show_default=True, metavar="NAME", help="address that the page listens on")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=0,
    show_default="a free one",
    metavar="INTEGER",
    help="port of the page",
)
@click.option("--no-browser", is_flag=True, help="only print the page's address")
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    target: str | None,
    num_answers: int,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    sample_only: bool,
    host: str,
    port: int,
    no_browser: bool,
    **arguments: Any,
) -> None:
    """Sample several answers to each prompt and collect a person's order of them on a local page.

    --data holds rows with a prompt; those that bring `responses` are ranked as they are. The result is what `ingraft train --task reward` learns from.
    """
    from ingraft import durable
    from ingraft.cli.sources import open_model, settle
    from ingraft.data import read_rows
    from ingraft.evaluate import scorer_of
    from ingraft.ranking.answers import Sampling
    from ingraft.ranking.desk import Desk, as_key
    from ingraft.ranking.server import serving
    from ingraft.recipe import sources_of

    output = Output(as_json=as_json)
    overrides = given(arguments)
    problems: list[str] = []
    if "data.train" not in overrides:
        problems.append("--data FILE is needed: the rows with prompts.")
    if target is None:
        problems.append("--output FILE is needed.")
    elif sample_only and Path(target).exists():
        problems.append(f"--output {target}: exists, and --sample-only writes a new file; choose another name.")
    recipe = None
    try:
        recipe = settle(overrides, config=config, adapter=adapter)
        if not scorer_of(recipe.task).writes:
            problems.append(f"{adapter}: is for the task {recipe.task!r} and writes no answers.")
    except IngraftError as error:
        problems += [problem for problem in error.problems if "pass --data" not in problem]
    if problems or recipe is None or target is None:
        raise IngraftError(*problems)
    rows = [row for source in sources_of(recipe.data.train) for row in read_rows(source.file)]
    entries = _entries(rows, recipe.data.format)
    desk = Desk(Path(target), [entry.prompt for entry in entries])
    entries = [entry for entry in entries if as_key(entry.prompt) not in desk.known]
    opened = None
    if any(entry.record is not None for entry in entries):
        opened = open_model(
            recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
        )
    how = Sampling(count=num_answers, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    questions = _questions(_asked(entries, opened, output), opened, how, output)
    if sample_only:
        count = 0
        for one in questions:
            row = {"prompt": one.prompt, "responses": one.responses}
            durable.append_line(target, json.dumps(row, ensure_ascii=False))
            count += 1
        output.result({"output": target, "rows": count})
        output.say(f"{count} rows written to {target}; rank them with `ingraft rank --data {target} --output FILE`")
        return
    try:
        with serving(desk, host, port) as address:
            output.say(f"the page      {address}", f"rows go to    {target}", "Ctrl-C ends; what is ranked is kept.")
            if not no_browser and sys.stdout.isatty():
                webbrowser.open(address)
            for question in questions:
                desk.put(question)
            desk.full()
            desk.complete.wait()
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_told(desk)) from None
    output.result({"output": target, "ranked": desk.given})
    output.say(_told(desk), *([f"next: ingraft train --task reward --data {target}"] if desk.given else []))


def _told(desk: Desk) -> str:
    return f"{desk.given} prompts were ranked; {desk.target} holds {len(desk.known) + desk.given} of {desk.total}."


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A prompt that is to be ranked: with answers of its own, or with the record that they are sampled for."""

    prompt: Prompt
    record: Record | None = None
    responses: list[str] | None = None


def _entries(rows: Sequence[Row], form: str) -> list[Entry]:
    """The prompts, each once.

    Raises:
        IngraftError: rows without a prompt, or with answers that are none.
    """
    from ingraft.data import read_records
    from ingraft.data.prompts import asked
    from ingraft.data.tasks import task_of
    from ingraft.ranking.desk import as_key

    found: list[Entry] = []
    if any("responses" in row.values for row in rows):
        records = read_records([_with_order(row) for row in rows], "ranking")[1]
        problems: list[str] = []
        for record, row in zip(cast("list[Ranking]", records), rows, strict=True):
            texts = list(dict.fromkeys(record.answers))
            if 2 <= len(texts) <= MOST:
                found.append(Entry(prompt=_prompt(record.messages), responses=texts))
            else:
                problems.append(f"{row.place}: has {len(texts)} different responses; 2 to {MOST} can be ranked.")
        if problems:
            raise IngraftError(*problems[:10], *([f"and {len(problems) - 10} more rows."] if problems[10:] else []))
    else:
        records = task_of("ppo").read(rows, form)[1]
        found = [Entry(prompt=_prompt(asked(record)), record=record) for record in records]
    return list({as_key(entry.prompt): entry for entry in found}.values())


def _with_order(row: Row) -> Row:
    """The row with some order, so that it can be read as one that is ranked."""
    from ingraft.data import Row

    responses = row.values.get("responses")
    order = list(range(1, len(cast("list[Any]", responses)) + 1)) if isinstance(responses, list) else None
    return Row(values={**row.values, "ranking": order}, file=row.file, line=row.line, reader=row.reader)


def _prompt(turns: Sequence[Message]) -> Prompt:
    """The turns as a row has them: a lone question is a text."""
    lone = len(turns) == 1 and turns[0]["role"] == "user"
    return turns[0]["content"] if lone else [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def _asked(entries: Sequence[Entry], opened: Opened | None, output: Output) -> list[tuple[Entry, list[int] | None]]:
    """The entries with the tokens after which a model answers; those that it cannot answer are told of and left out, before anybody begins."""
    from ingraft.data.prompts import prompt_tokens
    from ingraft.data.rows import RowProblem
    from ingraft.evaluate.room import room

    found: list[tuple[Entry, list[int] | None]] = []
    for entry in entries:
        if entry.record is None or opened is None:
            found.append((entry, None))
            continue
        try:
            tokens = prompt_tokens(entry.record, cast("PreTrainedTokenizerBase", opened.tokenizer))
        except RowProblem as problem:
            output.say(f"note: left out, {problem}: {_short(entry.prompt)}")
            continue
        if len(tokens) < room(opened.model):
            found.append((entry, tokens))
        else:
            output.say(f"note: left out, for it leaves no room for an answer: {_short(entry.prompt)}")
    return found


def _short(prompt: Prompt) -> str:
    return shorten(json.dumps(prompt, ensure_ascii=False)[:100])


def _questions(
    entries: Sequence[tuple[Entry, list[int] | None]], opened: Opened | None, how: Sampling, output: Output
) -> Iterator[Question]:
    """The prompts with their answers, as these are there."""
    from ingraft.ranking.answers import different_answers
    from ingraft.ranking.desk import Question

    for entry, tokens in entries:
        responses = entry.responses
        if responses is None:
            assert opened is not None and tokens is not None
            tokenizer = cast("PreTrainedTokenizerBase", opened.tokenizer)
            responses = different_answers(opened.model, tokenizer, tokens, how)
        if len(responses) < 2:
            output.say(f"note: left out, for there were no two different answers: {_short(entry.prompt)}")
            continue
        yield Question(prompt=entry.prompt, responses=responses)
