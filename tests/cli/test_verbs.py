"""Laws of the verbs, on models small enough to train in a second: what one verb writes the next one reads, and the numbers agree."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import ingraft
from ingraft.cli.main import main

from .conftest import WORDS, Call


def test_predict_keeps_order_and_rows(home: Path, call: Call, tmp_path: Path) -> None:
    """Every row comes back in its place with its own fields and a prediction, at any batch size; rows need no answer."""
    answers: list[list[dict[str, Any]]] = []
    for size in (1, 4):
        target = tmp_path / f"out{size}.jsonl"
        words = ["--data", home / "new.jsonl", "--output", target, "--per-device-eval-batch-size", size]
        assert call("predict", "--adapter", home / "talk", *words)["rows"] == 9
        answers.append([json.loads(line) for line in target.read_text().splitlines()])
    assert answers[0] == answers[1]
    assert [row["id"] for row in answers[0]] == list(range(9))
    assert {row["prediction"] for row in answers[0]} <= {"good", "bad"}


def test_predict_classes(home: Path, call: Call, tmp_path: Path) -> None:
    """A classifier gives a class and probabilities that sum to one, with the labels of its training data."""
    target = tmp_path / "out.jsonl"
    call("predict", "--adapter", home / "sort", "--data", home / "new.jsonl", "--output", target)
    rows = [json.loads(line) for line in target.read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(9))
    for row in rows:
        assert set(row["scores"]) == {"good", "bad"}
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == max(row["scores"], key=row["scores"].__getitem__)


def test_predict_refuses_to_overwrite(
    home: Path, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An output file that is there stays as it is, without --overwrite."""
    target = tmp_path / "out.jsonl"
    target.write_text("mine")
    assert (
        main(["predict", "--adapter", str(home / "talk"), "--data", str(home / "new.jsonl"), "--output", str(target)])
        == 2
    )
    assert target.read_text() == "mine"
    assert "--overwrite" in capsys.readouterr().err
    call("predict", "--adapter", home / "talk", "--data", home / "new.jsonl", "--output", target, "--overwrite")
    assert len(target.read_text().splitlines()) == 9


def test_merge_writes_a_plain_model(home: Path, call: Call, tmp_path: Path) -> None:
    """The folder loads in plain transformers, gives the adapter's logits within the printed difference, and talks like it."""
    target = tmp_path / "merged"
    found = call("merge", "--adapter", home / "talk", "--output-dir", target, "--data", home / "rows.jsonl")
    assert 0 <= found["max_difference"] < 1e-4
    names = {path.name for path in target.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not any(name.startswith("adapter") for name in names)
    plain = AutoModelForCausalLM.from_pretrained(target)
    assert type(plain).__module__.startswith("transformers.")
    assert AutoTokenizer.from_pretrained(target).vocab_size == len(WORDS)
    by_adapter = call("chat", "--adapter", home / "talk", "--prompt", "the plot was very bad film")
    merged = call("chat", "--model", target, "--dtype", "float32", "--prompt", "the plot was very bad film")
    assert merged["answer"] == by_adapter["answer"] != ""


def test_regression_28_a_merge_that_loses_something_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A merged model that does not answer as the unmerged one did is not written; the difference is named."""
    target = tmp_path / "merged"
    words = ["merge", "--adapter", str(home / "talk"), "--output-dir", str(target)]
    proper = ingraft.merge

    def lossy(model: Any, *names: str, **options: Any) -> None:
        proper(model, *names, **options)
        next(iter(model.parameters())).data.add_(0.5)

    monkeypatch.setattr(ingraft, "merge", lossy)
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "differ from the unmerged" in said
    assert "nothing was written" in said
    assert not target.exists()
    assert main([*words, "--max-difference", "1e9"]) == 0, "a person may accept it"


def test_a_merge_that_loses_the_adapter_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small the logits are, and however coarse the dtype: what counts is how much of the adapter is left."""
    target = tmp_path / "merged"

    def nothing(model: Any, *names: str, **options: Any) -> None:
        ingraft.detach(model)
        ingraft.attach(model, ingraft.LoraConfig())

    monkeypatch.setattr(ingraft, "merge", nothing)
    words = ["merge", "--adapter", str(home / "talk"), "--output-dir", str(target), "--dtype", "bfloat16"]
    assert main(words) == 2
    assert "100% of what the adapter does" in capsys.readouterr().err
    assert not target.exists()


def test_merge_leaves_an_occupied_folder_alone(home: Path, tmp_path: Path) -> None:
    """It is refused before anything is loaded."""
    target = tmp_path / "merged"
    target.mkdir()
    (target / "mine").write_text("x")
    assert main(["merge", "--adapter", str(home / "talk"), "--output-dir", str(target)]) == 2
    assert [path.name for path in target.iterdir()] == ["mine"]


@pytest.mark.parametrize("run", ["talk", "sort"])
def test_convert_writes_a_lora_that_does_the_same(run: str, home: Path, call: Call, tmp_path: Path) -> None:
    """At a rank that holds all of the change nothing is lost; the folder is an adapter like any other, head and labels included."""
    target = tmp_path / "converted"
    found = call("convert", "--adapter", home / run, "--rank", "8", "--output-dir", target)
    assert found["method"] == "lora"
    assert found["error"] < 1e-4
    assert found["max_difference"] < 1e-3
    whole = {path for path, site in found["sites"].items() if site["rank"] is None}
    assert whole == (set() if run == "talk" else {"bert.pooler.dense", "classifier"})
    assert {site["rank"] for path, site in found["sites"].items() if path not in whole} == {8}
    rows = home / "rows.jsonl"
    ours, theirs = (
        call("eval", "--adapter", adapter, "--data", rows, *more)["train"]
        for adapter, more in (
            (home / run, ()),
            (target, ("--dtype", "float32", "--task", "sft" if run == "talk" else "classify")),
        )
    )
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)
    assert call("inspect", target)["facts"]["extra"]["relative_error"] == found["error"]


