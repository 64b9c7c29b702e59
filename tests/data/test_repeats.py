"""What the data say twice is told by file and line: inside training, and between training and held-out rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingraft import data
from ingraft.data.repeats import bare
from ingraft.data.report import spread_of


def write(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(v, ensure_ascii=False) for v in values), encoding="utf-8")
    return str(path)


def test_repetitions_likenesses_and_contradictions_are_told_apart(tmp_path: Path, chatml: Any) -> None:
    """Each row counts once; the place of the earlier row stands beside it."""
    file = write(
        tmp_path / "rows.jsonl",
        {"text": "A good film.", "label": "pos"},
        {"text": "another", "label": "pos"},
        {"text": "A good film.", "label": "pos"},
        {"text": "a GOOD   film", "label": "pos"},
        {"text": "A good film.", "label": "neg"},
        {"text": "A good film.", "label": "pos"},
    )
    got = data.load(file, chatml).report
    found = got.parts[0].repeats
    assert (found.same.count, found.alike.count, found.contrary.count) == (2, 1, 1)
    assert found.same.first == [(f"{file}:3", f"{file}:1"), (f"{file}:6", f"{file}:1")]
    assert (found.alike.first, found.contrary.first) == ([(f"{file}:4", f"{file}:1")], [(f"{file}:5", f"{file}:1")])
    text = "\n".join(got.lines())
    assert f"duplicates: 2 rows repeat an earlier one ({file}:3 = {file}:1, {file}:6 = {file}:1)" in text
    assert f"but for case, spaces or punctuation ({file}:4 = {file}:1)" in text
    assert f"1 rows give the model what an earlier one gives, with another answer ({file}:5 = {file}:1)" in text
    assert json.loads(json.dumps(got.as_dict()))["parts"][0]["repeats"]["same"]["count"] == 2


def test_held_out_rows_that_training_has_seen_are_named(tmp_path: Path, chatml: Any) -> None:
    """Whatever their answers are; in evaluation and test alike."""
    train = write(tmp_path / "train.jsonl", *({"instruction": f"say {n}", "output": "x"} for n in range(5)))
    held = write(
        tmp_path / "held.jsonl", {"instruction": "say 3", "output": "y"}, {"instruction": "new", "output": "x"}
    )
    test = write(tmp_path / "test.jsonl", {"instruction": "Say  4!", "output": "x"})
    got = data.load(train, chatml, eval=held, test=test).report
    assert (got.shared, got.leaks["eval"].same.first) == (1, [(f"{held}:1", f"{train}:4")])
    assert got.leaks["test"].alike.first == [(f"{test}:1", f"{train}:5")]
    text = "\n".join(got.lines())
    assert f"eval: 1 rows have the text of a training row ({held}:1 = {train}:4)" in text
    assert f"test: 1 rows have but for case, spaces or punctuation the text of a training row ({test}:1" in text


def test_a_split_leaks_nothing_but_likenesses(tmp_path: Path, chatml: Any) -> None:
    """Equal texts stay on one side; such as differ by a full stop may not, and are then told."""
    rows = [{"instruction": f"say {n // 2}{'.' * (n % 2)}", "output": str(n)} for n in range(60)]
    got = data.load(write(tmp_path / "rows.jsonl", *rows), chatml, eval=0.3).report
    assert got.shared == 0
    assert got.leaks["eval"].alike.count > 3


def test_lines_of_a_text_may_repeat(tmp_path: Path, chatml: Any) -> None:
    (tmp_path / "a.txt").write_text("yes\n" * 40)
    got = data.load(str(tmp_path / "a.txt"), chatml, task="lm", eval=0.2).report
    assert (got.parts[0].duplicates, got.shared) == (0, 0)


@pytest.mark.parametrize(
    ("one", "other"), [("Ｇｏｏｄ，film", "good film"), ("很好。", "很好！"), ("a_b", "A b"), ("...", "...")]
)
def test_likeness(one: str, other: str) -> None:
    assert bare(one) == bare(other)
    assert bare("...") != bare("!") and bare("很好") != bare("很坏")


def test_lengths_are_counted_by_doubling_sizes() -> None:
    assert spread_of([3, 8, 9, 16, 17, 100]) == ((8, 2), (16, 2), (32, 1), (64, 0), (128, 1))
    assert spread_of([]) == ()
    assert spread_of([40] * 3) == ((64, 3),)
