"""Embeddings, whole: what a step is does not depend on how many rows go through at once; runs, folders, vectors."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingraft.cli.main import main
from ingraft.errors import IngraftError
from ingraft.train import loop
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
TOPICS = ["good", "bad", "very", "film", "plot", "it", "i"]
ADAPTER = "adapter_model.safetensors"


def text(rng: random.Random, *about: str) -> str:
    words = [*about, *rng.choices(["was", "the", "a"], k=rng.randint(0, 5))]
    rng.shuffle(words)
    return " ".join(words)


def rows(form: str) -> list[dict[str, Any]]:
    """Texts that belong together are about the same two things; in numbers about one, good or bad."""
    rng, found = random.Random(0), list[dict[str, Any]]()
    for _ in range(60):
        kind, other = rng.sample(["good", "bad"], 2)
        about = rng.sample(TOPICS, 2)
        match form:
            case "numbers":
                same = rng.random() < 0.5
                found.append({"text": text(rng, kind), "text2": text(rng, kind if same else other), "label": int(same)})
            case "triplets":
                wrong = [text(rng, *rng.sample(TOPICS, 2)) for _ in range(rng.randint(1, 2))]
                found.append({"query": text(rng, *about), "positive": text(rng, *about), "negative": wrong})
            case _:
                found.append({"prompt": text(rng, *about), "completion": text(rng, *about)})
    return found


@pytest.fixture
def of(recipe: Make, home: Path, tmp_path: Path) -> Make:
    def make(form: str = "triplets", **changes: Any) -> dict[str, Any]:
        file = tmp_path / f"{form}.jsonl"
        file.write_text("".join(json.dumps(one) + "\n" for one in rows(form)))
        values = {"model": str(home / "bert"), "task": "embed", "data_train": str(file), "eval_steps": 0}
        return recipe(**{**values, **changes})

    return make


def split(of: Make, form: str, size: int, tmp_path: Path, **more: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and adapter of three steps of 8 rows, `size` of them at once."""
    run = train(
        of(
            form,
            output_dir=str(tmp_path / f"{form}{size}"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            adam_epsilon=1.0,
            learning_rate=1.0,
            max_grad_norm=0.0,
            logging_steps=1,
            max_steps=3,
            save_steps=0,
            method_config={"lora_dropout": 0.3},
            embed={"symmetric": True},
            **more,
        ),
        quiet=True,
    )
    losses = [line["loss"] for line in entries(run.folder / "log.jsonl") if "loss" in line]
    return losses, load_file(run.folder / ADAPTER)


@pytest.mark.parametrize("form", ["triplets", "numbers"])
def test_eight_rows_at_once_and_two_four_times_are_one_step(form: str, of: Make, tmp_path: Path) -> None:
    """Dropout included, although every row is a wrong answer for every other."""
    (losses, whole), (others, pieces) = (split(of, form, size, tmp_path) for size in (8, 2))
    assert losses == pytest.approx(others, rel=1e-4)
    assert len(set(losses)) == 3
    moved = max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_B" in name)
    assert moved > 1e-4
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, pieces[name], rtol=1e-3, atol=1e-3 * moved, msg=name)


@pytest.mark.parametrize("form", ["triplets", "numbers", "pairs"])
def test_texts_that_belong_together_come_near(
    form: str, of: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder gives the run's numbers again; merged, the vectors are the same."""
    run = train(of(form, max_steps=30, save_steps=0, per_device_train_batch_size=8), quiet=True)
    before, after = run.metrics["before"], run.metrics["after"]
    assert after["loss"] < before["loss"]
    if form == "numbers":
        assert after["average_precision"] > 0.95 > before["average_precision"]
        assert set(after) == {"loss", "spearman", "average_precision", "best_accuracy"}
    else:
        assert after["mrr"] > before["mrr"]
        assert set(after) == {"loss", "recall@1", "mrr"}
    assert len(run.samples) == 3
    assert run.samples[0]["after"].startswith("cosine ")
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["eval"]
    assert {name: found[name] for name in after} == after
    if form != "numbers":
        return
    words = ["--data", str(tmp_path / "numbers.jsonl"), "--per-device-eval-batch-size", "7", "--output"]
    assert main(["predict", "--adapter", str(run.folder), *words, str(tmp_path / "a.jsonl")]) == 0
    assert main(["merge", "--adapter", str(run.folder), "--output-dir", str(tmp_path / "merged")]) == 0
    merged = ["--model", str(tmp_path / "merged"), "--task", "embed", "--dtype", "float32"]
    assert main(["predict", *merged, *words, str(tmp_path / "b.jsonl")]) == 0
    one, two = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] for name in ("a.jsonl", "b.jsonl")
    )
    for a, b in zip(one, two, strict=True):
        assert a["embedding"] == pytest.approx(b["embedding"], abs=1e-4)
        assert sum(x * x for x in a["embedding"]) == pytest.approx(1, abs=1e-4)
        dot = sum(x * y for x, y in zip(a["embedding"], a["embedding2"], strict=True))
        assert a["similarity"] == pytest.approx(dot, abs=1e-4)
    assert len(one) == 60


def test_a_lone_text_is_embedded_and_what_is_none_is_named(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", "--model", str(home / "bert"), "--task", "embed", "--dtype", "float32", "--data"]
    (tmp_path / "lines.txt").write_text("good film\n\nbad plot\n")
    assert main([*words, str(tmp_path / "lines.txt"), "--output", str(tmp_path / "v.jsonl")]) == 0
    found = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [sorted(one) for one in found] == [["embedding", "text"]] * 2
    (tmp_path / "bad.jsonl").write_text('{"text": "good"}\n{"text": 3}\n{"name": "x"}\n')
    assert main([*words, str(tmp_path / "bad.jsonl"), "--output", str(tmp_path / "w.jsonl")]) == 2
    said = capsys.readouterr().err
    assert "2 of 3 rows cannot be embedded" in said
    assert "bad.jsonl:2" in said
    assert "bad.jsonl:3" in said


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_to_the_same_bits(of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In micro-batches, so through both passes."""
    short = {"max_steps": 4, "save_steps": 2, "data_eval": 4}
    short |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole, plain = train(of(**short), quiet=True), loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 3:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    again = of(output_dir=str(tmp_path / "killed"), **short)
    with pytest.raises(Killed):
        train(again, quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    done = train(again, resume_from_checkpoint="last", quiet=True)
    assert (done.folder / ADAPTER).read_bytes() == (whole.folder / ADAPTER).read_bytes()
    assert done.metrics == whole.metrics


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "a", "text2": "b", "label": 1}, "All rows have the one label 1"),
        ({"text": "a", "text2": "b", "label": "yes"}, "not a finite number"),
        ({"text": "a", "label": 1}, r"task embed needs texts that belong together.*--task classify"),
        ({"query": "a", "positive": " "}, "field 'positive' is empty"),
        ({"query": "a", "positive": "b", "negative": [3]}, "field 'negative' is a number, not a text"),
    ],
)
def test_rows_that_cannot_be_used_are_named(row: dict[str, Any], said: str, of: Make, tmp_path: Path) -> None:
    (tmp_path / "odd.jsonl").write_text((json.dumps(row) + "\n") * 4)
    with pytest.raises(IngraftError, match=said):
        train(of(data_train=str(tmp_path / "odd.jsonl"), data_eval=0), quiet=True)


def test_an_encoder_decoder_is_sent_elsewhere(of: Make, home: Path) -> None:
    with pytest.raises(IngraftError, match="use --task seq2seq"):
        train(of(model=str(home / "t5")), quiet=True)
