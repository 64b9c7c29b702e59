"""The tasks with a head (classification is in test_run.py), whole: train, log, report with samples, the same numbers from the folder, predictions, and going on to the same bits."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingraft.cli.main import main
from ingraft.data import Example
from ingraft.evaluate import scorer_of
from ingraft.train import checkpoint, loop
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]

FILLERS = ["very", "a", "was", "the", "plot", "it", "i"]
TASKS = ("multi-label", "regress", "tag", "qa", "seq2seq")
MODELS = {"seq2seq": "t5"}
"""Where it is not the tiny encoder."""


def row(task: str, rng: random.Random) -> dict[str, Any]:
    """A row whose answer stands in it: 'good' and 'bad' are labels, count as 10 and -30, are tagged, or answer the question."""
    words = rng.choices(FILLERS, k=rng.randint(1, 2) if task == "multi-label" else rng.randint(2, 8))
    kinds = rng.sample(["good", "bad"], k=rng.randint(0, 2)) if task == "multi-label" else [rng.choice(["good", "bad"])]
    at = rng.randint(0, len(words))
    words[at:at] = kinds
    text = " ".join(words)
    if task == "multi-label":
        return {"text": text, "label": kinds}
    if task == "regress":
        return {"text": text, "label": 2000.0 + (10 if kinds == ["good"] else -30)}
    if task == "tag":
        return {"tokens": words, "tags": [f"B-{word.upper()}" if word in kinds else "O" for word in words]}
    if task == "seq2seq":
        return {"prompt": text, "completion": f"a {kinds[0]} film"}
    return {
        "context": text,
        "question": "was it",
        "answers": [{"text": kinds[0], "answer_start": text.index(kinds[0])}],
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of 60 rows for each task."""
    folder, rng = tmp_path_factory.mktemp("tasks"), random.Random(0)
    for task in TASKS:
        lines = [json.dumps(row(task, rng)) for _ in range(60)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def of(recipe: Make, home: Path, files: Path) -> Make:
    """A short recipe of a task on its tiny base."""

    def make(task: str, **changes: Any) -> dict[str, Any]:
        values = {
            "model": str(home / MODELS.get(task, "bert")),
            "task": task,
            "data_train": str(files / f"{task}.jsonl"),
            "max_steps": 8,
            "eval_steps": 4,
        }
        return recipe(**{**values, **changes})

    return make


LEARNED = {
    "multi-label": ("micro_f1", 0.75),
    "regress": ("pearson", 0.95),
    "tag": ("f1", 0.9),
    "qa": ("exact_match", 0.9),
    "seq2seq": ("exact_match", 0.9),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_task_from_rows_to_predictions(
    task: str, of: Make, files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns what can be learned; the folder gives the run's numbers again; rows without an answer get one; merged, it is a plain model that says the same."""
    steps, rate = {"multi-label": (90, 5e-3), "seq2seq": (40, 1e-2)}.get(task, (60, 1e-2))
    run = train(of(task, max_steps=steps, learning_rate=rate, eval_steps=0, save_steps=0), quiet=True)
    name, least = LEARNED[task]
    assert run.metrics["after"][name] >= least
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    assert {f"eval_{metric}" for metric in run.metrics["after"]} <= set(entries(run.folder / "log.jsonl")[0])
    assert len(run.samples) == 3
    report = (run.folder / "report.html").read_text()
    assert all(sample["prompt"].splitlines()[0] in report and sample["expected"] for sample in run.samples)
    assert "ingraft chat" not in report
    assert f"{run.metrics['after'][scorer_of(task).headline]:.4f}</b>" in report
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["eval"]
    assert {metric: found[metric] for metric in run.metrics["after"]} == run.metrics["after"]

    rows = [json.loads(line) for line in (files / f"{task}.jsonl").read_text().splitlines()][:12]
    bare = [{key: value for key, value in one.items() if key not in ANSWERS} for one in rows]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(one) + "\n" for one in bare))
    merged = ["--model", str(tmp_path / "merged"), "--task", task, "--dtype", "float32"]
    words = ["merge", "--adapter", str(run.folder), "--output-dir", str(tmp_path / "merged")]
    assert main([*words, "--data", str(files / f"{task}.jsonl")]) == 0
    said: list[list[dict[str, Any]]] = []
    for number, way in enumerate((["--adapter", str(run.folder)], merged)):
        target = tmp_path / f"out{number}.jsonl"
        words = ["--data", str(tmp_path / "new.jsonl"), "--output", str(target), "--per-device-eval-batch-size", "5"]
        assert main(["predict", *way, *words]) == 0
        said.append([json.loads(line) for line in target.read_text().splitlines()])
    assert [{key: one[key] for key in bare[0]} for one in said[0]] == bare
    for one, other, asked in zip(*said, rows, strict=True):
        if task == "regress":
            assert one["prediction"] == pytest.approx(asked["label"], abs=8), "in the labels' own unit"
            assert other["prediction"] == pytest.approx(one["prediction"], abs=0.1)
        else:
            assert one["prediction"] == other["prediction"]
    right = sum(one["prediction"] == answer(task, asked) for one, asked in zip(said[0], rows, strict=True))
    assert task == "regress" or right >= (4 if task == "multi-label" else 9)


ANSWERS = ("label", "tags", "answers", "completion")


def answer(task: str, asked: dict[str, Any]) -> Any:
    if task == "multi-label":
        return sorted(asked["label"])
    return asked["answers"][0]["text"] if task == "qa" else next(asked[key] for key in ANSWERS if key in asked)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("task", TASKS)
def test_a_killed_run_goes_on_to_the_same_bits(
    task: str, of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"max_steps": 4, "save_steps": 2, "eval_steps": 0, "data_eval": 4}
    whole, plain = train(of(task, **short), quiet=True), loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 3:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    again = of(task, output_dir=str(tmp_path / "killed"), **short)
    with pytest.raises(Killed):
        train(again, quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    done = train(again, resume_from_checkpoint="last", quiet=True)
    name = "adapter_model.safetensors"
    assert (done.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    assert done.metrics == whole.metrics


def test_a_checkpoint_knows_its_rows_by_what_they_teach() -> None:
    """Rows of the same tokens and other targets have another digest, whatever the target is."""
    targets: list[dict[str, Any]] = [
        *({"label": 0}, {"label": 1}, {"values": (1.0,)}, {"values": (1.5,)}, {"span": (1, 2)}, {"span": (1, 3)}),
        *({"labels": [-100, 3]}, {"labels": [-100, 2]}),
    ]
    found = {checkpoint.digest([Example(input_ids=[5, 6], row_id=0, **target)]) for target in targets}
    assert len(found) == len(targets)


def test_numbers_in_another_unit_are_learned_alike(of: Make, files: Path, tmp_path: Path) -> None:
    """Labels of thousandfold size and another origin give the same losses, and predictions in their own unit."""
    rows = [json.loads(line) for line in (files / "regress.jsonl").read_text().splitlines()]
    moved = [{**one, "label": 1000 * one["label"] - 7} for one in rows]
    (tmp_path / "moved.jsonl").write_text("".join(json.dumps(one) + "\n" for one in moved))
    short = {"max_steps": 4, "eval_steps": 0}
    plain = train(of("regress", output_dir=str(tmp_path / "a"), **short), quiet=True)
    moved_data = str(tmp_path / "moved.jsonl")
    other = train(of("regress", output_dir=str(tmp_path / "b"), data_train=moved_data, **short), quiet=True)
    one, two = plain.metrics["after"], other.metrics["after"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two["pearson"] == pytest.approx(one["pearson"], rel=1e-3)
    assert two["mae"] == pytest.approx(1000 * one["mae"], rel=1e-3)


@pytest.mark.parametrize("task", ["qa", "seq2seq"])
def test_answers_are_not_taught_by_padding(task: str, of: Make, tmp_path: Path) -> None:
    """The loss of a row does not depend on which rows it is padded to, so 8 rows at once are 2 rows four times."""
    found = [
        train(
            of(
                task,
                output_dir=str(tmp_path / str(size)),
                per_device_train_batch_size=size,
                gradient_accumulation_steps=8 // size,
                adam_epsilon=1.0,
                logging_steps=1,
                max_steps=3,
                eval_steps=0,
                data_eval=4,
            ),
            quiet=True,
        )
        for size in (8, 2)
    ]
    losses = [[line["loss"] for line in entries(run.folder / "log.jsonl") if "loss" in line] for run in found]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
