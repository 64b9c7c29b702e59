"""`ingraft predict`: every row of a file answered, in the order of the file.

Rows need no answer; where one is there it stays in the row, and the model never sees it. The output file appears when it is complete.
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
@click.option("--max-new-tokens", default=128, show_default=True, metavar="INTEGER", help="longest answer, in tokens")
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
    opened = open_model(
        recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
    )
    size = recipe.per_device_eval_batch_size
    answers = classes(opened, rows, size) if recipe.task == "classify" else texts(opened, rows, size, max_new_tokens)
    lines = [
        json.dumps(jsonable({**row.values, **answer}), ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    durable.write_file(target, "\n".join(lines) + "\n")
    output.result({"output": target, "rows": len(rows)})
    output.say(f"{len(rows)} rows written to {target}")


def texts(opened: Opened, rows: Sequence[Row], size: int, max_new_tokens: int) -> list[dict[str, Any]]:
    """The greedy answer to every row."""
    from ingraft.evaluate import generate

    prompts = [_prompt(record, opened) for record in _records(opened, rows)]
    answers = generate(opened.model, opened.tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=size)
    return [{"prediction": answer} for answer in answers]


def classes(opened: Opened, rows: Sequence[Row], size: int) -> list[dict[str, Any]]:
    """The likeliest class of every row, and the probability of each class."""
    from ingraft.cli.sources import model_labels
    from ingraft.data import encode_classify, pad_id
    from ingraft.evaluate import score_classes

    names = model_labels(opened)
    assert names is not None, "only a classifier is asked for classes"
    asked = [replace(row, values={**row.values, "label": names[0]}) for row in rows]  # any class: it is not looked at
    recipe = opened.recipe
    examples = encode_classify(asked, opened.tokenizer, names, recipe.data.max_length, form=recipe.data.format)
    scores = score_classes(opened.model, examples, pad_id(opened.tokenizer), size)
    return [
        {"prediction": names[best], "scores": dict(zip(names, (round(p, 6) for p in shares), strict=True))}
        for best, shares in zip(scores.predictions, scores.probabilities, strict=True)
    ]


def _records(opened: Opened, rows: Sequence[Row]) -> list[Record]:
    """What the rows mean, with a stand-in where an answer is missing."""
    from ingraft.data import read_records

    whole: list[Row] = []
    for row in rows:
        values = dict(row.values)
        for field, answer in ANSWERS.items():
            if field in values and values.get(answer) is None and (answer != "label" or row.reader != "txt"):
                values[answer] = "?"
        turns = values.get("messages")
        if isinstance(turns, list) and turns and dict(turns[-1]).get("role") != "assistant":
            values["messages"] = [*turns, {"role": "assistant", "content": "?"}]
        whole.append(replace(row, values=values))
    return read_records(whole, opened.recipe.data.format)[1]


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
    return cast("list[int]", tokenizer.encode(begin + text, add_special_tokens=False))


def _question(text: str) -> Chat:
    from ingraft.data.records import Chat

    return Chat(messages=({"role": "user", "content": text},))
