"""`ingraft eval`: the numbers of the run, their intervals, two adapters compared, and a base that is asked in words."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from ingraft.cli.main import main

from .conftest import WORDS, Call


@pytest.mark.parametrize("run", ["talk", "sort"])
def test_eval_gives_the_numbers_of_the_run(
    run: str, home: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """`ingraft eval --adapter RUN` scores the run's held-out rows to the bits that the run recorded, and says so to people too."""
    metrics = json.loads((home / run / "metrics.json").read_text())
    found = call("eval", "--adapter", home / run)["eval"]
    assert {name: found[name] for name in metrics["after"]} == metrics["after"]
    assert metrics["after"]["loss"] != metrics["before"]["loss"]
    assert main(["eval", "--adapter", str(home / run)]) == 0
    low, high = found["loss_interval"]
    assert f"{metrics['after']['loss']:.6f} [{low:.4f}, {high:.4f}]\n" in capsys.readouterr().out
    for name, value in metrics["after"].items():
        between = found[f"{name}_interval"]
        assert between is None or between[0] <= value <= between[1]


def test_eval_of_the_same_rows_in_a_file(home: Path, call: Call, tmp_path: Path) -> None:
    """The held-out rows written to a file of their own have the loss that the split had; the base has the one from before training."""
    from ingraft.bases import load_tokenizer
    from ingraft.cli.sources import settle
    from ingraft.data.wanted import load_wanted

    recipe = settle({}, adapter=str(home / "talk"))
    rows = load_wanted(recipe, load_tokenizer(recipe.model)).parts["eval"].rows
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps(dict(row.values)) + "\n" for row in rows))
    metrics = json.loads((home / "talk" / "metrics.json").read_text())
    tuned = call("eval", "--model", home / "llama", "--adapter", home / "talk", "--data", file)["train"]
    assert tuned["loss"] == metrics["after"]["loss"]
    base = call("eval", "--model", home / "llama", "--data", file, "--dtype", "float32")["train"]
    assert base["loss"] == metrics["before"]["loss"]


@pytest.mark.parametrize("run", ["talk", "sort"])
def test_two_over_one_base_are_compared_on_the_same_rows(
    run: str, home: Path, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each says what it says by itself, heads included; the base is what training was compared with; a thing does not differ from itself."""
    metrics = json.loads((home / run / "metrics.json").read_text())
    few = ["--resamples", "200"]
    found = call("eval", "--adapter", home / run, "--against", "base", *few)["eval"]
    for name, value in metrics["after"].items():
        assert found[name] == value
        assert found["against"][name] == metrics["before"][name]
        assert found["difference"][name]["value"] == value - metrics["before"][name]
        assert 0 < found["difference"][name]["p"] <= 1
    assert found["difference"]["accuracy"]["test"] == "mcnemar"
    assert found["difference"]["loss"]["test"] == "permutation"
    turned = call("eval", "--against", home / run, *few)["eval"]
    assert turned["difference"]["loss"]["value"] == -found["difference"]["loss"]["value"]
    assert turned["difference"]["loss"]["p"] == found["difference"]["loss"]["p"]
    same = call("eval", "--adapter", home / run, "--against", home / run, *few)["eval"]
    for apart in same["difference"].values():
        assert (apart["value"], apart["interval"], apart["p"]) == (0.0, [0.0, 0.0], 1.0)
    capsys.readouterr()
    assert main(["eval", "--adapter", str(home / run), "--against", "base", *few]) == 0
    said = capsys.readouterr().out
    assert ("asked with the head as it was drawn" in said) is (run == "sort")
    line = next(line for line in said.splitlines() if line.startswith("loss"))
    assert line.split()[-1] == "permutation" and f"{metrics['before']['loss']:.6f} [" in line


def test_forgetting_is_measured_on_running_text(home: Path, call: Call, tmp_path: Path) -> None:
    """An adapter of another task, as a language model, against its base; blocks are the rows."""
    text = tmp_path / "general.txt"
    text.write_text("\n\n".join(" ".join(random.Random(n).choices(WORDS[6:], k=40)) for n in range(20)))
    words = ["--task", "lm", "--data", text, "--data.max-length", "32", "--resamples", "200"]
    found = call("eval", "--adapter", home / "talk", *words, "--against", "base")["train"]
    assert found["difference"]["perplexity"]["value"] == found["perplexity"] - found["against"]["perplexity"] != 0


def test_a_base_is_asked_in_words(home: Path, call: Call) -> None:
    """Zero-shot of a classifier's rows by one command, and behind rows of the training part; told which, and how."""
    few = ["--resamples", "200"]
    words = ["eval", "--model", home / "llama", "--task", "classify", "--data", home / "rows.jsonl", *few]
    none = call(*words, "--shots", "0", "--label-words.good", "very", "--question", "{text} it was")
    assert none["task"] == "sft" and none["shots"]["words"] == {"good": "very"}
    assert none["train"].keys() >= {"accuracy", "accuracy_interval", "macro_f1", "loss", "perplexity"}
    assert none["train"]["rows"] == 60
    one = ["--shots", "1", "--question", "{text}"]
    shown = call(*words, *one, "--shots-select", "nearest", "--data.eval", "12", "--calibrate")
    assert shown["eval"]["rows"] == 12 and shown["eval"]["loss"] != none["train"]["loss"]
    both = call("eval", "--adapter", home / "talk", "--against", "base", *one, *few)
    assert both["eval"]["difference"].keys() == {"loss", "perplexity", "accuracy", "macro_f1"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--against", "base", "--model", "{home}/llama"], "without --adapter that is the base against itself"),
        (["--adapter", "{home}/talk", "--calibrate"], "--calibrate: only with --shots"),
        (["--adapter", "{home}/talk", "--shots", "2", "--data", "{home}/rows.jsonl"], "none are left to show"),
        (
            ["--adapter", "{home}/talk", "--shots", "2", "--task", "lm"],
            "cannot be asked in words; these can: sft, classify",
        ),
        (["--adapter", "{home}/sort", "--against", "{home}/talk"], "labels are others than those of"),
        (["--adapter", "{home}/talk", "--confidence", "95"], "0.95 is usual"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    words: list[str], said: str, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", *(word.format(home=home) for word in words)]) == 2
    assert said in capsys.readouterr().err
