"""`ingraft predict`: every row of a file answered, in the order of the file.

Rows need no answer; where one is there it stays in the row, and the model never sees it. The output file appears when it is complete; what an interrupted
run has answered lies beside it, as NAME.partial.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingraft.cli.options import adapter_option, given, trust_option, verb
from ingraft.cli.output import Output, jsonable
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.data import Row

Answers = dict[int, dict[str, Any]]
"""What a row gets, by the row's position."""


@verb(
    "model",
    "task",
    "data.train",
    "data.format",
    "data.max_length",
    "data.stride",
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
    from ingraft.cli.sources import model_labels, open_model, settle
    from ingraft.data import read_rows
    from ingraft.evaluate import Asked, scorer_of
    from ingraft.recipe import sources_of

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
    rows = [row for source in sources_of(recipe.data.train) for row in read_rows(source.file)]
    scorer = scorer_of(recipe.task)
    _check_free(rows, scorer.adds)
    opened = open_model(
        recipe, adapter, output, trust_remote_code=trust_remote_code, allow_base_mismatch=allow_base_mismatch
    )
    answers = Answers()
    asked = Asked(
        form=recipe.data.format,
        max_length=recipe.data.max_length,
        stride=recipe.data.stride,
        truncation=recipe.data.truncation,
        batch_size=recipe.per_device_eval_batch_size,
        max_new_tokens=max_new_tokens,
        say=output.say,
    )
    try:
        scorer(opened.model, opened.tokenizer, model_labels(opened)).predict(rows, asked, answers.__setitem__)
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


def _check_free(rows: Sequence[Row], fields: Sequence[str]) -> None:
    """Refuse rows in which an answer would take the place of something."""
    for field in fields:
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
