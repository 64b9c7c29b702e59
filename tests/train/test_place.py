"""Where a run writes: nothing that is not a run's is taken away, and what lies behind a name must not change under a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from ingraft.errors import IngraftError
from ingraft.recipe import as_recipe, to_yaml
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("how", [{"resume_from_checkpoint": "last"}, {"overwrite_output_dir": True}])
@pytest.mark.parametrize("files", [["thesis.txt", "sub/a"], ["recipe.yaml"], ["recipe.yaml", "log.jsonl", "notes.md"]])
def test_a_folder_that_is_not_only_a_runs_is_left_alone(
    recipe: Make, tmp_path: Path, how: dict[str, Any], files: list[str]
) -> None:
    mine = tmp_path / "mine"
    for name in files:
        (mine / name).parent.mkdir(parents=True, exist_ok=True)
        (mine / name).write_text("years of work")
    before = contents(mine)
    with pytest.raises(IngraftError, match="will not be deleted"):
        train(recipe(output_dir=str(mine)), quiet=True, **how)
    assert contents(mine) == before


def test_a_run_goes_on_in_a_folder_where_notes_were_put(recipe: Make, tmp_path: Path) -> None:
    """Going on from a checkpoint takes nothing away; neither does a run that was stopped before its first line of the log."""
    run = train(recipe(max_steps=4), quiet=True)
    for name in ("ingraft.json", "metrics.json", "report.html", "adapter_config.json", "adapter_model.safetensors"):
        (run.folder / name).unlink()
    (run.folder / "notes.md").write_text("mine")
    again = train(recipe(max_steps=4), resume_from_checkpoint="last", quiet=True)
    assert (again.folder / "notes.md").read_text() == "mine"
    early = tmp_path / "early"
    early.mkdir()
    values = recipe(max_steps=2, output_dir=str(early))
    (early / "recipe.yaml").write_text(to_yaml(as_recipe(values)))
    assert train(values, resume_from_checkpoint="last", quiet=True).steps == 2


def test_a_run_that_ends_before_it_began_leaves_nothing(recipe: Make, tmp_path: Path) -> None:
    values = recipe(metric_for_best_model="acuracy", output_dir=str(tmp_path / "new"))
    with pytest.raises(IngraftError, match="did you mean 'accuracy'"):
        train(values, quiet=True)
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    with pytest.raises(IngraftError, match="did you mean 'accuracy'"):
        train(values, quiet=True)
    assert list((tmp_path / "new").iterdir()) == []


def test_another_base_under_the_same_name_is_not_gone_on_with(recipe: Make, home: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(home / "llama", base)
    run = train(recipe(model=str(base), max_steps=4), quiet=True)
    for name in ("ingraft.json", "metrics.json", "report.html", "adapter_config.json", "adapter_model.safetensors"):
        (run.folder / name).unlink()
    tensors = load_file(base / "model.safetensors")
    save_file({name: x + 0.5 for name, x in tensors.items()}, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IngraftError, match="base's content"):
        train(recipe(model=str(base), max_steps=4), resume_from_checkpoint="last", quiet=True)


def test_what_training_starts_from_is_what_the_recipe_says(recipe: Make, tmp_path: Path) -> None:
    """Another method, or options it does not have, are refused; its own are what the run records."""
    first = train(recipe(max_steps=2, method_config={"r": 4, "lora_alpha": 4}), quiet=True)
    start = {"init_adapter": str(first.folder), "output_dir": str(tmp_path / "second"), "max_steps": 2}
    with pytest.raises(IngraftError, match="holds a lora adapter, and method is ia3"):
        train(recipe(**start, method="ia3", method_config={}), quiet=True)
    with pytest.raises(IngraftError, match=r"method_config.r: 2 is asked for, .* has 4"):
        train(recipe(**start, method_config={"r": 2}), quiet=True)
    second = train(recipe(**start, method_config={}), quiet=True)
    written = as_recipe(second.folder / "recipe.yaml")
    assert (written.method_config["r"], written.method_config["lora_alpha"]) == (4, 4)


def test_a_training_too_short_for_its_method_is_refused_before_the_base_is_loaded(
    recipe: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How many steps an epoch has is known with the data."""
    monkeypatch.setattr("ingraft.train.run.load_base", None)
    values = recipe(method="adalora", method_config={"tinit": 500, "tfinal": 500}, max_steps=-1, num_train_epochs=1)
    with pytest.raises(IngraftError, match=r"tinit = 500 and tfinal = 500 leave none of \d+ steps"):
        train(values, quiet=True)
