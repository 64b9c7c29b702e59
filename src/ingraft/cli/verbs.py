"""The table of verbs, and the click group that imports a verb's module only when the verb is used.

The summaries stand here and not in the verbs' modules, because `ingraft --help` would otherwise have to import them all; the test
`tests/cli/test_help.py` keeps both equal.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from ingraft.errors import nearest

VERBS = {
    "train": "Train one adapter, or the whole model, from a recipe: writes a run folder.",
    "eval": "Score a base, or a base with an adapter, on a data set.",
    "chat": "Talk to a base with one adapter, or switch adapters while talking.",
    "predict": "Answer every row of a file: a file in, a file out.",
    "rank": "Sample several answers to each prompt and collect a person's order of them on a local page.",
    "merge": "Write an adapter into its base: a plain model folder, checked against the unmerged model.",
    "convert": "Rewrite an adapter of any mergeable method as a LoRA of a given rank.",
    "inspect": "Say what an adapter folder is: method, sites, parameters, base, metrics.",
    "methods": "List the tuning methods: equation, paper, what they train, where they act, whether they merge.",
    "models": "List the bases at hand without a hub.",
    "data": "Preview a data file as the model will see it: format, template, which tokens are learned.",
}


class LazyGroup(click.Group):
    """Looks a verb up in `VERBS` and imports `ingraft.cli.<verb>`, whose `command` it is."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        return importlib.import_module(f"ingraft.cli.{cmd_name}").command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in VERBS:
            known = ", ".join(VERBS)
            raise click.UsageError(
                f"unknown command {args[0]!r}{nearest(args[0], VERBS)}; the commands are {known}.", ctx
            )
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))


def _version(ctx: click.Context, param: click.Parameter, value: Any) -> None:
    del param
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version

        click.echo(f"ingraft {version('ingraft')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_version, help="Show the version and exit."
)
@click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of an error.")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Fine-tune any pretrained model by grafting small trained parts onto it.

    `ingraft VERB --help` explains a verb with all its options and their defaults.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
