"""`ingraft data`: rows as the model will see them, learned tokens in colour, and the counts that training would start from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ingraft.cli.options import given, trust_option, verb
from ingraft.cli.output import Output

if TYPE_CHECKING:
    from ingraft.data import DataSet
    from ingraft.recipe import Recipe

_DEFAULT_BASE = "smollm2"


@verb("model", "task", "data", "seed")
@trust_option
@click.option(
    "--rows", type=click.IntRange(0), default=3, show_default=True, metavar="INTEGER", help="how many rows to show"
)
def command(config: str | None, as_json: bool, trust_remote_code: bool, rows: int, **arguments: Any) -> None:
    """Preview a data file as the model will see it: format, template, which tokens are learned.

    Only the base's tokenizer, or image processor, is loaded. In colour on a terminal, elsewhere what is learned stands in ⟦brackets⟧.
    """
    from ingraft.bases import load_reader
    from ingraft.cli.sources import settle
    from ingraft.data import preview, task_of
    from ingraft.data.wanted import load_wanted
    from ingraft.errors import IngraftError
    from ingraft.train.place import absent

    output = Output(as_json=as_json)
    overrides = given(arguments)
    if config is None:
        overrides.setdefault("model", _DEFAULT_BASE)
    recipe = settle(overrides, config=config, keep_split=True)
    if problems := absent(recipe):  # before seconds go into what would be read first
        raise IngraftError(*problems)
    tokenizer = load_reader(recipe.model, recipe.task, trust_remote_code)
    data = load_wanted(recipe, tokenizer)
    part = data.parts["train"]
    used = {example.row_id for example in part.examples}  # a dropped row has nothing to show; the report names it
    rows_to_show = [row for n, row in enumerate(part.rows) if task_of(recipe.task).blocks or n in used][:rows]
    shown = [
        {
            "place": row.place,
            "tokens": preview(
                row,
                tokenizer,
                task=recipe.task,
                form=recipe.data.format,
                max_length=data.report.max_length,
                learn=recipe.data.learn,
                truncation=recipe.data.truncation,
            ),
        }
        for row in rows_to_show
    ]
    _print(recipe, data, shown, output)


def _print(recipe: Recipe, data: DataSet, shown: list[dict[str, Any]], output: Output) -> None:
    rows = [
        {"place": entry["place"], "tokens": [{"text": t, "learned": learned} for t, learned in entry["tokens"]]}
        for entry in shown
    ]
    output.result({"model": recipe.model, "report": data.report.as_dict(), "rows": rows})
    if output.as_json:
        return
    output.say(f"as {recipe.model} reads it", *data.report.lines())
    for entry in shown:
        output.say("", f"{entry['place']}  ({sum(learned for _, learned in entry['tokens'])} learned)")
        output.say(render(entry["tokens"], colour=output.fancy))


def render(tokens: list[tuple[str, bool]], *, colour: bool) -> str:
    """One text with the learned stretches marked: green on a terminal, in brackets elsewhere."""
    stretches: list[tuple[str, bool]] = []
    for text, learned in tokens:
        if stretches and stretches[-1][1] == learned:
            stretches[-1] = (stretches[-1][0] + text, learned)
        else:
            stretches.append((text, learned))
    if colour:
        return "".join(
            click.style(text, fg="green", bold=True) if learned else click.style(text, dim=True)
            for text, learned in stretches
        )
    return "".join(f"⟦{text}⟧" if learned else text for text, learned in stretches)
