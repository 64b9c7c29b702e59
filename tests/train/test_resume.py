"""A run that is stopped anywhere and goes on ends with the same bits; checkpoints are whole, of this run, and never all gone."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingraft import durable
from ingraft.errors import IngraftError
from ingraft.train import checkpoint, loop
from ingraft.train.journal import entries
from ingraft.train.run import train
from ingraft.train.stop import Stop

Make = Callable[..., dict[str, Any]]
TIMES = ("step_seconds", "tokens_per_second", "learned_tokens_per_second", "peak_memory", "roofline")


def lasting(folder: Path) -> tuple[bytes, Any, list[dict[str, Any]]]:
    """What must not depend on interruptions: tensors, metrics, log (but for times)."""
    log = [{k: v for k, v in line.items() if k not in TIMES} for line in entries(folder / "log.jsonl")]
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "metrics.json").read_text()), log


WHOLE: list[tuple[bytes, Any, list[dict[str, Any]]]] = []


@pytest.fixture
def whole(recipe: Make, tmp_path: Path) -> tuple[bytes, Any, list[dict[str, Any]]]:
    """The run of three epochs, accumulation, dropout, evaluations and a best adapter, uninterrupted; made once."""
    if not WHOLE:
        WHOLE.append(lasting(train(demanding(recipe, tmp_path / "whole"), quiet=True).folder))
    return WHOLE[0]


def demanding(recipe: Make, folder: Path) -> dict[str, Any]:
    return recipe(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        data_eval=30,
        max_steps=12,
        save_steps=5,
        load_best_model_at_end=True,
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize(
    "at", [at if at in (2, 5, 6, 11) else pytest.param(at, marks=pytest.mark.study) for at in range(1, 12)]
)
def test_killed_at_every_step(
    recipe: Make, tmp_path: Path, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    """Nothing but what the periodic checkpoints hold survives; every day before the first of them, at one, behind one and at the last step."""
    folder, plain = tmp_path / "killed", loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == at:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    with pytest.raises(Killed):
        train(demanding(recipe, folder), quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    assert lasting(train(demanding(recipe, folder), resume_from_checkpoint="last", quiet=True).folder) == whole


@pytest.mark.parametrize(
    "polls", [1, 8, 21, 60, *(pytest.param(polls, marks=pytest.mark.study) for polls in (3, 20, 22, 35))]
)
def test_a_signal_at_any_safe_point(
    recipe: Make, tmp_path: Path, whole: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, polls: int
) -> None:
    """The n-th poll finds a signal, be it in a step, between micro-batches or in an evaluation."""
    folder, seen = tmp_path / "stopped", {"n": 0}
    plain = Stop.check

    def check(self: Stop) -> None:
        seen["n"] += 1
        if seen["n"] == polls:
            self.received = signal.SIGINT
        plain(self)

    monkeypatch.setattr(Stop, "check", check)
    with pytest.raises(KeyboardInterrupt) as stopped:
        train(demanding(recipe, folder), quiet=True)
    assert "resume-from-checkpoint last" in str(stopped.value) or "no step" in str(stopped.value).lower()
    monkeypatch.setattr(Stop, "check", plain)
    assert lasting(train(demanding(recipe, folder), resume_from_checkpoint="last", quiet=True).folder) == whole


CHILD = """
import json, sys
from ingraft.train.run import train
values = json.load(open(sys.argv[1]))
if __name__ == "__main__":
    train(values, resume_from_checkpoint="last", quiet=True)
