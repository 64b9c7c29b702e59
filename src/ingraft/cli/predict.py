"""`ingraft predict`: every row of a file answered, in the order of the file.

Rows need no answer; where one is there it stays in the row, and the model never sees it. The output file appears when it is complete; what an interrupted
run has answered lies beside it, as NAME.partial.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import click

from ingraft.cli.options import adapter_option, given, trust_option, verb
from ingraft.cli.output import Output, jsonable
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.cli.sources import Opened
    from ingraft.data import Row
    from ingraft.data.records import Chat, Record

ANSWERS = {"instruction": "output", "prompt": "completion", "text": "label"}
"""The field that makes a row recognisable -> the field that holds its answer, which a row to be answered may lack."""

TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""The fields that hold turns, and what the turns' own fields are called; the last answer may be lacking."""

Answers = dict[int, dict[str, Any]]
"""What a row gets, by the row's position."""


@verb(
    "model",
    "task",
    "data.train",
    "data.format",
    "data.max_length",
    "dtype",
    "quantization",
    "per_device_eval_batch_size",
)
@adapter_option
@trust_option
@click.option("--output", "target", metavar="FILE", help="the jsonl file to write: the rows, each with a `prediction`")
@click.option("--overwrite", is_flag=True, help="replace an output file that is there")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=128,
    show_default=True,
    metavar="INTEGER",
    help="longest answer, in tokens",
)
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    target: str | None,
    overwrite: bool,
    max_new_tokens: int,
    **arguments: Any,
) -> None:
    """Answer every row of a file: a file in, a file out.

    The likeliest answer of each row; for a classifier its class, with the probabilities.
    """
    from ingraft import durable
    from ingraft.cli.sources import open_model, settle
    from ingraft.data import read_rows

    output = Output(as_json=as_json)
    overrides = given(arguments)
    problems: list[str] = []
    if "data.train" not in overrides:
        problems.append("--data FILE is needed: the rows to answer.")
    if target is None:
        problems.append("--output FILE is needed.")
    elif Path(target).exists() and not overwrite:
        problems.append(f"--output {target}: exists; choose another name, or add --overwrite.")
    recipe = None
    try:
        recipe = settle(overrides, config=config, adapter=adapter)
    except IngraftError as error:
        problems += [problem for problem in error.problems if "pass --data" not in problem]
    if problems or recipe is None or target is None:
        raise IngraftError(*problems)
    rows = read_rows(recipe.data.train)
    _check_free(rows, classify=recipe.task == "classify")
    opened = open_model(
        recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
    )
    size, answers = recipe.per_device_eval_batch_size, Answers()
    try:
        if recipe.task == "classify":
            classes(opened, rows, size, answers, output)
        else:
            texts(opened, rows, size, max_new_tokens, answers, output)
    except BaseException as error:  # Ctrl-C above all: hours of answers may be there
        kept = _keep(target, rows, answers)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(kept) from None
        if answers:
            click.echo(kept, err=True)
        raise
    durable.write_file(target, _lines(rows, answers))
    output.result({"output": target, "rows": len(rows)})
    output.say(f"{len(rows)} rows written to {target}")


def _check_free(rows: Sequence[Row], *, classify: bool) -> None:
    """Refuse rows in which an answer would take the place of something."""
    for field in ("prediction", "scores") if classify else ("prediction",):
        if holding := [row for row in rows if field in row.values]:
            raise IngraftError(
                f"{holding[0].place}: the rows have a field '{field}' already ({len(holding)} of {len(rows)}), and the answer would replace it. "
                "Rename that field, or leave it out."
            )


def _lines(rows: Sequence[Row], answers: Answers) -> str:
    """The answered rows in the file's order, a line of JSON each."""
    found = ({**rows[i].values, **answers[i]} for i in sorted(answers))
    return "".join(json.dumps(jsonable(values), ensure_ascii=False) + "\n" for values in found)


def _keep(target: str, rows: Sequence[Row], answers: Answers) -> str:
    """Write what is answered so far beside the output file, under a name of its own. Returns what to tell."""
    from ingraft import durable

    if not answers:
        return "No row was answered yet, so nothing was written."
    names = (f"{target}.partial", *(f"{target}.partial-{n}" for n in range(2, 1000)))
    partial = next((name for name in names if not Path(name).exists()), names[0])  # an earlier one may hold more
    durable.write_file(partial, _lines(rows, answers))
    return f"{len(answers)} of {len(rows)} rows were answered; they are in {partial}. {target} was not written."


