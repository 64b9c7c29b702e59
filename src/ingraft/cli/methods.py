"""`ingraft methods`: the catalogue, from the registry's records; with --model, what each method would train on that base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from ingraft.cli.options import trust_option, verb
from ingraft.cli.output import Output

if TYPE_CHECKING:
    from ingraft.methods import registry


@verb(recipe=False)
@click.option("--model", metavar="TEXT", help="count the parameters each method trains on this base, with its defaults")
@trust_option
@click.argument("name", required=False)
def command(name: str | None, model: str | None, trust_remote_code: bool, as_json: bool) -> None:
    """List the tuning methods: equation, paper, what they train, where they act, whether they merge.

    Parameters are counted for two well-known shapes, or for the base given with --model. With NAME, that method alone, with its options and their defaults.
    """
    from ingraft.methods import registry

    output = Output(as_json=as_json)
    known = registry.records().values() if name is None else [registry.record(name)]
    entries = [entry(record) for record in known]
    if model is not None:
        counts = count_parameters(model, [one["name"] for one in entries], trust_remote_code=trust_remote_code)
        for one in entries:
            one["parameters"], one["refused"] = counts[one["name"]]
    if name is not None:
        _show_one(entries[0], output)
        return
    output.result(entries)
    width = max(len(one["name"]) for one in entries)
    families = list(dict.fromkeys(one["family"] for one in entries))
    family = None
    for one in sorted(entries, key=lambda one: families.index(one["family"])):
        if one["family"] != family:
            family = one["family"]
            output.say("", f"{family} methods", "")
        indent = " " * (width + 4)
        output.say(
            f"  {one['name']:<{width}}  {one['summary']}", f"{indent}{one['equation']}", f"{indent}{one['paper']}"
        )
        output.say(f"{indent}{_trains(one)}", f"{indent}{_can(one)}")


def entry(record: registry.MethodRecord) -> dict[str, Any]:
    """What the catalogue says of one method."""
    from ingraft.adapt.capabilities import capabilities
    from ingraft.shapes import NEEDED, counts

    can = capabilities(record.name)
    return {
        "name": record.name,
        "family": record.family,
        "summary": record.summary,
        "equation": record.equation,
        "shapes": counts(record.name),
        "shapes_with": NEEDED.get(record.name, {}),
        "layers": can.layers,
        "mergeable": can.mergeable,
        "quantised": can.quantised,
        "kept": can.kept,
        "mixed_rows": can.mixed_rows,
        "one_call": can.one_call,
        "paper": record.paper,
    }


def _trains(one: dict[str, Any]) -> str:
    if one.get("refused"):
        return f"not on this base: {one['refused']}"
    if "parameters" in one:
        return f"trains {one['parameters']:,} of this base"
    counted = [f"{count:,} of {shape}" for shape, count in one["shapes"].items() if count is not None]
    if not counted:
        return "what it trains depends on what is attached"
    needed = " ".join(
        f"--method-config.{key.replace('_', '-')} {str(value).lower()}" for key, value in one["shapes_with"].items()
    )
    return f"trains {' and '.join(counted)}" + (f" with {needed}; default options are refused there" if needed else "")


def _can(one: dict[str, Any]) -> str:
    merges = "merges" if one["mergeable"] else "does not merge"
    quantised = "over quantised bases too" if one["quantised"] else "not over quantised bases"
    if one["quantised"] and not one["kept"]:
        quantised = "over nf4 and int8 bases too, not over a GGUF's own blocks"
    return f"on {', '.join(one['layers'])}; {merges}; {quantised}; mixed rows: {one['mixed_rows']}"


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


def _show_one(one: dict[str, Any], output: Output) -> None:
    from dataclasses import MISSING, fields

    from ingraft.methods import registry

    config = registry.load(one["name"]).config
    options = [
        {"key": field.name, "default": None if field.default is MISSING else field.default} for field in fields(config)
    ]
    output.result({**one, "options": options})
    output.facts(
        {
            "name": one["name"],
            "family": one["family"],
            "what": one["summary"],
            "equation": one["equation"],
            "trains": _trains(one).removeprefix("trains "),
            "where": _can(one),
            "paper": one["paper"],
        }
    )
    output.say("")
    output.table(["--method-config.", "default"], [[option["key"], option["default"]] for option in options])
