"""Training over several weighted files: stopped anywhere the run ends with the same bits, what each file is worth is measured apart, and going on with other weights is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingraft.errors import IngraftError
from ingraft.train import loop
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
TIMES = ("step_seconds", "tokens_per_second", "learned_tokens_per_second", "peak_memory", "roofline")


class Killed(BaseException):
    pass


@pytest.fixture
def mixed(recipe: Make, home: Path, tmp_path: Path) -> Make:
    """Two files of two forms, the small one seen twice as often as the large one; five epochs."""
    chats = tmp_path / "chats.jsonl"
    rng = random.Random(1)
    with chats.open("w") as file:
        for _ in range(12):
            words = " ".join(rng.choice(["a", "film", "was", "the", "plot"]) for _ in range(rng.randint(2, 6)))
            turns = [{"role": "user", "content": words}, {"role": "assistant", "content": rng.choice(["good", "bad"])}]
            file.write(json.dumps({"messages": turns}) + "\n")

    def make(folder: str, weight: int = 2, **changes: Any) -> dict[str, Any]:
        sources = [{"file": str(home / "rows.jsonl"), "weight": 1}, {"file": str(chats), "weight": weight}]
        values = recipe(output_dir=str(tmp_path / folder), max_steps=20, eval_steps=10, save_steps=3, **changes)
        values["data"]["train"] = sources
        return values

    return make


def lasting(folder: Path) -> tuple[bytes, Any, list[dict[str, Any]]]:
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in entries(folder / "log.jsonl")]
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "metrics.json").read_text()), log


def test_a_stopped_run_ends_with_the_same_bits_and_files_are_measured_apart(
    mixed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed in the second epoch, in the middle of the small file's second pass. Losses of files, weighted by their learned tokens, are the loss of all."""
    whole = lasting(train(mixed("whole"), quiet=True).folder)
    metrics = whole[1]["after"]
    assert {"loss@rows", "loss@chats", "accuracy@rows"} <= set(metrics)
    low, high = sorted((metrics["loss@rows"], metrics["loss@chats"]))
    assert low < metrics["loss"] < high
    assert {"eval_loss", "eval_loss@rows", "eval_loss@chats"} <= set(whole[2][-2] | whole[2][-1])

    step = loop.step

    def dying(session: Any, progress: Any, clock: Any, rows: Any) -> Any:
        if progress.step == 16:
            raise Killed
        return step(session, progress, clock, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "step", dying)
        train(mixed("run"), quiet=True)
    with pytest.raises(IngraftError, match="rows of each file in an epoch"):
        train(mixed("run", weight=3), resume_from_checkpoint="last", quiet=True)
    assert lasting(train(mixed("run"), resume_from_checkpoint="last", quiet=True).folder) == whole


def test_the_best_adapter_may_be_the_best_on_one_file(mixed: Make, tmp_path: Path) -> None:
    """`loss@chats` is a metric like any other, and less of it is better."""
    run = train(mixed("best", load_best_model_at_end=True, metric_for_best_model="eval_loss@chats"), quiet=True)
    losses = [line["eval_loss@chats"] for line in entries(run.folder / "log.jsonl") if "eval_loss@chats" in line]
    assert run.metrics["after"]["loss@chats"] == pytest.approx(min(losses[1:]), rel=1e-6)
    with pytest.raises(IngraftError, match="loss@rows"):
        train(mixed("none", metric_for_best_model="loss@rowz"), quiet=True)
