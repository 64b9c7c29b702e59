"""`ingraft methods`: the catalogue, from the registry's records; with --model, what each method would train on that base."""

from __future__ import annotations

from typing import Any

import click

from ingraft.cli.options import trust_option, verb
from ingraft.cli.output import Output


@verb(recipe=False)
@click.option("--model", metavar="TEXT", help="count the parameters each method trains on this base, with its defaults")
@trust_option
@click.argument("name", required=False)
def command(name: str | None, model: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """List the tuning methods: family, parameters for a given model, mergeable, paper.

    With NAME, that method's options and their defaults.
    """
    from ingraft.methods import registry

    output = Output(as_json=as_json)
    if name is not None:
        _show_one(name, output)
        return
    found: list[dict[str, Any]] = [
        {
            "name": record.name,
            "family": record.family,
            "summary": record.summary,
            "equation": record.equation,
            "mergeable": record.mergeable,
            "paper": record.paper,
        }
        for record in registry.records().values()
    ]
    if model is not None:
        counts = count_parameters(model, [entry["name"] for entry in found], trust_remote_code=trust_remote_code)
        for entry in found:
            entry["parameters"], entry["refused"] = counts[entry["name"]]
    output.result(found)
    columns = ["name", "family", *(["parameters"] if model is not None else []), "mergeable", "summary", "paper"]
    output.table(columns, [[entry[column] for column in columns] for entry in found])
    for entry in found:
        if entry.get("refused"):
            output.say(f"{entry['name']} on this base: {entry['refused']}")


def count_parameters(
    model: str, names: list[str], *, trust_remote_code: bool = False
) -> dict[str, tuple[int | None, str | None]]:
    """How many parameters each method trains on a base with its default settings, or why the base refuses it.

    By the methods' formulas, which the laws hold against the real tensors; nothing is attached.
    """
    from ingraft.adapt import expected_count
    from ingraft.bases import load_base
    from ingraft.errors import IngraftError
    from ingraft.methods import registry

    base = load_base(model, trust_remote_code=trust_remote_code).model
    out: dict[str, tuple[int | None, str | None]] = {}
    for name in names:
        try:
            out[name] = expected_count(base, registry.make_config(name, {})), None
        except IngraftError as error:
            out[name] = None, " ".join(error.problems)
    return out


def _show_one(name: str, output: Output) -> None:
    from dataclasses import MISSING, fields

    from ingraft.methods import registry

    record = registry.record(name)
    config = registry.load(name).config
    options = [
        {"key": field.name, "default": None if field.default is MISSING else field.default} for field in fields(config)
    ]
    output.result(
        {
            "name": record.name,
            "family": record.family,
            "summary": record.summary,
            "equation": record.equation,
            "mergeable": record.mergeable,
            "paper": record.paper,
            "options": options,
        }
    )
    output.facts(
        {
            "name": record.name,
            "family": record.family,
            "what": record.summary,
            "equation": record.equation,
            "mergeable": record.mergeable,
            "paper": record.paper,
        }
    )
    output.say("")
    output.table(["--method-config.", "default"], [[option["key"], option["default"]] for option in options])
