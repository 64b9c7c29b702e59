"""Methods that want more from a trainer than gradients: a run of theirs, stopped anywhere, ends with the same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ingraft import adapt
from ingraft.adapt.control import require_control
from ingraft.train import loop, run
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]


class Killed(BaseException):
    pass


OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"init_r": 4, "target_r": 2, "lora_dropout": 0.1},
    "eva": {"r": 3, "rho": 2.0},
    "lora-plus": {"r": 3},
    "pissa": {"r": 3},
}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("method", OPTIONS)
def test_a_stopped_run_ends_with_the_same_bits(
    method: str, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def options(name: str) -> dict[str, Any]:
        return recipe(output_dir=str(tmp_path / name), method=method, method_config=OPTIONS[method])

    looked: list[str] = []
    prepare = adapt.prepare
    monkeypatch.setattr(run.adapt, "prepare", lambda *args: (looked.append("x"), prepare(*args)))
    whole = train(options("whole"), quiet=True)
    plain = loop.step
    for at in (3, 11):

        def dying(session: Any, progress: Any, *rest: Any, at: int = at) -> Any:
            if progress.step == at:
                raise Killed
            return plain(session, progress, *rest)

        monkeypatch.setattr(loop, "step", dying)
        with pytest.raises(Killed):
            train(options(f"killed-{at}"), quiet=True)
        monkeypatch.setattr(loop, "step", plain)
        again = train(options(f"killed-{at}"), resume_from_checkpoint="last", quiet=True)
        one, other = tensors(whole.folder), tensors(again.folder)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one), at
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in (whole.folder, again.folder)]
        assert metrics[0] == metrics[1]
    # Once for the whole run, once for each that was killed, and once more for the one that was killed ahead of its first checkpoint.
    assert len(looked) == (4 if method == "eva" else 0)


def test_adalora_ends_at_its_budget(recipe: Make) -> None:
    """Without a schedule of its own, along the steps of the run; ranks differ, and what is saved is what is left."""
    finished = train(recipe(method="adalora", method_config={"init_r": 4, "target_r": 2}), quiet=True)
    stored = {key: t for key, t in tensors(finished.folder).items() if key.endswith("lora_E")}
    ranks = [t.shape[0] for t in stored.values()]
    assert sum(ranks) == 2 * len(ranks) and len(set(ranks)) > 1
    masks = json.loads((finished.folder / "adapter_config.json").read_text())["rank_pattern"]
    assert {sum(mask) for mask in masks.values()} <= set(ranks)


def test_lora_plus_trains_b_at_its_own_rate(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[float]] = {}
    plain = loop.step

    def watching(session: Any, progress: Any, *rest: Any) -> Any:
        result = plain(session, progress, *rest)
        learner = session.learners[0]
        rates = {id(p): group["lr"] for group in learner.optimizer.param_groups for p in group["params"]}
        for key, p in learner.parameters.items():
            seen.setdefault(key.rpartition(".")[2], set()).add(rates[id(p)])
        return result

    monkeypatch.setattr(loop, "step", watching)
    options = {"r": 2, "loraplus_lr_ratio": 4}
    made = recipe(method="lora-plus", method_config=options, lr_scheduler_type="constant", max_steps=2, warmup_ratio=0)
    train(made, quiet=True)
    assert seen == {"lora_A": {0.01}, "lora_B": {0.04}}


def test_eva_in_a_run_starts_from_its_rows(recipe: Make) -> None:
    finished = train(recipe(method="eva", method_config={"r": 3}, max_steps=1), quiet=True)
    config: Any = require_control(finished.model).require("default").config
    assert config.rank_pattern and all(key.startswith("^model.layers") for key in config.rank_pattern)
