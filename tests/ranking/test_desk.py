"""What is ranked is in the file, once, whatever happens; what is not an order changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ingraft.data import read_records, read_rows
from ingraft.data.records import Ranking
from ingraft.errors import IngraftError
from ingraft.ranking.desk import Desk, Question

TURNS = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "b?"}]


def _desk(target: Path, count: int = 2) -> Desk:
    prompts = ["a?", TURNS, "c?"][:count]
    desk = Desk(target, prompts)
    for prompt in prompts:
        if json.dumps(prompt, sort_keys=True) not in desk.known:
            desk.put(Question(prompt=prompt, responses=["one", "two", "three"]))
    desk.full()
    return desk


def _rank(desk: Desk, order: tuple[str, ...] = ("two", "one", "three")) -> dict[str, Any]:
    asked = desk.state()["question"]
    desk.rank(asked["number"], [order.index(text) + 1 for text in asked["responses"]])
    return asked


def test_an_order_is_a_row_that_a_reward_model_reads(tmp_path: Path) -> None:
    desk = _desk(tmp_path / "ranked.jsonl")
    _rank(desk)
    _rank(desk, ("three", "one", "two"))
    assert desk.complete.is_set()
    records = read_records(read_rows(tmp_path / "ranked.jsonl"), "auto")[1]
    assert all(isinstance(record, Ranking) for record in records)
    best = [
        dict(zip(record.places, record.answers, strict=True))[1] for record in records if isinstance(record, Ranking)
    ]
    assert best == ["two", "three"]
    assert [len(record.messages) for record in records if isinstance(record, Ranking)] == [1, 2]


def test_answers_are_shown_in_an_order_that_the_prompt_decides(tmp_path: Path) -> None:
    first = [_rank(desk) for desk in [_desk(tmp_path / "a.jsonl", 3)] for _ in range(3)]
    again = [_rank(desk) for desk in [_desk(tmp_path / "b.jsonl", 3)] for _ in range(3)]
    assert first == again
    assert len({tuple(asked["responses"]) for asked in first}) > 1


def test_what_the_file_holds_is_not_asked_again(tmp_path: Path) -> None:
    _rank(_desk(tmp_path / "ranked.jsonl", 3))
    desk = _desk(tmp_path / "ranked.jsonl", 3)
    state = desk.state()
    assert (state["ranked"], state["waiting"], state["total"]) == (1, 2, 3)
    assert state["question"]["prompt"] == TURNS
    assert not state["undo"], "only this session's orders can be taken back"


def test_skipped_is_asked_the_next_time(tmp_path: Path) -> None:
    desk = _desk(tmp_path / "ranked.jsonl")
    desk.skip(desk.state()["question"]["number"])
    assert desk.state()["question"]["prompt"] == TURNS and desk.state()["skipped"] == 1
    _rank(desk)
    assert desk.complete.is_set()
    assert _desk(tmp_path / "ranked.jsonl").state()["question"]["prompt"][0]["content"] == "a?"


def test_the_last_order_can_be_taken_back(tmp_path: Path) -> None:
    target = tmp_path / "ranked.jsonl"
    desk = _desk(target, 3)
    _rank(desk)
    before = target.read_bytes()
    asked = _rank(desk)
    desk.undo()
    assert target.read_bytes() == before and desk.state()["question"] == asked
    desk.undo()
    assert target.read_bytes() == b"" and not desk.complete.is_set()
    with pytest.raises(IngraftError, match="no ranking to take back"):
        desk.undo()


@pytest.mark.parametrize(
    "places",
    [[1, 2], [1, 2, 3, 4], [1, 1, 1], [0, 1, 2], [1, 2, 4], [1, 2, True], [1, 2, "3"], [1.0, 2, 3], [], [None, 1, 2]],
)
def test_no_order_no_row(tmp_path: Path, places: list[Any]) -> None:
    desk = _desk(tmp_path / "ranked.jsonl")
    state = desk.state()
    with pytest.raises(IngraftError, match="3 places from 1 to 3"):
        desk.rank(0, places)
    with pytest.raises(IngraftError, match="is not open"):
        desk.rank(7, [1, 2, 3])
    assert desk.state() == state and not (tmp_path / "ranked.jsonl").exists()


def test_ties_are_orders(tmp_path: Path) -> None:
    desk = _desk(tmp_path / "ranked.jsonl")
    desk.rank(0, [1, 1, 2])
    assert json.loads((tmp_path / "ranked.jsonl").read_text())["ranking"] == [1, 1, 2]


def test_a_file_of_something_else_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "rows.jsonl"
    for text in ('{"text": "x"}\n', "no json\n", "[1]\n"):
        target.write_text(text)
        with pytest.raises(IngraftError, match=r"rows\.jsonl:1: is no ranked row"):
            Desk(target, ["a?"])
        assert target.read_text() == text


def test_separators_of_unicode_are_letters_like_others(tmp_path: Path) -> None:
    target = tmp_path / "ranked.jsonl"
    desk = Desk(target, ["a?", "b?"])
    for prompt in ("a?", "b?"):
        desk.put(Question(prompt=prompt, responses=["x\u2028y", "z\x85w", "u\u2029v"]))
    _rank(desk, ("x\u2028y", "z\x85w", "u\u2029v"))
    before = target.read_bytes()
    _rank(desk, ("x\u2028y", "z\x85w", "u\u2029v"))
    desk.undo()
    assert target.read_bytes() == before
    assert len(Desk(target, ["a?", "b?"]).known) == 1


def test_a_folder_that_is_not_there_is_told_of_first(tmp_path: Path) -> None:
    with pytest.raises(IngraftError, match="there is no folder"):
        Desk(tmp_path / "nowhere" / "ranked.jsonl", ["a?"])
