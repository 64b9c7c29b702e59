"""What is left of a row that is too long: never more than `max_length`, what is learned whole wherever that can be, and every loss counted."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from ingraft import data
from ingraft.data.cutting import LEAST, TRUNCATION, fitted, learned, length, level, middle_out
from ingraft.errors import IngraftError


def write(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(v, ensure_ascii=False) for v in values), encoding="utf-8")
    return str(path)


def conversation(rng: random.Random) -> list[tuple[list[int], bool]]:
    """Turns of numbers that tell where they stood."""
    sizes = [
        (rng.choice([3, 20, 200]), False) if n % 2 == 0 else (rng.choice([1, 30, 150]), True)
        for n in range(rng.choice([2, 4, 7]))
    ]
    start, made = 0, []
    for size, counts in sizes:
        made.append((list(range(start, start + size)), counts))
        start += size
    return made


@pytest.mark.parametrize("truncation", TRUNCATION)
def test_rows_are_cut_to_the_length_and_stay_in_order(truncation: str) -> None:
    """Short rows stay as they are; of long ones what is left is part of the row, in its order."""
    rng = random.Random(truncation)
    for _ in range(300):
        pieces, most = conversation(rng), rng.choice([2, 9, 64, 300])
        kept = fitted(pieces, most, truncation)
        assert length(kept) <= most
        if length(pieces) <= most:
            assert kept == pieces
        left = [token for tokens, _ in kept for token in tokens]
        assert left == sorted(set(left))
        marked = {token for tokens, counts in pieces if counts for token in tokens}
        assert all((token in marked) == counts for tokens, counts in kept for token in tokens)


def test_what_is_learned_stays_whole_where_prompts_can_give_way() -> None:
    """All of it, if it fits beside `LEAST` tokens of each prompt; and then no place is left empty."""
    rng, tried = random.Random(0), 0
    for _ in range(500):
        pieces, most = conversation(rng), 300
        while pieces and not pieces[-1][1]:
            pieces.pop()
        needed = learned(pieces) + sum(min(LEAST, len(tokens)) for tokens, counts in pieces if not counts)
        if length(pieces) > most >= needed:
            kept = fitted(pieces, most, "keep_answer")
            assert (learned(kept), length(kept)) == (learned(pieces), most)
            tried += 1
    assert tried > 20


def test_a_prompt_loses_its_middle_and_a_conversation_its_last_turns() -> None:
    prompt, answer = list(range(100)), list(range(100, 110))
    (kept, _), (said, _) = fitted([(prompt, False), (answer, True)], 30, "keep_answer")
    assert kept == [*range(10), *range(90, 100)] and said == answer
    turns = [(list(range(n * 100, n * 100 + 60)), n % 2 == 1) for n in range(8)]
    assert fitted(turns, 250, "keep_answer") == turns[:4]
    (kept, _), (said, _) = fitted([(prompt, False), (list(range(100, 400)), True)], 100, "keep_answer")
    assert (len(kept), said) == (50, list(range(100, 150))), "an answer that is too long by itself loses its end"


def test_the_longest_give_way_first() -> None:
    assert level([5, 100, 40, 80], 105) == [5, 34, 33, 33]
    assert level([5, 6], 20) == [5, 6]
    assert level([], 3) == []
    assert middle_out([1, 2, 3, 4, 5], 3) == [1, 2, 5]


def test_the_front_goes_and_the_token_that_begins_stays() -> None:
    pieces = [([7, 1, 2, 3], False), ([4, 5], True), ([6], False)]
    assert [t for tokens, _ in fitted(pieces, 4, "keep_end") for t in tokens] == [3, 4, 5, 6]
    assert [t for tokens, _ in fitted(pieces, 4, "keep_end", begin=7) for t in tokens] == [7, 4, 5, 6]


ROWS = [
    {"instruction": "Q" * 300, "output": "A"},
    {"instruction": "Q", "output": "A" * 300},
    {"instruction": "Q", "output": "A"},
]


def test_the_default_keeps_answers_and_the_report_tells_every_loss(tmp_path: Path, chatml: Any) -> None:
    """A short answer behind a long prompt is learned whole; a long answer loses its end, and its row is named."""
    file = write(tmp_path / "rows.jsonl", *ROWS)
    got = data.load(file, chatml, max_length=100)
    assert [e.row_id for e in got.train] == [0, 1, 2]
    text = chatml.decode(got.train[0].input_ids)
    assert (
        text.endswith("assistant\nA<|im_end|>") and text.startswith("<|im_start|>user\nQQ") and len(got.train[0]) == 100
    )
    (part,) = got.report.parts
    assert (part.cut, [place.rpartition(":")[2] for place in part.lost]) == (2, ["2"])
    assert "warning: 1 of them lose part of what is to be learned" in "\n".join(got.report.lines())
    assert data.load(file, chatml, max_length=100, truncation="keep_start").report.parts[0].dropped == (f"{file}:1",)
    ends = data.load(file, chatml, max_length=100, truncation="keep_end")
    assert chatml.decode(ends.train[1].input_ids).endswith("AAA<|im_end|>\n")


def test_long_rows_are_left_out_or_refused(tmp_path: Path, chatml: Any) -> None:
    file = write(tmp_path / "rows.jsonl", *ROWS)
    got = data.load(file, chatml, max_length=100, truncation="drop")
    assert [e.row_id for e in got.train] == [2]
    assert got.report.parts[0].long == (f"{file}:1", f"{file}:2")
    assert "dropped, longer than max_length: 2 rows" in "\n".join(got.report.lines())
    with pytest.raises(IngraftError, match="2 of 3 rows are longer than max_length 100") as caught:
        data.load(file, chatml, max_length=100, truncation="refuse")
    assert caught.value.problems[1:] == (f"{file}:1", f"{file}:2")
    assert len(data.load(file, chatml, truncation="refuse").train) == 3
    with pytest.raises(IngraftError, match="all 1 rows are longer than max_length 100"):
        data.load(write(tmp_path / "long.jsonl", ROWS[1]), chatml, max_length=100, truncation="drop")


def test_texts_with_a_class_are_cut_at_the_end_that_is_wanted(tmp_path: Path, bert_like: Any) -> None:
    tokenizer = bert_like(*"abcdef")
    values = [{"text": "a b c d e f", "label": "x"}, {"text": "a", "label": "y"}]
    file = write(tmp_path / "rows.jsonl", *values)
    kept = {
        how: tokenizer.decode(
            data.load(file, tokenizer, task="classify", max_length=5, truncation=how).train[0].input_ids
        )
        for how in ("keep_answer", "keep_start", "keep_end")
    }
    assert (kept["keep_answer"], kept["keep_start"], kept["keep_end"]) == (
        *["[CLS] a b c [SEP]"] * 2,
        "[CLS] d e f [SEP]",
    )
    assert tokenizer.truncation_side == "right"


def test_two_answers_have_one_prompt_after_cutting(tmp_path: Path, chatml: Any) -> None:
    """Cut to what the longer answer leaves, and both answers are whole."""
    file = write(tmp_path / "rows.jsonl", {"prompt": "Q" * 200, "chosen": "yes" * 9, "rejected": "no"})
    (row,) = data.load(file, chatml, task="dpo", max_length=80).train
    prompts, answers = zip(
        *((e.input_ids[: e.labels.count(-100)], e.input_ids[e.labels.count(-100) :]) for e in row.sequences),
        strict=True,
    )
    assert prompts[0] == prompts[1]
    assert [chatml.decode(a) for a in answers] == ["yes" * 9 + "<|im_end|>", "no<|im_end|>"]
    assert max(map(len, row.sequences)) == 80


def test_a_way_of_cutting_that_makes_no_difference_is_refused(tmp_path: Path, chatml: Any) -> None:
    file = write(tmp_path / "rows.jsonl", {"text": "some text"})
    with pytest.raises(IngraftError, match="'keep_end' is not for task 'lm': it cuts no rows"):
        data.load(file, chatml, task="lm", truncation="keep_end")
