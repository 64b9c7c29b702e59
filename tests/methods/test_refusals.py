"""Options that cannot mean what they say on a layer or in a file are refused, or said, with the numbers and what to do instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ingraft
from ingraft.adapt.files import CONFIG
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config
from ingraft.testing.subjects import SUBJECTS


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(24, 16), nn.Linear(16, 24))


def refused(model: nn.Module, method: str, **options: Any) -> str:
    with pytest.raises(IngraftError) as caught:
        ingraft.attach(model, make_config(method, {"target_modules": ["0"], **options}))
    assert type(model) is not nn.Sequential or type(model[0]) is nn.Linear
    return str(caught.value)


@pytest.mark.parametrize(
    ("method", "options", "option"),
    [
        ("hira", {"r": 17}, "r = 17"),
        ("gralora", {"r": 18, "gralora_k": 2}, "r = 18"),
        ("gralora", {"r": 4, "hybrid_r": 17}, "hybrid_r = 17"),
        ("vblora", {"r": 17, "vector_length": 4, "num_vectors": 6}, "r = 17"),
        ("adalora", {"init_r": 17}, "init_r = 17"),
    ],
)
def test_a_rank_above_the_layers_is_refused_with_the_largest(method: str, options: dict[str, Any], option: str) -> None:
    text = refused(net(), method, **options)
    assert f"0: {option} is above the rank that a weight of 16 x 24 can have; it must be at most 16. Lower " in text
    fits = {key: 16 if value >= 17 else value for key, value in options.items()}
    ingraft.attach(net(), make_config(method, {"target_modules": ["0"], **fits}))


def test_a_rank_above_what_lokrs_factor_can_have_is_refused_unless_the_factor_is_kept_whole() -> None:
    """With 2 r at its longer side or above the factor is kept whole, as in PEFT; below, r is a rank and has a largest value."""
    model = nn.Sequential(nn.Linear(256, 4))  # W1 2 x 16, W2 2 x 16
    text = refused(model, "lokr", r=5)
    assert "0: r = 5" in text and "lokr_w2, 2 x 16 here" in text and "at most 2, or so large" in text
    assert "lokr_w1, 2 x 16 here" in refused(model, "lokr", r=5, decompose_both=True)
    for r in (2, 8, 500):
        ingraft.attach(nn.Sequential(nn.Linear(256, 4)), make_config("lokr", {"r": r, "target_modules": ["0"]}))


def test_more_ranks_than_a_prompt_can_have_are_refused() -> None:
    model = SUBJECTS["llama"].make_redrawn()
    options = {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 4, "target_modules": None}
    text = refused(model, "multitask-prompt", **options)
    assert "num_ranks = 4" in text and "3 x 16" in text and "at most 3" in text
    ingraft.attach(model, make_config("multitask-prompt", {**options, "num_ranks": 3}))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init_r": 4}, ("target_r = 8", "init_r = 4")),
        ({"tinit": -1}, ("tinit must not be negative, got -1",)),
        ({"tfinal": -2}, ("tfinal must not be negative, got -2",)),
        ({"deltaT": 0}, ("deltaT must be at least 1, got 0",)),
        ({"total_step": 1}, ("tinit = 0", "tfinal = 0", "1 step")),
        ({"total_step": 8, "tinit": 5, "tfinal": 3}, ("tinit = 5", "tfinal = 3", "8 steps")),
        ({"total_step": 10, "tinit": 7}, ("tinit = 7", "tfinal = 3", "10 steps")),
        ({"total_step": 10, "tinit": 0, "tfinal": 9}, ("tinit = 0", "tfinal = 9", "10 steps")),
    ],
)
def test_an_adalora_whose_budget_cannot_fall_is_refused(options: dict[str, Any], words: tuple[str, ...]) -> None:
    with pytest.raises(IngraftError) as caught:
        make_config("adalora", options)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("options", "total", "words"),
    [
        ({"tinit": 5, "tfinal": 3}, 8, ("tinit = 5", "tfinal = 3", "8 steps")),
        ({"tinit": 500, "tfinal": 1000}, 100, ("tinit = 500", "tfinal = 1000", "100 steps")),
        ({}, 1, ("tinit = 0", "tfinal = 0", "1 step")),
    ],
)
def test_an_adalora_that_has_no_time_is_refused_at_the_first_step(
    options: dict[str, Any], total: int, words: tuple[str, ...]
) -> None:
    """The trainer knows the length. Unrefused, the first step would drop directions by their order in the model: nothing is known of any yet."""
    model = net()
    ingraft.attach(model, make_config("adalora", {"init_r": 4, "target_r": 2, **options}), seed=1)
    model(torch.randn(3, 24)).square().mean().backward()
    with pytest.raises(IngraftError) as caught:
        ingraft.after_step(model, 1, total)
    assert [word for word in words if word not in str(caught.value)] == []
    assert all(part.kept.all() for part in model.modules() if hasattr(part, "kept"))


def test_two_steps_are_enough_for_an_adalora() -> None:
    model = net()
    ingraft.attach(model, make_config("adalora", {"init_r": 4, "target_r": 2}), seed=1)
    for step in (1, 2):
        model(torch.randn(3, 24)).square().mean().backward()
        ingraft.after_step(model, step, 2)
    assert sum(int(part.kept.sum()) for part in model.modules() if hasattr(part, "kept")) == 2  # the head is no site


# -------------------------------------------------------------------------------------------------- options that mean nothing


def test_regression_8_ranks_of_an_adalora_that_are_of_no_site_are_named() -> None:
    text = refused(net(), "adalora", init_r=4, target_r=2, rank_pattern={"0": 3, "7": 2})
    assert "rank_pattern: '7'" in text and "'0'" not in text


@pytest.mark.parametrize(
    ("method", "pattern"),
    [
        ("lora", "rank_pattern"),
        ("lora", "alpha_pattern"),
        ("loha", "alpha_pattern"),
        ("c3a", "block_size_pattern"),
        ("fourierft", "n_frequency_pattern"),
    ],
)
def test_regression_8_patterns_of_no_site_are_named(method: str, pattern: str) -> None:
    model = SUBJECTS["llama"].make_redrawn()
    text = refused(model, method, target_modules=["q_proj"], **{pattern: {"q_prj": 4, "q_proj": 4}})
    assert f"{pattern}: 'q_prj' matches none of the adapted modules" in text and "'q_proj'" not in text


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("lora", "rank_pattern"), ("c3a", "block_size_pattern"), ("fourierft", "n_frequency_pattern")],
)
def test_a_pattern_is_a_regular_expression_with_values_that_can_be(method: str, pattern: str) -> None:
    with pytest.raises(IngraftError) as caught:
        make_config(method, {pattern: {"q_proj": 0, "(": 4}})
    assert f"{pattern}: 'q_proj' must be at least 1, got 0" in str(caught.value)
    assert f"{pattern}: '(' is no regular expression" in str(caught.value)


def test_regression_8_feed_forward_modules_that_are_no_targets_are_named() -> None:
    """Passed over, they would have the layer scaled at its outputs instead of its inputs."""
    model = SUBJECTS["llama"].make_redrawn()
    text = refused(model, "ia3", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_prj", "up_proj"])
    assert "feedforward_modules: 'down_prj'" in text and "feedforward_modules: 'up_proj'" in text
    ingraft.attach(
        model, ingraft.IA3Config(target_modules=("k_proj", "down_proj"), feedforward_modules=("mlp.down_proj",))
    )


def edited(folder: Path, **changes: Any) -> Path:
    """A folder's config changed, as one that is not ours."""
    (folder / "ingraft.json").unlink()
    raw = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(raw | changes))
    return folder


