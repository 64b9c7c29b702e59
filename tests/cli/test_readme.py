"""Laws of the front page: both languages give the same commands, and the commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from ingraft.cli.verbs import VERBS, cli

ROOT = Path(__file__).parents[2]


def blocks(name: str) -> list[tuple[str, str]]:
    """The fenced blocks of a page as (language, content)."""
    return re.findall(
        r"^```(\w*)\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL
    )


def commands(name: str) -> list[list[str]]:
    lines = [line for language, text in blocks(name) if language == "bash" for line in text.splitlines()]
    return [shlex.split(line) for line in lines if line.startswith("ingraft ")]


def test_both_languages_show_the_same_code() -> None:
    """The fenced code blocks of README.md and README.zh-CN.md are equal."""
    assert len(blocks("README.md")) >= 8
    assert blocks("README.md") == blocks("README.zh-CN.md")


def test_both_languages_show_the_same_methods() -> None:
    """The tables name the same methods, the ones that the registry has."""
    from ingraft.methods import registry

    rows = [
        re.findall(r"^\| [^|]+ \| (`[^|]+`) \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
        for page in ("README.md", "README.zh-CN.md")
    ]
    assert rows[0] == rows[1]
    families: dict[str, list[str]] = {}
    for record in registry.records().values():
        families.setdefault(record.family, []).append(record.name)
    assert [re.findall(r"`([\w-]+)`", row) for row in rows[0]] == list(families.values())


@pytest.mark.parametrize("words", commands("README.md"), ids=" ".join)
def test_every_command_parses(words: list[str]) -> None:
    """Each `ingraft` line of the page is a verb with options that it has."""
    verb = words[1]
    assert verb in VERBS
    with click.Context(cli) as context:
        command = cli.get_command(context, verb)
        assert command is not None
        command.make_context(verb, words[2:], resilient_parsing=False)


def test_every_make_target_exists() -> None:
    """Each `make X` of the pages is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md"):
        assert set(re.findall(r"make ([a-z]+)\b(?=[`\n])", (ROOT / page).read_text(encoding="utf-8"))) <= targets


def test_every_link_leads_somewhere() -> None:
    """Relative links of the pages point at files of the repository."""
    for page in ("README.md", "README.zh-CN.md"):
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), target


def test_the_catalogue_page_is_current() -> None:
    """docs/methods.md is what `make docs` writes."""
    import runpy

    made = runpy.run_path(str(ROOT / "docs" / "make_methods.py"))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == made, "run `make docs`"
