"""Values of a wrong type in the verbs: refused in words, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ingraft
from ingraft import IngraftError, LoraConfig


def model() -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    return ingraft.attach(made, LoraConfig(r=2, target_modules=["0"]), name="a", seed=1)


@pytest.mark.parametrize("seed", ["x", 1.5, True])
def test_a_seed_is_a_whole_number(seed: Any) -> None:
    with pytest.raises(IngraftError, match="attach: seed must be a whole number"):
        ingraft.attach(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), seed=seed)
    with pytest.raises(IngraftError, match="combine: seed must be a whole number"):
        ingraft.combine(model(), {"a": 1.0}, "b", seed=seed)


def test_a_seed_out_of_an_array_is_one() -> None:
    made = nn.Sequential(nn.Linear(4, 4))
    ingraft.attach(made, LoraConfig(r=2, target_modules=["0"]), seed=torch.tensor(3))  # type: ignore[arg-type]
    assert ingraft.status(made).adapters[0].name == "default"


@pytest.mark.parametrize(
    ("weights", "options", "words"),
    [
        ({"a": "x"}, {}, "the weight of 'a' must be a finite number, got 'x'"),
        ({"a": None}, {}, "the weight of 'a'"),
        ({"a": True}, {}, "the weight of 'a'"),
        ({"a": float("nan")}, {}, "the weight of 'a' must be a finite number, got nan"),
        (["a"], {}, "a weight for each adapter by its name is wanted"),
        (
            {"a": "x"},
            {"rank": "2", "density": "much"},
            r"(?s)'a'.*rank must be a whole number.*density must be a number",
        ),
    ],
)
def test_weights_are_numbers(weights: Any, options: dict[str, Any], words: str) -> None:
    made = model()
    with pytest.raises(IngraftError, match=words):
        ingraft.combine(made, weights, "b", **options)
    assert [adapter.name for adapter in ingraft.status(made).adapters] == ["a"]
