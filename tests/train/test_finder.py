"""`learning_rate: auto`: what the range test chooses, that it leaves no trace, and that runs with it repeat and go on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from ingraft.errors import IngraftError
from ingraft.recipe import as_recipe
from ingraft.train import finder, loop, train
from ingraft.train.finder import DECADES, STEPS, fastest, range_test, rates
from ingraft.train.learner import make_learner
from ingraft.train.stop import Stop

Make = Callable[..., dict[str, Any]]


def test_the_rates_are_spread_evenly_around_the_methods_own() -> None:
    found = rates(3e-4)
    assert len(found) == STEPS
    assert found[0] == pytest.approx(3e-4 * 10**-DECADES) and found[-1] == pytest.approx(3e-4 * 10**DECADES)
    ratios = [b / a for a, b in pairwise(found)]
    assert max(ratios) == pytest.approx(min(ratios))


def test_the_steepest_fall_is_chosen_and_not_the_lowest_loss() -> None:
    losses = [1.0, 0.99, 0.9, 0.7, 0.5, 0.45, 0.44, 0.9, 3.0]
    curve = [(10.0**n, loss) for n, loss in enumerate(losses)]
    assert fastest(1.0, curve) == 10.0**3
    assert fastest(0.1, curve) is None, "the loss was never below its start"


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_the_choice_goes_with_the_problem(recipe: Make, scale: float) -> None:
    """AdamW moves a weight by about the rate in a step: weights a thousand times as far away want a rate a thousand times as high."""
    weight = nn.Parameter(torch.zeros(8))
    goal = torch.randn(8, generator=torch.Generator().manual_seed(0)) * scale
    learner = make_learner("a", {"w": weight}, as_recipe(recipe()), half=False)

    def step(number: int, rate: float) -> None:
        ((weight - goal) / scale).square().sum().backward()
        learner.apply(rate, 0.0)

    found = range_test([learner], 0.1 * scale, step, lambda: float(((weight.detach() - goal) / scale).square().sum()))
    assert found.falls and 0.03 * scale < found.rate < 3 * scale
    assert not weight.any() and not learner.optimizer.state, "the test left a trace"


def test_a_test_ends_where_the_loss_explodes_and_a_loss_that_never_falls_leaves_the_methods_own(recipe: Make) -> None:
    weight = nn.Parameter(torch.zeros(1))
    learner = make_learner("a", {"w": weight}, as_recipe(recipe()), half=False)
    for bad in (10.0, math.nan, math.inf):
        losses = iter([1.0, 1.0, bad])
        found = range_test([learner], 0.1, lambda number, rate: None, lambda losses=losses: next(losses))
        assert (found.rate, found.falls) == (0.1, False)
        assert len(found.curve) == (2 if math.isfinite(bad) else 1)


def test_a_run_finds_its_rate_and_is_the_run_at_that_rate(recipe: Make, tmp_path: Path) -> None:
    first = train(recipe(learning_rate="auto", output_dir=str(tmp_path / "a")), quiet=True)
    log = [json.loads(line) for line in (first.folder / "log.jsonl").read_text().splitlines()]
    told = next(line for line in log if "range_test" in line)
    rate = told["found_learning_rate"]
    assert told["step"] == 0 and rate in [tried for tried, _ in told["range_test"]]
    assert "range test" in (first.folder / "report.html").read_text()
    second = train(recipe(learning_rate=rate, output_dir=str(tmp_path / "b")), quiet=True)
    assert _weights(first.folder) == _weights(second.folder), "the range test left a trace"
    again = train(first.folder / "recipe.yaml", overwrite_output_dir=True, quiet=True)
    assert _weights(again.folder) == _weights(second.folder)


def test_a_step_of_the_test_that_is_not_finite_leaves_no_gradient(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10_000))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finite", lambda total: next(calls) != finder.STEPS - 1)  # the last step of the test
        first = train(recipe(learning_rate="auto", output_dir=str(tmp_path / "a")), quiet=True)
    log = [json.loads(line) for line in (first.folder / "log.jsonl").read_text().splitlines()]
    told = next(line for line in log if "range_test" in line)
    assert len(told["range_test"]) == finder.STEPS, "the test was cut short, and nothing is tried here"
    second = train(recipe(learning_rate=told["found_learning_rate"], output_dir=str(tmp_path / "b")), quiet=True)
    assert _weights(first.folder) == _weights(second.folder)


def test_a_killed_run_goes_on_at_the_rate_it_found(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(recipe(learning_rate="auto", output_dir=str(tmp_path / "whole")), quiet=True)
    values = recipe(learning_rate="auto", output_dir=str(tmp_path / "cut"))
    seen = 0
    check = Stop.check

    def dying(self: Stop) -> None:
        nonlocal seen
        seen += 1
        if (tmp_path / "cut" / "checkpoint-8").exists():
            raise RuntimeError("killed")
        check(self)

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        patch.setattr(Stop, "check", dying)
        train(values, quiet=True)
    assert seen
    cut = train(values, resume_from_checkpoint="last", quiet=True)
    assert _weights(cut.folder) == _weights(whole.folder)


def test_losses_that_tell_nothing_are_refused(recipe: Make) -> None:
    with pytest.raises(IngraftError, match="learning_rate: the loss of task 'ppo'"):
        as_recipe(recipe(task="ppo", learning_rate="auto", reward_function="f.py:f", method_config={}))
    with pytest.raises(IngraftError, match="learning_rate"):
        as_recipe(recipe(learning_rate="automatic"))


def _weights(folder: Path) -> dict[str, list[Any]]:
    return {name: tensor.tolist() for name, tensor in load_file(folder / "adapter_model.safetensors").items()}
