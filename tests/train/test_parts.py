"""Schedules, learners and the lock, apart from a run."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ingraft.errors import IngraftError
from ingraft.recipe import Recipe, as_recipe
from ingraft.train.learner import FIRST_SCALE, Learner, check_optimiser, make_learner
from ingraft.train.lock import locked
from ingraft.train.schedule import factor, plan


def recipe(**values: object) -> Recipe:
    return as_recipe({"model": "x", "data": {"train": "x"}, **values})


def test_plans() -> None:
    made = plan(recipe(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=2.5), 100)
    assert (made.effective, made.steps_per_epoch, made.total) == (8, 13, 33)
    assert made.position(12) == (0, 12)
    assert made.position(13) == (1, 0)
    assert plan(recipe(max_steps=7), 100).total == 7
    assert plan(recipe(max_steps=100, warmup_ratio=0.1), 100).warmup == 10
    assert plan(recipe(max_steps=100, warmup_ratio=0.1, warmup_steps=3), 100).warmup == 3
    assert plan(recipe(max_steps=100, lr_scheduler_type="constant"), 100).warmup == 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant_with_warmup"])
def test_rates_rise_to_one_and_fall_to_nothing(kind: str) -> None:
    rates = [factor(kind, step, 100, 10) for step in range(100)]
    assert 0 < rates[0] < 0.1
    assert rates[10] == 1.0 == max(rates)
    assert all(a < b for a, b in pairwise(rates[:11]))
    if kind == "constant_with_warmup":
        assert set(rates[10:]) == {1.0}
    else:
        assert all(a > b for a, b in pairwise(rates[10:]))
        assert 0 < rates[-1] < 0.02
    assert factor("constant", 0, 100, 0) == 1.0


def learner(half: bool = False, **values: object) -> Learner:
    torch.manual_seed(0)
    own = {"w": nn.Parameter(torch.randn(3, 4)), "b": nn.Parameter(torch.randn(3))}
    return make_learner("default", own, recipe(**values), half)


def put(made: Learner, value: float) -> None:
    for parameter in made.parameters.values():
        parameter.grad = torch.full_like(parameter, value)


def test_a_step_equals_adamw() -> None:
    made = learner(weight_decay=0.1)
    copy = [p.detach().clone().requires_grad_() for p in made.parameters.values()]
    other = torch.optim.AdamW(
        [{"params": copy[:1], "weight_decay": 0.1}, {"params": copy[1:], "weight_decay": 0.0}], lr=0.01
    )
    for value in (0.5, -3.0, 100.0):
        put(made, value)
        norm = made.apply(0.01, 1.0)
        for p in copy:
            p.grad = torch.full_like(p, value)
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_(copy, 1.0)))
        other.step()
    for mine, theirs in zip(made.parameters.values(), copy, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_float16_scales_are_divided_out_and_halved_when_too_large() -> None:
    plain, half = learner(), learner(half=True)
    put(plain, 0.25)
    put(half, 0.25 * FIRST_SCALE)
    assert half.apply(0.01, 1.0) == pytest.approx(plain.apply(0.01, 1.0))
    assert torch.equal(plain.parameters["w"], half.parameters["w"])
    put(half, float("inf"))
    before = half.parameters["w"].detach().clone()
    assert half.apply(0.01, 1.0) is None
    assert torch.equal(half.parameters["w"], before)
    assert half.scale == FIRST_SCALE / 2
    assert half.skipped_in_row == 0, "a scale that was too large is no reason to give up"


def wide(optim: str) -> Learner:
    """A matrix that is large enough for states in 8 bits, and a vector that is not."""
    torch.manual_seed(0)
    own = {"w": nn.Parameter(torch.randn(64, 128)), "a/b": nn.Parameter(torch.randn(3))}
    return make_learner("default", own, recipe(optim=optim), half=False)


def test_states_in_8_bits(tmp_path: Path) -> None:
    """A quarter of the bytes, nearly the same steps, and a state that a file gives back to the bit."""
    pytest.importorskip("bitsandbytes")
    made, other, plain = wide("adamw_8bit"), wide("adamw_8bit"), wide("adamw_torch")
    for each in (made, plain):
        for value in (1.0, -2.0):
            for parameter in each.parameters.values():
                generator = torch.Generator().manual_seed(int(value))
                parameter.grad = value * torch.randn(parameter.shape, generator=generator)
            each.apply(0.01, 1.0)
    moments = {name: tensor for name, tensor in made.tensors()["optimizer"].items() if "/w/state" in name}
    assert {tensor.dtype for tensor in moments.values()} == {torch.uint8}
    torch.testing.assert_close(made.parameters["w"], plain.parameters["w"], atol=5e-3, rtol=0)
    file = tmp_path / "optimizer.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in made.tensors()["optimizer"].items()}, file)
    other.restore({**made.tensors(), "optimizer": load_file(file)}, made.numbers())
    for each in (made, other):
        put(each, 0.7)
        each.apply(0.02, 1.0)
    for one, two in zip(made.parameters.values(), other.parameters.values(), strict=True):
        assert torch.equal(one, two)


def test_states_in_8_bits_are_refused_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(IngraftError, match="there is none here; use adamw_torch"):
        check_optimiser(recipe(optim="adamw_8bit"))
    check_optimiser(recipe())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("ingraft.train.learner.find_spec", lambda name: None)
    with pytest.raises(IngraftError, match="pip install bitsandbytes"):
        check_optimiser(recipe(optim="adamw_8bit"))
    with pytest.raises(IngraftError, match="optim"):
        recipe(optim="sgd")


def test_state_goes_round() -> None:
    made, other = learner(), learner()
    for value in (1.0, 2.0):
        put(made, value)
        made.apply(0.01, 1.0)
        made.consider(3.0 - value, int(value), lower=True, keep=True)
    made.skip()
    other.restore(made.tensors(), made.numbers())
    for each in (made, other):
        put(each, 0.7)
        each.apply(0.02, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(made.parameters.values(), other.parameters.values(), strict=True))
    assert made.numbers() == other.numbers()
    other.use_best()
    assert torch.equal(other.parameters["w"], made.best_tensors["w"])
    assert not torch.equal(other.parameters["w"], made.parameters["w"])


def test_the_best_is_the_best() -> None:
    made = learner()
    assert made.consider(2.0, 1, lower=True, keep=False)
    assert not made.consider(float("nan"), 2, lower=True, keep=False)
    assert not made.consider(2.0, 3, lower=True, keep=False)
    assert made.waited == 2
    assert made.consider(1.0, 4, lower=True, keep=False)
    assert (made.best, made.best_step, made.waited) == (1.0, 4, 0)
    assert not made.consider(0.5, 5, lower=False, keep=False)


def test_a_folder_belongs_to_one(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        with pytest.raises(IngraftError, match="another process"), locked(tmp_path / "run"):
            pass
        assert (tmp_path / "run").is_dir()
    with locked(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())
