"""Laws of the options: every accepted spelling means the same, and everything that is not accepted is named at once."""

from __future__ import annotations

from typing import Any

import click
import pytest

from ingraft.cli.options import VerbCommand, given, recipe_options


@pytest.fixture
def parse() -> Any:
    """Words -> overrides, through a command with all recipe options."""
    seen: dict[str, Any] = {}

    @click.command(cls=VerbCommand)
    @recipe_options()
    @click.option("--flag", is_flag=True)
    def command(**arguments: Any) -> None:
        seen.clear()
        seen.update(given(arguments))

    def run(*words: str) -> dict[str, Any]:
        command.main(list(words), standalone_mode=False)
        return dict(seen)

    return run


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--learning-rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate", "1e-4"], {"learning_rate": 1e-4}),
        (["--learning_rate=1e-4"], {"learning_rate": 1e-4}),
        (["--data", "f.jsonl"], {"data.train": "f.jsonl"}),
        (["--data.train", "f.jsonl"], {"data.train": "f.jsonl"}),
        (["--data.max-length", "512", "--data.max_length", "64"], {"data.max_length": 64}),
        (["--data.eval", "0.2"], {"data.eval": 0.2}),
        (["--data.eval", "dev.jsonl"], {"data.eval": "dev.jsonl"}),
        (["--model", "123"], {"model": "123"}),
        (["--max-steps", "-1"], {"max_steps": -1}),
        (["--save-total-limit", "null"], {"save_total_limit": None}),
        (["--gradient-checkpointing"], {"gradient_checkpointing": True}),
        (["--gradient_checkpointing", "--seed", "3"], {"gradient_checkpointing": True, "seed": 3}),
        (["--gradient-checkpointing", "false"], {"gradient_checkpointing": False}),
        (["--no-gradient-checkpointing"], {"gradient_checkpointing": False}),
        (["--gradient-checkpointing", "auto"], {"gradient_checkpointing": "auto"}),
        (["--gradient-checkpointing=12"], {"gradient_checkpointing": 12}),
        (["--no_gradient_checkpointing", "--flag"], {"gradient_checkpointing": False}),
        (["--method-config.r", "16"], {"method_config": {"r": 16}}),
        (["--method_config.r=16"], {"method_config": {"r": 16}}),
        (
            ["--method-config.lora-alpha", "2", "--method-config.target_modules", "[q_proj, v_proj]"],
            {"method_config": {"lora_alpha": 2, "target_modules": ["q_proj", "v_proj"]}},
        ),
        (["--method-config", "{r: 4, lora_dropout: 0.1}"], {"method_config": {"r": 4, "lora_dropout": 0.1}}),
        (["--method-config.target-modules", "all-linear"], {"method_config": {"target_modules": "all-linear"}}),
        (["--output-dir", "--odd"], {"output_dir": "--odd"}),
    ],
)
def test_spellings(parse: Any, words: list[str], expected: dict[str, Any]) -> None:
    """Hyphen or underscore, space or equals sign, nested or short: one meaning, with the type that YAML would give it."""
    found = parse(*words)
    assert found == expected
    assert {k: type(v) for k, v in found.items()} == {k: type(v) for k, v in expected.items()}


def test_every_unknown_option_is_named(parse: Any) -> None:
    """All unknown options in one error, each with the nearest known one; their values are not taken for options."""
    with pytest.raises(click.UsageError) as caught:
        parse("--learning-rte", "3", "--max-length=5", "--model", "m", "--sed", "1", "--no-flag")
    lines = caught.value.message.splitlines()
    assert len(lines) == 4
    assert "'--learning-rate'" in lines[0]
    assert "'--data.max-length'" in lines[1]
    assert "'--seed'" in lines[2]
    assert "--no-flag" in lines[3]


@pytest.mark.parametrize("words", [["--learning-rate"], ["--method-config.r"], ["--method-config", "r"], ["stray"]])
def test_incomplete_options_are_usage_errors(parse: Any, words: list[str]) -> None:
    """An option without its value, or a word that belongs to none, is refused and not guessed."""
    with pytest.raises(click.UsageError):
        parse(*words)


def test_unknown_options_and_a_wrong_recipe_come_in_one_message() -> None:
    """A person mends a command line in one go: what is unknown and what is wrong are named together."""
    from ingraft.cli.train import command

    words = ["--model", "m", "--data", "d.jsonl", "--method", "lorra", "--learning-rte", "3", "--max-steps", "x"]
    with pytest.raises(click.UsageError) as caught:
        command.main(words, standalone_mode=False)
    for part in ("'--learning-rate'", "'lora'", "max_steps"):
        assert part in caught.value.message
