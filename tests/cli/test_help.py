"""Laws of the front door: it answers at once, and what it says about the verbs is what the verbs say."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys

import click
import pytest

from ingraft.cli.verbs import VERBS
from ingraft.recipe import recipe_fields

HEAVY = {"torch", "transformers", "pydantic", "yaml", "rich", "numpy", "jinja2", "accelerate"}


def modules_after(code: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after `code`."""
    report = "import json, sys; print('\\n' + json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["compare"], ["inspect", "--help"], ["train", "--help"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Help, the version and an unknown verb need neither torch nor transformers nor pydantic."""
    assert not modules_after(f"from ingraft.cli.main import main; main({words!r})") & HEAVY


def test_import_ingraft_imports_nothing_heavy() -> None:
    """`import ingraft` is free."""
    assert not modules_after("import ingraft") & (HEAVY | {"click"})


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_is_what_the_table_says(verb: str) -> None:
    """Each verb exists, its first line of help is its line in the table, every option is explained, and it has --json and --debug."""
    command = importlib.import_module(f"ingraft.cli.{verb}").command
    assert isinstance(command, click.Command)
    assert command.help is not None
    assert command.help.splitlines()[0] == VERBS[verb]
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert all(option.help for option in options)
    assert {"--json", "--debug"} <= {name for option in options for name in option.opts}


def test_train_explains_every_key() -> None:
    """`ingraft train --help` shows every recipe key with its meaning and its default."""
    from click.testing import CliRunner

    from ingraft.cli.verbs import cli

    text = CliRunner().invoke(cli, ["train", "--help"], terminal_width=200).output
    for key, _, item in recipe_fields():
        assert f"--{key.replace('_', '-')}" in text
        assert item.metadata["help"].split(":")[0] in " ".join(text.split())
        if isinstance(item.default, int | float | str) and item.default and not isinstance(item.default, bool):
            assert f"[default: {item.default}]" in " ".join(text.split())
