"""A fusion trained from a recipe, over runs that are done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ingraft import IngraftError
from ingraft.train.run import train

MEMBERS = ("one", "two")
Make = Callable[..., dict[str, Any]]


def test_a_run_trains_a_fusion_of_two_runs(recipe: Make, tmp_path: Path) -> None:
    """The members come from their run folders, stay as they are, and lie in the run folder of the fusion."""
    member = {"method": "pfeiffer", "method_config": {"reduction_factor": 4.0}, "max_steps": 2}
    folders = {
        name: str(train(recipe(output_dir=str(tmp_path / name), seed=n, **member), quiet=True).folder)
        for n, name in enumerate(MEMBERS)
    }
    run = train(
        recipe(
            output_dir=str(tmp_path / "both"),
            method="fusion",
            method_config={},
            adapters=folders,
            max_steps=4,
            learning_rate=1e-3,
        ),
        quiet=True,
    )
    for name in MEMBERS:
        kept = (tmp_path / "both" / "adapters" / name / "adapter_model.safetensors").read_bytes()
        assert kept == (tmp_path / name / "adapter_model.safetensors").read_bytes()
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"method": "fusion"}, "adapters: fusion acts over two trained adapters or more"),
        ({"method": "fusion", "adapters": {"one": "x"}}, r"it is to act over one"),
        ({"method": "fusion", "adapters": {"one": "x", "two": "y"}}, r"adapters\.two: there is no y"),
        ({"method": "lora", "adapters": {"one": "x"}}, r"lora acts on the base alone; leave adapters out \(fusion"),
    ],
)
def test_a_recipe_without_what_it_fuses_is_refused(changes: dict[str, Any], words: str, recipe: Make) -> None:
    with pytest.raises(IngraftError, match=words):
        train(recipe(method_config={}, **changes), quiet=True)
