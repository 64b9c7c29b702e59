"""Options that come from the recipe's dataclasses, and a click command that forgives spellings and reports all that it cannot read.

A verb names the recipe keys it uses; their options, help and defaults are generated, so a new key needs no line here. Values travel as
text and are checked with the whole recipe, where every problem is reported at once, instead of by click, which would stop at the first.

Accepted spellings: `--learning-rate` and `--learning_rate`; `--data.max-length 512`; `--data FILE` for `--data.train FILE`;
`--method-config.r 16` for any key of the method, and so for every mapping of the recipe; `--packing`, `--packing true` and `--no-packing` for a yes-or-no key.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click

from ingraft.errors import IngraftError, nearest
from ingraft.recipe import recipe_fields
from ingraft.recipe.several import KEYS

Decorated = Callable[..., Any]


MAPPING = ".KEY VALUE"
"""How the options of a mapping's keys are shown, and known."""

UNKNOWN = "ingraft.unknown"
"""Where a click context keeps the options it could not read."""


class VerbCommand(click.Command):
    """A command that normalises option names first, and names every unknown option, with the nearest known one, in one error.

    Attributes:
        whole_recipe: the verb takes every key of the recipe, so that its options can be checked as one.
    """

    whole_recipe = False

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self._normalised(ctx, args))

    def _normalised(self, ctx: click.Context, args: list[str]) -> list[str]:
        known = {
            name: option for option in self.get_params(ctx) if isinstance(option, click.Option) for name in option.opts
        }
        out: list[str] = []
        unknown: list[str] = []
        words = iter(args)
        skipping = False
        for word in words:
            if word == "--":
                out += [word, *words]
                break
            if not word.startswith("--"):
                if not skipping:
                    out.append(word)
                continue
            skipping = False
            name, equals, value = word.partition("=")
            name = name.replace("_", "-")
            whole, dot, key = name.partition(".")
            if dot and whole in known and known[whole].metavar == MAPPING:
                text = value if equals else next(words, None)
                if text is None:
                    raise click.UsageError(f"Option {word!r} requires a value.", ctx)
                key = word.partition("=")[0][len(whole) + 1 :]
                out += [whole, f"{key}={text}"]
                continue
            positive = "--" + name.removeprefix("--no-")
            if (
                name not in known
                and name.startswith("--no-")
                and positive in known
                and known[positive].flag_value == "true"
            ):
                out.append(f"{positive}=false")
                continue
            if name not in known:
                hint = nearest(name, [*known, "--method-config.r"] if "--method-config" in known else known, count=1)
                unknown.append(f"there is no option {word.partition('=')[0]}{hint}.")
                skipping = not equals  # what follows is its value, if it is no option itself
                continue
            out.append(name + equals + value)
            option = known[name]
            if not equals and not option.is_flag and not _is_switch(option):
                out += _values(words, option.nargs)
        ctx.meta[UNKNOWN] = unknown
        return out

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb, unless an option was unknown: then say so together with all that is wrong with the recipe."""
        unknown: list[str] = ctx.meta[UNKNOWN]
        if not unknown:
            return super().invoke(ctx)
        if self.whole_recipe:
            from ingraft.recipe import load_recipe
            from ingraft.train.place import absent

            try:
                unknown += absent(load_recipe(ctx.params.get("config"), given(ctx.params), also=absent))
            except IngraftError as error:
                unknown += error.problems
        raise click.UsageError("\n".join(unknown), ctx)


def _values(words: Iterator[str], count: int) -> list[str]:
    return [word for _, word in zip(range(count), words, strict=False)]


def _is_switch(option: click.Option) -> bool:
    """Whether the option may stand alone: a flag, or a yes-or-no recipe key."""
    return option.is_flag or option.flag_value == "true"


def recipe_options(*keys: str) -> Callable[[Decorated], Decorated]:
    """Options for the recipe keys named (`"data"` means all of data.*), or for all of them if none is named.

    They arrive in the function as keyword arguments `recipe__KEY`; `given` turns those into overrides for `load_recipe`.
    """

    def decorate(function: Decorated) -> Decorated:
        wanted = [entry for entry in recipe_fields() if not keys or entry[0] in keys or entry[0].split(".")[0] in keys]
        for key, kind, item in reversed(wanted):
            function = _option(key, kind, item)(function)
        return function

    return decorate


def _option(key: str, kind: Any, item: Field[Any]) -> Callable[[Decorated], Decorated]:
    name = "recipe__" + key.replace(".", "__")
    meaning = str(item.metadata["help"])
    flags = ["--" + key.replace("_", "-")]
    if key == "data.train":
        flags = ["--data", "--data.train"]
    if get_origin(kind) is dict:
        return click.option(
            *flags,
            name,
            multiple=True,
            metavar=MAPPING,
            help=f"{meaning}; write `{flags[0]}.KEY VALUE`, as often as needed",
        )
    if kind is bool or bool in get_args(kind):
        shown = "on" if item.default else "off"
        return click.option(
            *flags,
            name,
            is_flag=False,
            flag_value="true",
            metavar=f"[{_metavar(kind)}]",
            help=f"{meaning}  [default: {shown}]",
        )
    note = "" if item.default in (MISSING, None, "") else f"  [default: {item.default}]"
    more = "; give it again for each further file" if key in KEYS else ""
    return click.option(
        *flags, name, metavar=_metavar(kind), help=meaning + more + note, multiple=key in KEYS, default=None
    )


def _metavar(kind: Any) -> str:
    """How a type is shown in help: `INTEGER`, `none|nf4|int8|keep`, `NUMBER|TEXT`."""
    if get_origin(kind) is Annotated:
        return _metavar(get_args(kind)[0])
    if get_origin(kind) is Literal:
        names = "|".join(get_args(kind))
        return names if len(names) < 60 else "NAME"
    if get_origin(kind) in (Union, types.UnionType):
        names = [_metavar(part) for part in get_args(kind) if part is not type(None)]
        return "|".join(dict.fromkeys(names))
    return {int: "INTEGER", float: "NUMBER", bool: "true|false"}.get(kind, "TEXT")


def given(arguments: dict[str, Any]) -> dict[str, Any]:
    """The recipe options that were really given, as overrides by dotted key."""
    from ingraft.recipe import scalar

    kinds = {key: kind for key, kind, _ in recipe_fields()}
    out: dict[str, Any] = {}
    for name, value in arguments.items():
        if not name.startswith("recipe__") or value is None or value == ():
            continue
        key = name.removeprefix("recipe__").replace("__", ".")
        if get_origin(kinds[key]) is dict:
            out[key] = _mapping(key, value)
        elif key in KEYS:
            entries = [scalar(text) if text.startswith("{") or key == "data.eval" else text for text in value]
            out[key] = entries if len(entries) > 1 else entries[0]
        else:
            out[key] = value if _is_text(kinds[key]) else scalar(value)
    return out


def _is_text(kind: Any) -> bool:
    return kind is str or get_origin(kind) is Literal or (str in get_args(kind) and float not in get_args(kind))


def _mapping(option: str, entries: Iterable[str]) -> dict[str, Any]:
    """What the entries of a recipe's mapping say: `KEY=VALUE`, or a YAML mapping."""
    from ingraft.recipe import scalar

    flag = "--" + option.replace("_", "-")
    out: dict[str, Any] = {}
    for entry in entries:
        key, equals, text = entry.partition("=")
        if equals and key.replace(".", "").replace("-", "_").isidentifier():
            # A method's keys are Python names, which may be spelled with hyphens; an adapter's name is what it is.
            out[key.replace("-", "_") if option == "method_config" else key] = scalar(text)
            continue
        mapping = scalar(entry)
        if not isinstance(mapping, dict):
            raise click.UsageError(f"{flag} {entry!r} names no key; write `{flag}.KEY VALUE`.")
        out.update({str(name): value for name, value in mapping.items()})
    return out


