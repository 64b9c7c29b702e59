"""Configs are inert data that say every reason why they cannot work; the registry knows each method without torch."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from ingraft import LoraConfig, adapt
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import AttentionPart, InputPart, Method, OutputPart, ParameterPart, WeightPart
from ingraft.testing.table import METHODS

FAMILIES = {"weight": WeightPart, "bottleneck": OutputPart, "prefix": AttentionPart, "prompt": InputPart}


@pytest.mark.parametrize("name", registry.records())
def test_a_record_says_what_the_method_is(name: str) -> None:
    record, method = registry.record(name), registry.load(name)
    assert isinstance(method, Method)
    assert method.name == name == method.config.method
    assert method.config.__name__ == record.config
    assert method.mergeable == record.mergeable
    assert record.summary and record.equation and record.paper
    assert issubclass(method.part, FAMILIES.get(record.family, WeightPart | ParameterPart))


def test_every_method_is_in_the_table_of_the_laws() -> None:
    assert set(METHODS) == set(registry.records())


@pytest.mark.parametrize("name", registry.records())
def test_a_method_is_one_readable_file(name: str) -> None:
    source = Path(inspect.getsourcefile(registry.load(name).part) or "")
    text = source.read_text()
    assert len(text.splitlines()) <= 150
    header = text.split('"""')[1]
    assert "What differs" in header or "Read against" in header or name in ("houlsby", "pfeiffer", "parallel")
    assert "Paper:" in header


@pytest.mark.parametrize("name", registry.records())
def test_a_config_is_frozen_and_survives_its_own_options(name: str) -> None:
    config = registry.load(name).config()
    assert registry.make_config(name, config.options()) == config
    assert hash(config) == hash(registry.load(name).config())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.target_modules = ("x",)  # type: ignore[misc]
    with pytest.raises(TypeError):
        registry.load(name).config("q_proj")  # type: ignore[call-arg, misc]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        (
            "lora",
            {"r": 0, "lora_dropout": 1.0, "init_lora_weights": "pissa"},
            ["r must be", "lora_dropout", "init_lora_weights"],
        ),
        ("dora", {"r": -1}, ["r must be"]),
        ("lora", {"lora_alpha": 0, "alpha_pattern": {"q": 0}}, ["lora_alpha must not be 0", "'q' must not be 0"]),
        ("loha", {"alpha": 0}, ["alpha must not be 0"]),
        ("adalora", {"lora_alpha": 0.0}, ["lora_alpha must not be 0"]),
        ("gralora", {"alpha": 0}, ["alpha must not be 0"]),
        ("randlora", {"randlora_alpha": 0}, ["randlora_alpha must not be 0"]),
        (
            "lora",
            {"r": True, "lora_dropout": False, "rank_pattern": {"q": True}},
            ["method_config.r: must be a whole number, got True", "lora_dropout", "rank_pattern"],
        ),
        ("loha", {"r": [True], "init_weights": True}, ["method_config.r: must be a whole number"]),
        (
            "houlsby",
            {"reduction_factor": 0, "non_linearity": "step", "dropout": -0.1},
            ["reduction_factor", "non_linearity", "dropout"],
        ),
        ("pfeiffer", {"init_weights": "zero"}, ["init_weights"]),
        ("prefix", {"num_virtual_tokens": 0, "encoder_hidden_size": 4}, ["num_virtual_tokens", "prefix_projection"]),
        ("prompt", {"num_virtual_tokens": 0, "prompt_init": "zeros"}, ["num_virtual_tokens", "prompt_init"]),
    ],
)
def test_every_impossible_value_is_named(name: str, options: dict[str, object], words: list[str]) -> None:
    with pytest.raises(IngraftError) as caught:
        registry.make_config(name, options)
    assert len(caught.value.problems) >= len(words)
    assert [word for word in words if word not in str(caught.value)] == []


def test_unknown_options_and_methods_are_named_with_the_nearest() -> None:
    with pytest.raises(IngraftError, match="no option 'lora_aplha' \\(did you mean 'lora_alpha'"):
        registry.make_config("lora", {"lora_aplha": 3})
    with pytest.raises(IngraftError) as caught:
        registry.make_config("lora", {"rank": 3, "r": "many", "dropout": 0})
    assert len(caught.value.problems) == 3
    with pytest.raises(IngraftError, match=r"no method named 'lroa' \(did you mean .*'lora'"):
        registry.load("lroa")


def test_lists_become_tuples_and_sets_are_sorted() -> None:
    """Regression 19: set order made the incumbent's files differ from run to run."""
    config = registry.load("lora").config
    assert config(target_modules=["b", "a"]).target_modules == ("b", "a")
    assert config(target_modules={"b", "a"}).target_modules == ("a", "b")  # type: ignore[arg-type]
    assert config(target_modules="b|a").target_modules == "b|a"
    assert config(layers_to_transform=3).layers_to_transform == (3,)  # type: ignore[arg-type]


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys; from ingraft.methods import registry; assert len(registry.records()) >= 10; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_counts_of_wide_models_need_no_memory() -> None:
    """A formula, not a sum: 70 billion parameters are counted on the meta device."""
    import torch

    from ingraft.adapt import expected_count
    from ingraft.methods.lora import LoraConfig

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(8192, 8192) for _ in range(1000)), nn.Linear(8192, 2))
    assert expected_count(model, LoraConfig(r=16)) == 1000 * 16 * 2 * 8192


NAN = float("nan")


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        (LoraConfig, {"r": 2.5}, "r must be a whole number, got 2.5"),
        (
            LoraConfig,
            {"r": "8", "lora_alpha": NAN},
            "r must be a whole number.*\n*.*lora_alpha must be a finite number, got nan",
        ),
        (LoraConfig, {"rank_pattern": {"q_proj": 2.5}}, "rank_pattern must be a mapping, by name a whole number"),
        (LoraConfig, {"layers_to_transform": "0"}, "layers_to_transform must be a list, each a whole number or null"),
        (LoraConfig, {"target_modules": [3]}, "target_modules must be a text or a list, each a text or null"),
        (LoraConfig, {"trainable_token_indices": "a"}, "trainable_token_indices must be"),
    ],
    ids=lambda value: (
        value.__name__ if isinstance(value, type) else next(iter(value)) if isinstance(value, dict) else ""
    ),
)
def test_values_of_another_type_are_refused_by_name(config: Any, options: dict[str, Any], words: str) -> None:
    """All of them at once, before a model is there."""
    with pytest.raises(IngraftError, match=words):
        config(**options)


def test_numbers_out_of_an_array_are_numbers() -> None:
    config = LoraConfig(r=np.int64(4), lora_alpha=np.float32(8.0), layers_to_transform=range(2))  # type: ignore[arg-type]
    assert (config.r, config.lora_alpha, config.layers_to_transform) == (4, 8.0, (0, 1))
    assert type(config.r) is int


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("x", LoraConfig()), "the model is a str"),
        ((nn.Linear(2, 2), {"r": 3}), "a method's config is wanted"),
        ((nn.Linear(2, 2), LoraConfig(), None), "None is no name"),
    ],
    ids=["model", "config", "name"],
)
def test_attach_says_what_it_wants(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(IngraftError, match=words):
        adapt.attach(*arguments)
