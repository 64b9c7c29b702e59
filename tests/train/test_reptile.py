"""Rounds over files: by hand the same numbers, the same bits after a stop, and a start from which one file's task is nearer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ingraft.cli.sources import settle
from ingraft.data.examples import Example
from ingraft.data.mixing import Origin, Part
from ingraft.errors import IngraftError
from ingraft.recipe import as_recipe
from ingraft.train import loop
from ingraft.train.learner import make_learner
from ingraft.train.reptile import Rounds
from ingraft.train.run import train
from ingraft.train.schedule import plan

Make = Callable[..., dict[str, Any]]


class Killed(BaseException):
    pass


@pytest.fixture
def several(recipe: Make, home: Path, tmp_path: Path) -> Make:
    """Three files of 20 rows."""
    lines = (home / "rows.jsonl").read_text().splitlines(keepends=True)
    files = [tmp_path / f"part{n}.jsonl" for n in range(3)]
    for n, file in enumerate(files):
        file.write_text("".join(lines[n::3]))

    def make(**changes: Any) -> dict[str, Any]:
        values = recipe(meta={"inner_steps": 3, "step_size": 0.8}, max_steps=20, save_steps=4, eval_steps=0, **changes)
        values["data"] |= {"train": [{"file": str(file)} for file in files], "eval": 6}
        return values

    return make


def _part(sizes: tuple[int, ...]) -> Part:
    examples = [Example(input_ids=[1] * (2 + n % 3), row_id=n) for n in range(sum(sizes))]
    origins, at = [], 0
    for n, size in enumerate(sizes):
        there = range(at, at + size)
        origins.append(Origin(name=str(n), file=str(n), rows=there, examples=there, shift=at))
        at += size
    return Part(rows=[], records=[], examples=examples, origins=tuple(origins))


def test_a_round_is_of_one_file_and_every_file_has_one_a_cycle(several: Make) -> None:
    recipe = as_recipe(several())
    part = _part((9, 30, 5))
    weight = nn.Parameter(torch.zeros(2))
    rounds = Rounds(recipe, plan(recipe, 44), part, make_learner("a", {"w": weight}, recipe, half=False))
    seen = []
    for step in range(60):
        rows = [row.row_id for row in rounds.rows(step)]
        (file,) = {next(i for i, origin in enumerate(part.origins) if row in origin.rows) for row in rows}
        seen.append((file, rows))
    files = [file for file, _ in seen]
    assert all(len(set(files[at : at + 3])) == 1 for at in range(0, 60, 3)), "a round is of one file"
    assert all(set(files[at : at + 9]) == {0, 1, 2} for at in range(0, 54, 9)), "a cycle has all files"
    assert len({tuple(files[at : at + 9 : 3]) for at in range(0, 54, 9)}) > 1, "in orders of their own"
    for file, size in enumerate((9, 30, 5)):  # passes over a file's rows are whole
        own = [row for at, rows in seen if at == file for row in rows]
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size])) == size


def test_the_adapter_goes_part_of_the_way_with_an_optimiser_that_knows_nothing(several: Make) -> None:
    recipe = as_recipe(several())
    weight = nn.Parameter(torch.zeros(2))
    learner = make_learner("a", {"w": weight}, recipe, half=False)
    rounds = Rounds(recipe, plan(recipe, 14), _part((7, 7)), learner)
    at = torch.zeros(2)
    for step in range(20):
        rounds.rows(step)
        if step % 3 == 0:
            assert not learner.optimizer.state
            torch.testing.assert_close(weight.detach(), at)
        weight.grad = torch.tensor([1.0, -2.0])
        learner.apply(0.1, 0.0)
        if step % 3 == 2 or step == 19:
            share = 0.8 * (1 - (step // 3) / 7)
            at = at + share * (weight.detach() - at)
        rounds.behind(step + 1)
    torch.testing.assert_close(weight.detach(), at)


def test_a_stopped_run_ends_with_the_same_bits(several: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a round: the checkpoint is one step into it."""
    whole = train(several(output_dir=str(tmp_path / "whole")), quiet=True)
    values = several(output_dir=str(tmp_path / "cut"))
    step = loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 11:
            raise Killed
        return step(session, progress, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "step", dying)
        train(values, quiet=True)
    cut = train(values, resume_from_checkpoint="last", quiet=True)
    settled = settle({"data.train": values["data"]["train"][0]["file"]}, adapter=str(cut.folder))
    assert not settled.meta.inner_steps, "what a run was made with is nothing to a verb that only asks"
    paths = [folder / "adapter_model.safetensors" for folder in (whole.folder, cut.folder)]
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_what_is_learned_lies_between_the_tasks(several: Make) -> None:
    """Each file pulls to a goal of its own; plain steps end near the last file's, rounds between all."""
    recipe = as_recipe(several(learning_rate=0.1))
    part = _part((8, 8, 8, 8))
    goals = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)) + 3.0
    weight = nn.Parameter(torch.zeros(6))
    learner = make_learner("a", {"w": weight}, recipe, half=False)
    steps = replace(plan(recipe, 32), total=240)
    rounds = Rounds(recipe, steps, part, learner)
    for step in range(240):
        file = rounds.rows(step)[0].row_id // 8
        (weight - goals[file]).square().sum().backward()
        learner.apply(0.1, 0.0)
        rounds.behind(step + 1)
    away = (weight.detach() - goals.mean(0)).norm()
    assert away < 0.5 * (goals - goals.mean(0)).norm(dim=1).min()


def test_a_method_that_keeps_books_is_refused(several: Make, tmp_path: Path) -> None:
    with pytest.raises(IngraftError, match=r"meta\.inner_steps: adalora counts"):
        train(several(method="adalora", method_config={}, output_dir=str(tmp_path / "run")), quiet=True)
    assert not (tmp_path / "run").exists()


def test_what_has_no_meaning_is_refused(several: Make, home: Path) -> None:
    values = several(task="dpo")
    with pytest.raises(IngraftError, match="not for task 'dpo'"):
        as_recipe(values)
    values = several()
    values["data"]["train"][0]["weight"] = 2
    values["data"]["train"][1]["weight"] = values["data"]["train"][2]["weight"] = 1
    with pytest.raises(IngraftError, match="weights would mean nothing"):
        as_recipe(values)
    values["eval_steps"] = 4
    with pytest.raises(IngraftError, match="4 is no multiple of 3"):
        as_recipe(values)
    values["data"]["train"] = str(home / "rows.jsonl")
    with pytest.raises(IngraftError, match="names one; name several"):
        as_recipe(values)