def test_convert_says_what_a_small_rank_loses(
    home: Path, call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A row for each site, the error over all, and the difference of the logits; by an error the ranks differ."""
    words = ["convert", "--adapter", str(home / "talk"), "--output-dir", str(tmp_path / "one"), "--rank", "1"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in said
    assert "relative error over all sites" in said
    found = call("convert", "--adapter", home / "talk", "--error", "0.2", "--output-dir", tmp_path / "two")
    assert 0 < found["error"] <= 0.2
    assert len({site["rank"] for site in found["sites"].values()}) > 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rank", "2"], "--output-dir DIR is needed"),
        (["--output-dir", "x"], "--rank N or --error SHARE"),
        (["--output-dir", "x", "--rank", "2", "--error", "0.1"], "one of them"),
        (["--output-dir", "x", "--rank", "0"], "at least 1"),
        (["--output-dir", "x", "--error", "2"], "between 0 and 1"),
    ],
)
def test_convert_refuses_bad_options(
    words: list[str],
    said: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Exit code 2, and nothing is written."""
    monkeypatch.chdir(tmp_path)
    assert main(["convert", "--adapter", str(home / "talk"), *words]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_chat_through_a_pipe(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of standard input are turns; the adapter is switched while talking; a slip does not end the talk."""
    said = f"bad film\n/base\nbad film\n/adapter default\n/adapter\n/nope\n/adapter {home / 'none'}\n/reset\nbad film\n/quit\nbad film\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(said))
    assert main(["chat", "--adapter", str(home / "talk"), "--max-new-tokens", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1]
    assert lines[0] in ("good", "bad")
    assert "(now: base)" in lines
    assert "(now: default)" in lines
    assert any("there is no command /nope" in line for line in lines)
    assert any("there is no such folder" in line for line in lines)


def test_chat_as_json(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With --json every answer is a JSON line on standard output and nothing else is."""
    monkeypatch.setattr("sys.stdin", io.StringIO("good film\n\nbad film\n"))
    assert main(["chat", "--adapter", str(home / "talk"), "--json"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["good film", "bad film"]


def test_chat_refuses_a_classifier(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A classifier does not talk, and the message names the verbs that suit it."""
    assert main(["chat", "--adapter", str(home / "sort"), "--prompt", "x"]) == 2
    assert "ingraft predict" in capsys.readouterr().err


def test_inspect_tells_what_the_run_recorded(home: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """Method, base, sites, parameters and metrics come from the files, and a flipped bit is found."""
    found = call("inspect", home / "talk")
    assert found["method"] == "lora"
    assert found["base"] == str(home / "llama")
    assert found["parameters"] == found["facts"]["parameters"]
    assert found["sites"] == found["facts"]["sites"]
    assert found["metrics"]["after"]["loss"] > 0
    assert main(["inspect", str(home / "talk"), "--sites"]) == 0
    assert "lora_A" in capsys.readouterr().out


def test_inspect_finds_damage(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One changed byte of the weights is refused with the file's name; without digests the folder is still described."""
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(home / "talk", copy)
    weights = bytearray((copy / "adapter_model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "adapter_model.safetensors").write_bytes(weights)
    assert main(["inspect", str(copy)]) == 2
    assert "adapter_model.safetensors" in capsys.readouterr().err
    (copy / "ingraft.json").unlink()
    assert main(["inspect", str(copy)]) == 0
    assert "without digests" in capsys.readouterr().out


def test_methods_count_for_a_model(home: Path, call: Call) -> None:
    """The counts are the ones that training reports; a method that the base refuses says why."""
    found = {entry["name"]: entry for entry in call("methods", "--model", home / "llama")}
    trained = call("inspect", home / "talk")["parameters"]
    assert found["lora"]["parameters"] == trained
    assert found["bitfit"]["parameters"] is None
    assert found["bitfit"]["refused"]


def test_data_shows_what_is_learned(home: Path, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    """The shown tokens join to the text that the model reads, the answer is marked, and people see the mark."""
    words = ("data", "--model", home / "llama", "--data", home / "rows.jsonl", "--rows", "2")
    found = call(*words)
    for row in found["rows"]:
        learned = "".join(token["text"] for token in row["tokens"] if token["learned"]).split()
        assert learned[0] in ("good", "bad")
    assert found["report"]["parts"][0]["rows"] + found["report"]["parts"][1]["rows"] == 60
    assert main([str(word) for word in words]) == 0
    assert "⟦" in capsys.readouterr().out


def test_train_prints_what_to_type_next(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run ends with its folder and the next commands; the folder is not overwritten by a second run."""
    words = [
        "train",
        "--model",
        str(home / "llama"),
        "--data",
        str(home / "rows.jsonl"),
        "--max-steps",
        "1",
        "--output-dir",
        str(tmp_path / "run"),
    ]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert f"ingraft chat --adapter {tmp_path / 'run'}" in text
    assert "before" in text
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir())
    assert main(words) == 2
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (tmp_path / "run").iterdir()) == before


def test_the_recipe_of_a_run_repeats_it(home: Path, tmp_path: Path, call: Call) -> None:
    """`ingraft train --config RUN/recipe.yaml` gives the same adapter to the byte."""
    call("train", "--config", home / "talk" / "recipe.yaml", "--output-dir", tmp_path / "again")
    name = "adapter_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (home / "talk" / name).read_bytes()


def test_answers_are_sampled_ranked_and_learned_from(
    home: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ingraft.cli import rank as verb
    from ingraft.ranking.desk import Desk

    asked = [json.loads(line)["text"] for line in (home / "new.jsonl").read_text().splitlines()]
    prompts, answers, ranked = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl", tmp_path / "ranked.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in [*asked, asked[0]]))
    sampled = ["--num-answers", 3, "--max-new-tokens", 5, "--temperature", 2.0]
    once = call("rank", "--adapter", home / "talk", "--data", prompts, "--output", answers, *sampled, "--sample-only")
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert once["rows"] == len(rows) == len(set(asked)), "each prompt once"
    assert all(len(set(row["responses"])) == 3 for row in rows)
    other = tmp_path / "again.jsonl"
    call("rank", "--adapter", home / "talk", "--data", prompts, "--output", other, *sampled, "--sample-only")
    assert other.read_bytes() == answers.read_bytes(), "the seed decides what is drawn"

    def person(self: Desk) -> None:  # ranks by length as soon as everything is on the desk
        full(self)
        while (open_question := self.state()["question"]) is not None:
            texts = open_question["responses"]
            self.rank(open_question["number"], [sorted(texts).index(text) + 1 for text in texts])

    full = Desk.full
    monkeypatch.setattr(Desk, "full", person)
    monkeypatch.setattr(verb.webbrowser, "open", lambda address: None)
    done = call("rank", "--model", home / "llama", "--data", answers, "--output", ranked)
    assert done["ranked"] == len(rows)
    again = call("rank", "--model", home / "llama", "--data", answers, "--output", ranked)
    assert again["ranked"] == 0 and len(ranked.read_text().splitlines()) == len(rows)
    words = ["--max-steps", 2, "--data.eval", 3, "--output-dir", tmp_path / "reward", "--dtype", "float32"]
    call("train", "--model", home / "llama", "--task", "reward", "--data", ranked, *words)

    assert main(["rank", "--adapter", str(home / "sort")]) == 2
    text = capsys.readouterr().err
    assert "--data FILE is needed" in text and "--output FILE is needed" in text and "writes no answers" in text
    prompts.write_text(json.dumps({"prompt": "x", "responses": ["one", "one"]}) + "\n")
    assert main(["rank", "--model", str(home / "llama"), "--data", str(prompts), "--output", str(tmp_path / "n")]) == 2
    assert "prompts.jsonl:1: has 1 different responses; 2 to 9 can be ranked" in capsys.readouterr().err
    prompts.write_text(json.dumps({"prompt": [{"role": "user"}], "responses": "one"}) + "\n")
    assert main(["rank", "--model", str(home / "llama"), "--data", str(prompts), "--output", str(tmp_path / "n")]) == 2
    assert "prompts.jsonl:1: " in capsys.readouterr().err