def texts(
    opened: Opened, rows: Sequence[Row], size: int, max_new_tokens: int, answers: Answers, output: Output
) -> None:
    """The greedy answer to every row.

    Raises:
        IngraftError: rows that cannot be used, or whose prompt leaves no place for an answer; by file and line.
    """
    from ingraft.data.rows import refuse
    from ingraft.evaluate import generate
    from ingraft.evaluate.room import room

    prompts = [_prompt(record, opened) for record in _records(opened, rows)]
    most = room(opened.model)
    full = [
        f"{row.place}: its prompt takes {len(prompt)} tokens"
        for row, prompt in zip(rows, prompts, strict=True)
        if len(prompt) >= most
    ]
    if full:
        refuse(
            full,
            summary=f"{len(full)} of {len(rows)} rows leave no room for an answer: the base has places for {most} tokens. Shorten them, or leave "
            "them out.",
        )
    if short := sum(most - len(prompt) < max_new_tokens for prompt in prompts):
        output.say(
            f"note: {short} rows have room for fewer than {max_new_tokens} new tokens, because the base has places for {most}"
        )

    def done(position: int, answer: str) -> None:
        answers[position] = {"prediction": answer}

    generate(opened.model, opened.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=size, done=done)


def classes(opened: Opened, rows: Sequence[Row], size: int, answers: Answers, output: Output) -> None:
    """The likeliest class of every row, and the probability of each class."""
    from ingraft.cli.sources import model_labels
    from ingraft.data import encode_classify, pad_id
    from ingraft.data.examples import Tally
    from ingraft.evaluate import hold, score_classes

    names = model_labels(opened)
    assert names is not None, "only a classifier is asked for classes"
    asked = [replace(row, values={**row.values, "label": names[0]}) for row in rows]  # any class: it is not looked at
    hold(opened.tokenizer, opened.model)
    wanted, tally = opened.recipe.data, Tally()
    longest = min(wanted.max_length, opened.tokenizer.model_max_length)
    examples = encode_classify(asked, opened.tokenizer, names, longest, form=wanted.format, tally=tally)
    if tally.cut:
        output.say(f"note: {tally.cut} rows were cut at {longest} tokens")

    def done(position: int, best: int, shares: Sequence[float]) -> None:
        scores = dict(zip(names, (round(p, 6) for p in shares), strict=True))
        answers[position] = {"prediction": names[best], "scores": scores}

    score_classes(opened.model, examples, pad_id(opened.tokenizer), size, done=done)


def _records(opened: Opened, rows: Sequence[Row]) -> list[Record]:
    """What the rows mean, with a stand-in where an answer is missing."""
    from ingraft.data import read_records

    whole: list[Row] = []
    for row in rows:
        values = dict(row.values)
        for field, answer in ANSWERS.items():
            if field in values and _absent(values.get(answer)) and (answer != "label" or row.reader != "txt"):
                values[answer] = "?"
        for field, (role, text) in TURNS.items():
            if field in values:
                values[field] = _answered(values[field], role, text)
        whole.append(replace(row, values=values))
    return read_records(whole, opened.recipe.data.format)[1]


def _absent(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _answered(turns: Any, role: str, text: str) -> Any:
    """The turns with a stand-in for the answer that is wanted, in the place of one that is there. What is no list of turns is left for the
    reader to name."""
    from ingraft.data.formats import ROLES

    if not isinstance(turns, list) or not turns:
        return turns
    known, stand_in = cast("list[Any]", turns), {role: "assistant", text: "?"}
    if not isinstance(known[-1], dict):
        return known
    speaker = ROLES.get(str(cast("dict[str, Any]", known[-1]).get(role)).lower())
    return [*(known[:-1] if speaker == "assistant" else known), stand_in]


def _prompt(record: Record, opened: Opened) -> list[int]:
    """The tokens after which the model answers this row."""
    from ingraft.data import encode_prompt, prompt_messages
    from ingraft.data.chat import begins_with_bos, has_template
    from ingraft.data.examples import as_chat
    from ingraft.data.records import Document

    tokenizer = opened.tokenizer
    chat: Chat | None = as_chat(record)
    if isinstance(record, Document):
        chat = None if opened.recipe.task == "lm" else _question(record.text)
    if chat is not None and (has_template(tokenizer) or not chat.plain):
        return encode_prompt(prompt_messages(chat.messages), tokenizer)
    text = record.text if isinstance(record, Document) else chat.messages[0]["content"] if chat is not None else ""
    begin = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
    return cast("list[int]", tokenizer.encode(begin + text, add_special_tokens=False, verbose=False))


def _question(text: str) -> Chat:
    from ingraft.data.records import Chat

    return Chat(messages=({"role": "user", "content": text},))
