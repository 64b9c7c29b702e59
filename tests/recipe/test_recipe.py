"""Laws of the recipe: it survives writing and reading, and a bad one is answered with all of its problems at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ingraft.errors import IngraftError
from ingraft.recipe import Recipe, as_recipe, load_recipe, recipe_fields, scalar, to_yaml

SMALL: dict[str, Any] = {"model": "smollm2", "data": {"train": "rows.jsonl"}}

SETTINGS: list[dict[str, Any]] = [
    {},
    {"method_config": {"r": 4, "target_modules": ["q_proj", "v_proj"]}},
    {"learning_rate": 1e-5, "adam_epsilon": 1e-12, "max_steps": 3, "warmup_steps": 2},
    {"model": "2e-4", "output_dir": "runs/yes: no #1", "data": {"train": "行.jsonl", "eval": 100, "test": "null"}},
    {"data": {"train": "a", "eval": "1e3"}, "save_total_limit": None, "early_stopping_patience": 2},
    {"data": "rows.csv.gz", "task": "classify", "gradient_checkpointing": True},
]


def problems(values: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(IngraftError) as caught:
        as_recipe(values)
    return caught.value.problems


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resolved_recipe_survives_yaml(settings: dict[str, Any], tmp_path: Path) -> None:
    """load(to_yaml(r)) == r, for words that YAML would take for numbers too."""
    recipe = as_recipe({**SMALL, **settings})
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(recipe), encoding="utf-8")
    assert load_recipe(file) == recipe
    assert as_recipe(recipe) == recipe


def test_every_key_is_spelled_out() -> None:
    """The written recipe names every field, and the method's own options with their defaults."""
    text = to_yaml(as_recipe(SMALL))
    for key, _, item in recipe_fields():
        assert f"{key.split('.')[-1]}:" in text
        assert item.metadata["help"]
    assert "lora_alpha" in text


def test_every_problem_is_reported_at_once() -> None:
    """Unknown keys, wrong types, impossible combinations and the method's keys come in one error."""
    found = problems(
        {
            "modle": "smollm2",
            "data": {"train": "rows.jsonl", "max_lenght": 3, "eval": 0},
            "learning_rate": "fast",
            "task": "sftt",
            "max_length": 3,
            "load_best_model_at_end": True,
            "method_config": {"rank": 3, "lora_alhpa": 2},
            "trust_remote_code": True,
        }
    )
    text = "\n".join(found)
    for words in (
        "model: is needed",
        "modle: there is no such key (did you mean 'model'?)",
        "data.max_lenght: there is no such key (did you mean 'data.max_length'?)",
        "max_length: there is no such key (did you mean 'data.max_length'?)",
        "learning_rate: should be a number, got 'fast'",
        "task: 'sftt' is none of",
        "load_best_model_at_end: needs rows to evaluate on",
        "'rank'",
        "'lora_alpha'",
        "only the command line",
    ):
        assert words in text, words
    assert len(found) == len(set(found)) == 10


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"task": "diffusion"}, "task"),
        ({"quantization": "nf5"}, "quantization"),
        ({"data": {"train": "a", "eval": 1.5}}, "data.eval"),
        ({"data": {"train": "a", "eval": -3}}, "data.eval"),
        ({"data": {"train": " "}}, "data.train"),
        ({"data": {"train": "a", "max_length": 1}}, "data.max_length"),
        ({"max_steps": 0}, "max_steps"),
        ({"max_steps": 3, "warmup_steps": 4}, "warmup_steps"),
        ({"eval_steps": 0, "early_stopping_patience": 1}, "early_stopping_patience"),
        ({"learning_rate": 0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"seed": -1}, "seed"),
        ({"warmup_ratio": 1.5}, "warmup_ratio"),
        ({"method": "lorra"}, "method"),
        ({"method_config": {"r": 0}}, "method_config"),
        (
            {"method": "adalora", "method_config": {"tinit": 5, "tfinal": 5}, "max_steps": 10},
            "method_config",
        ),
        ({"method_config": {"r": "many"}}, "method_config.r"),
        ({"method_config": {"r": True}}, "method_config.r"),
        ({"method_config": {"layers_to_transform": [True]}}, "method_config.layers_to_transform"),
        ({"learning_rate": True}, "learning_rate"),
        ({"eval_steps": True}, "eval_steps"),
        ({"save_total_limit": True}, "save_total_limit"),
        ({"data": {"train": "a", "eval": True}}, "data.eval"),
        ({"data": {"train": "a", "max_length": False}}, "data.max_length"),
        ({"save_total_limit": 0}, "save_total_limit"),
        ({"gradient_checkpointing": "maybe"}, "gradient_checkpointing"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(settings: dict[str, Any], key: str) -> None:
    """One mistake gives one problem, and it begins with the key to change."""
    found = problems({**SMALL, **settings})
    assert len(found) == 1, found
    assert found[0].startswith(f"{key}:"), found


def test_overrides_win_and_merge(tmp_path: Path) -> None:
    """Options lie over the file key by key; another method drops the file's method options, which would not be its own."""
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ndata: {train: a, max_length: 64}\nmethod: lora\nmethod_config: {r: 4, lora_alpha: 2}\n")
    recipe = load_recipe(file, {"data.eval": 7, "method_config": {"r": 16}, "seed": 1})
    assert (recipe.data.max_length, recipe.data.eval, recipe.seed) == (64, 7, 1)
    assert (recipe.method_config["r"], recipe.method_config["lora_alpha"]) == (16, 2)
    other = load_recipe(file, {"method": "full"})
    assert "lora_alpha" not in other.method_config


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- a", "a recipe is a mapping"),
        ("model: a\nmodel: b", "given twice"),
        ("model: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, words: str, tmp_path: Path) -> None:
    """Broken, ambiguous or dangerous YAML is an error that names the file."""
    file = tmp_path / "r.yaml"
    file.write_text(text)
    with pytest.raises(IngraftError, match=words) as caught:
        load_recipe(file)
    assert str(file) in str(caught.value)


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    """No such file and not text: both are named."""
    with pytest.raises(IngraftError, match="cannot read"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(IngraftError, match="not UTF-8"):
        load_recipe(tmp_path / "b.yaml")


def test_words_become_what_they_mean() -> None:
    """A value from the command line is read as YAML, with 1e-3 as a number."""
    words = ["1e-3", "2", "a b", "true", "[q, v]", "null", "-1", "{", "all-linear"]
    assert [scalar(word) for word in words] == [0.001, 2, "a b", True, ["q", "v"], None, -1, "{", "all-linear"]


def test_the_recipe_is_frozen() -> None:
    """Nothing can change a run's recipe after it was checked."""
    recipe = as_recipe(SMALL)
    assert isinstance(recipe, Recipe)
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.seed = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_the_example_recipes_are_valid() -> None:
    """Every recipe in examples/ passes its own checks."""
    root = Path(__file__).parents[2] / "examples"
    files = sorted(root.rglob("*.yaml"))
    assert len(files) >= 4
    for file in files:
        load_recipe(file)