"""


def test_real_signals(recipe: Make, tmp_path: Path) -> None:
    """Another process, told to stop while it trains, begun again and killed: exit codes, time, and the same bits after going on once more."""
    wanted = recipe(output_dir=str(tmp_path / "wanted"), max_steps=48, save_steps=3, eval_steps=0, data_eval=4)
    (tmp_path / "child.py").write_text(CHILD)
    made = {**wanted, "output_dir": str(tmp_path / "run")}
    (tmp_path / "recipe.json").write_text(json.dumps(made))
    command = [sys.executable, str(tmp_path / "child.py"), str(tmp_path / "recipe.json")]
    last = 0
    for number, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        child = subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": str(_threads())}, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + 120
        while _last(tmp_path / "run") <= last and time.monotonic() < deadline and child.poll() is None:
            time.sleep(0.02)
        time.sleep(random.random() * 0.2)
        child.send_signal(number)
        began = time.monotonic()
        errors = child.communicate(timeout=60)[1].decode()
        assert child.returncode == code, errors
        assert time.monotonic() - began < 10
        last = _last(tmp_path / "run")
        assert last
        assert not (tmp_path / "run" / durable.MANIFEST).exists()
    first = lasting(train(wanted, quiet=True).folder)
    assert lasting(train(made, resume_from_checkpoint="last", quiet=True).folder)[0] == first[0]


def _last(folder: Path) -> int:
    """The step of the newest checkpoint, 0 if there is none; not the one of step 0, a rehearsal."""
    return max((step for step, _ in checkpoint.listed(folder)), default=0)


def _threads() -> int:
    import torch

    return torch.get_num_threads()


def stopped_run(recipe: Make, monkeypatch: pytest.MonkeyPatch, at: int = 10, **changes: Any) -> Path:
    plain = loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == at:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    made = recipe(**changes)
    with pytest.raises(Killed):
        train(made, quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    return Path(made["output_dir"])


def test_a_damaged_checkpoint_is_passed_over(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = stopped_run(recipe, monkeypatch)
    file = folder / "checkpoint-8" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    run = train(recipe(), resume_from_checkpoint="last", quiet=True)
    assert run.steps == 12
    assert "checkpoint-8 is passed over" in caplog.text
    assert "optimizer.safetensors: damaged" in caplog.text


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"seed": 7}, "seed (was 42, is 7)"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size (was 4, is 2)"),
        ({"method_config": {"r": 4, "lora_dropout": 0.1}}, "method_config.r (was 8, is 4)"),
        ({"data_eval": 6}, "training rows"),
        ({"max_steps": 20}, "max_steps"),
        ({"learning_rate": 1e-3}, "learning_rate"),
    ],
)
def test_another_run_is_refused_by_what_differs(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], field: str
) -> None:
    folder = stopped_run(recipe, monkeypatch)
    before = sorted(path.name for path in folder.iterdir())
    for which in ("last", str(folder / "checkpoint-4")):
        with pytest.raises(IngraftError) as caught:
            train(recipe(**change), resume_from_checkpoint=which, quiet=True)
        assert field in str(caught.value)
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_does_not_decide_numbers_may_change(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    stopped_run(recipe, monkeypatch)
    run = train(recipe(save_steps=3, save_total_limit=1, logging_steps=5), resume_from_checkpoint="last", quiet=True)
    assert run.steps == 12
    assert [path.name for path in run.folder.glob("checkpoint-*")] == ["checkpoint-12"]


def test_a_checkpoint_can_be_named(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stopped_run(recipe, monkeypatch)
    run = train(recipe(), resume_from_checkpoint=str(folder / "checkpoint-4"), quiet=True)
    assert run.steps == 12
    with pytest.raises(IngraftError, match=r"holds no ingraft\.json"):
        checkpoint.find(folder, str(folder / "checkpoint-5"), {})


def test_no_checkpoint_yet_begins_anew(recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = stopped_run(recipe, monkeypatch, at=2)
    assert not checkpoint.listed(folder)
    resumed = lasting(train(recipe(), resume_from_checkpoint="last", quiet=True).folder)
    assert resumed == lasting(train(recipe(output_dir=str(tmp_path / "plain")), quiet=True).folder)


def test_rotation_keeps_a_whole_one_whatever_fails(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """keep=1 and a save that fails at each of its operations: there is always a checkpoint that verifies."""
    folder = stopped_run(recipe, monkeypatch, at=5, save_total_limit=1)
    facts = durable.verify(folder / "checkpoint-4")["facts"]

    class Fake:
        name = "default"

        def tensors(self) -> dict[str, Any]:
            import torch

            return {"adapter": {"w": torch.ones(3)}, "optimizer": {}}

        def numbers(self) -> dict[str, Any]:
            return {}

    learners: Any = [Fake()]
    operations = 0
    while True:

        def hook(n: int, kind: str, path: Path, at: int = operations) -> None:
            if n == at:
                raise OSError(5, "broken", str(path))

        durable.set_fault(hook)
        try:
            checkpoint.save(folder, 8, learners, facts["state"], facts["identity"], keep=1)
            broke = durable._disk._Hook.count > operations  # pyright: ignore[reportPrivateUsage]
        except IngraftError:
            broke = True
        durable.set_fault(None)
        assert checkpoint.find(folder, "last", facts["identity"]) is not None, operations
        if not broke:
            break
        operations += 1
    assert operations > 10
    assert [step for step, _ in checkpoint.listed(folder)] == [8]