@pytest.mark.parametrize(
    ("method", "options", "changes", "words"),
    [
        ("lora", {"r": 2}, {"rank_pattern": {"nowhere": 2}}, "rank_pattern: 'nowhere' matches none"),
        ("adalora", {"init_r": 2, "target_r": 1}, {"rank_pattern": {"no.lora_E": [True]}}, "rank_pattern: 'no' "),
        (
            "ia3",
            {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
            {"target_modules": ["k_proj"], "feedforward_modules": ["down_prj"]},
            "feedforward_modules: 'down_prj' matches none",
        ),
    ],
)
def test_regression_8_options_of_a_file_that_mean_nothing_are_said(
    method: str, options: dict[str, Any], changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    model = SUBJECTS["llama"].make_redrawn()
    kept = {"target_modules": ["k_proj"], **options, **({} if method != "ia3" else {"target_modules": ["k_proj"]})}
    kept.pop("feedforward_modules", None)
    ingraft.attach(model, make_config(method, kept), seed=1)
    ingraft.save(model, tmp_path / "a")
    with pytest.warns(UserWarning, match=words):
        ingraft.load(SUBJECTS["llama"].make_redrawn(), edited(tmp_path / "a", **changes))


# --------------------------------------------------------------------------------------------------------------------- wording


@pytest.mark.parametrize(("size", "r"), [(4, 4), (0, 0)])
def test_the_blocks_of_an_oft_are_told_by_their_size_or_by_their_number(size: int, r: int) -> None:
    with pytest.raises(IngraftError) as caught:
        make_config("oft", {"oft_block_size": size, "r": r})
    text = str(caught.value)
    assert f"oft_block_size = {size}" in text and f"r = {r}" in text
    assert "give exactly one" in text and "0 for the other" in text


@pytest.mark.parametrize(
    ("version", "exact", "said"),
    [
        (None, False, True),
        ("0.17.1", False, True),
        ("0.9", False, True),
        ("0.18.0", False, False),
        ("0.21.2@abc", False, False),
        ("1.0", False, False),
        ("0.17.1", True, False),
    ],
)
def test_a_file_of_an_older_series_is_said(version: str | None, exact: bool, said: bool, tmp_path: Path) -> None:
    """PEFT's series ended otherwise before 0.18, when it began to write its version; it says so too."""
    model = net()
    config = {"oft_block_size": 4, "use_cayley_neumann": not exact, "target_modules": ["0"]}
    ingraft.attach(model, make_config("oft", config))
    ingraft.save(model, tmp_path / "a")
    edited(tmp_path / "a", peft_version=version)
    if said:
        with pytest.warns(UserWarning, match=r"use_cayley_neumann.*0\.18"):
            ingraft.load(net(), tmp_path / "a")
    else:
        ingraft.load(net(), tmp_path / "a")
