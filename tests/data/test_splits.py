"""A split is a pure function of the rows' texts and the seed; classes keep their shares; equal texts never part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingraft.data.readers import read_bytes
from ingraft.data.splits import split
from ingraft.errors import IngraftError

ROWS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from("abc")), min_size=8, max_size=80)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs=ROWS, seed=st.integers(0, 5), wanted=st.integers(1, 5))
def test_the_laws_of_a_split(
    pairs: list[tuple[int, str]], seed: int, wanted: int, make_rows: Callable[..., Any]
) -> None:
    rows = make_rows(*[{"text": f"t{number}", "label": label} for number, label in pairs])
    try:
        train, held = split(rows, wanted, seed)
    except IngraftError as error:
        assert "can be set aside" in str(error)
        return
    assert sorted([*train, *held], key=lambda row: row.line) == rows
    assert 0 < len(held) <= wanted
    assert not {row.values["text"] for row in train} & {row.values["text"] for row in held}
    assert [row.line for row in train] == sorted(row.line for row in train)
    assert (train, held) == split(rows, wanted, seed)
    assert {row.line for row in split(rows[::-1], wanted, seed)[1]} == {row.line for row in held}


def test_classes_keep_their_shares(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(*[{"text": f"t{n}", "label": "rare" if n % 10 == 0 else "often"} for n in range(500)])
    train, held = split(rows, 0.2, 0)
    assert Counter(row.values["label"] for row in held) == {"often": 90, "rare": 10}
    assert len(train) == 400
    assert held != split(rows, 0.2, 1)[1]


def test_no_class_is_only_evaluated(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(*[{"text": f"t{n}", "label": n // 2} for n in range(20)])
    for seed in range(5):
        train, held = split(rows, 15, seed)
        assert {row.values["label"] for row in train} == set(range(10))
        assert len(held) == 10, "as many as the law allows"


def test_more_rows_keep_most_of_the_split(make_rows: Callable[..., Any]) -> None:
    values = [{"instruction": f"q{n}", "output": "A"} for n in range(1100)]
    before = {row.values["instruction"] for row in split(make_rows(*values[:1000]), 100, 7)[1]}
    after = {row.values["instruction"] for row in split(make_rows(*values), 110, 7)[1]}
    assert len(before & after) > 90


def test_questions_with_several_answers_travel_together(make_rows: Callable[..., Any]) -> None:
    rows = make_rows(*[{"instruction": f"q{n % 50}", "output": f"A{n}"} for n in range(200)])
    train, held = split(rows, 0.25, 3)
    assert 40 <= len(held) <= 50
    assert not {row.values["instruction"] for row in train} & {row.values["instruction"] for row in held}


def test_a_running_text_gives_its_end(make_rows: Callable[..., Any]) -> None:
    rows = read_bytes("\n".join("same" for _ in range(20)).encode(), "a.txt")
    train, held = split(rows, 0.25, 0)
    assert [row.line for row in held] == [16, 17, 18, 19, 20]
    assert len(train) == 15


def test_every_way_to_ask(tmp_path: Path, make_rows: Callable[..., Any]) -> None:
    rows = make_rows(*[{"text": f"t{n}"} for n in range(20)])
    for nothing in (None, 0, 0.0, "0"):
        assert split(rows, nothing, 0) == (rows, [])
    assert len(split(rows, 0.1, 0)[1]) == len(split(rows, "0.1", 0)[1]) == len(split(rows, 2, 0)[1]) == 2
    assert len(split(rows, 0.001, 0)[1]) == 1, "a share that was asked for is never nothing"
    other = tmp_path / "eval.jsonl"
    other.write_text('{"text": "else"}')
    for name in (other, str(other)):
        assert [row.values["text"] for row in split(rows, name, 0)[1]] == ["else"]


@pytest.mark.parametrize(
    ("eval", "message"),
    [
        (1.5, "share"),
        (-1, "share"),
        (True, "share"),
        (20, "leaves none"),
        (float("nan"), "share"),
        (float("inf"), "share"),
    ],
)
def test_senseless_requests_are_refused(eval: float, message: str, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match=message):
        split(make_rows(*[{"text": f"t{n}"} for n in range(20)]), eval, 0)


def test_one_text_cannot_be_split(make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match="equal texts stay together"):
        split(make_rows(*[{"text": "t", "label": 1}] * 20), 5, 0)