def verb(*keys: str, recipe: bool = True) -> Callable[[Decorated], click.Command]:
    """A command with the recipe options for `keys` and what every verb has: --config, --json, --debug."""

    def decorate(function: Decorated) -> click.Command:
        function = click.option("--debug", is_flag=True, expose_value=False, help="show the traceback of an error")(
            function
        )
        function = click.option("--json", "as_json", is_flag=True, help="print one JSON document to standard output")(
            function
        )
        if recipe:
            function = recipe_options(*keys)(function)
            function = click.option("--config", metavar="FILE", help="a recipe (YAML); options given here override it")(
                function
            )
        made = click.command(
            cls=VerbCommand, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
        )(function)
        made.whole_recipe = recipe and not keys
        return made

    return decorate


def trust_option(function: Decorated) -> Decorated:
    """--trust-remote-code: only ever from the keyboard."""
    text = "run Python code that comes with the base model; never taken from a file"
    return click.option("--trust-remote-code", is_flag=True, help=text)(function)


def adapter_option(function: Decorated) -> Decorated:
    """--adapter DIR and --allow-base-mismatch, for the verbs that load it."""
    text = "load the adapter although it was trained on another base"
    function = click.option("--allow-base-mismatch", is_flag=True, help=text)(function)
    return click.option("--adapter", metavar="DIR", help="an adapter or run folder")(function)


def needed(*options: tuple[str, str | None]) -> list[str]:
    """A sentence for each of these options that was not given."""
    return [f"{flag} is needed." for flag, value in options if not value]
