"""Several answers to one prompt: the same prompt before each, cut alike, nothing kept that has nothing to tell, and all of it counted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ingraft.data import collate, encode_prompt, encode_sft, row_ids
from ingraft.data.examples import IGNORED, Example, Tally
from ingraft.data.formats import read_records
from ingraft.data.preferences import UNJUDGED, Compared, encode_judged, encode_preferences
from ingraft.errors import IngraftError

Rows = Callable[..., Any]


def encoded(rows: Any, tokenizer: Any, max_length: int = 1000, **options: Any) -> list[Compared]:
    encode = encode_judged if "completion" in rows[0].values else encode_preferences
    return encode(read_records(rows)[1], rows, tokenizer, max_length, **options)


def prompt_of(example: Example) -> list[int]:
    assert example.labels is not None
    return [token for token, label in zip(example.input_ids, example.labels, strict=True) if label == IGNORED]


def answer_of(example: Example, tokenizer: Any) -> str:
    return tokenizer.decode([label for label in example.labels or [] if label != IGNORED])


def test_a_pair_is_two_sequences_of_one_prompt(chatml: Any, make_rows: Rows) -> None:
    """The prompt's tokens are those that generation gives; the answer and its end are learned; earlier answers are not."""
    turns = [{"role": r, "content": c} for r, c in (("user", "the"), ("assistant", "or"), ("user", "is"))]
    (row,) = encoded(make_rows({"messages": turns, "chosen": "an er", "rejected": "no"}), chatml)
    assert [answer_of(one, chatml) for one in row.sequences] == ["an er<|im_end|>", "no<|im_end|>"]
    for one in row.sequences:
        assert prompt_of(one) == encode_prompt(turns, chatml)
    assert row.places == (1, 2)
    assert len(row) == sum(len(one.input_ids) for one in row.sequences)
    assert row.learned == sum(len(one.input_ids) - len(prompt_of(one)) for one in row.sequences)
    alone = encode_sft(make_rows({"prompt": "the", "completion": "or"}), chatml, 1000)[0]
    (pair,) = encoded(make_rows({"prompt": "the", "chosen": "or", "rejected": "x"}), chatml)
    assert alone.input_ids[: len(pair.input_ids)] == pair.input_ids, (
        "as supervised training reads it, but for what follows the answer"
    )


def test_a_batch_has_a_row_for_each_sequence(chatml: Any, make_rows: Rows) -> None:
    """Side by side, padded alike, with the dropout of one row."""
    rows = make_rows(
        {"prompt": "the", "responses": ["a", "b b", "c"], "ranking": [2, 1, 3]},
        {"prompt": "is it", "responses": ["x", "y"], "ranking": [1, 2]},
    )
    examples = encoded(rows, chatml)
    assert [row.places for row in examples] == [(1, 2, 3), (1, 2)]
    assert answer_of(examples[0], chatml) == "b b<|im_end|>", "the best first"
    batch = collate(examples, 0)
    flat = [one for row in examples for one in row.sequences]
    assert batch["input_ids"].shape == batch["labels"].shape == (5, max(len(one.input_ids) for one in flat))
    for ids, mask, one in zip(batch["input_ids"], batch["attention_mask"], flat, strict=True):
        assert ids[mask.bool()].tolist() == one.input_ids
    assert row_ids(examples).tolist() == [0, 0, 0, 1, 1]


def test_long_answers_are_cut_and_prompts_never_if_that_is_wanted(chatml: Any, make_rows: Rows) -> None:
    """Whatever the length, what is left of two answers stands behind the same whole prompt; pairs that end up equal are dropped and named."""
    rows = make_rows(
        {"prompt": "Q", "chosen": "same start, one end", "rejected": "same start, other"},
        {"prompt": "Q", "chosen": "short", "rejected": "a much longer answer than the other one"},
        {"prompt": "Q" * 20, "chosen": "x", "rejected": "y"},
        {"prompt": "Q", "chosen": "equal", "rejected": "equal"},
    )
    prompts = [encode_prompt([{"role": "user", "content": row.values["prompt"]}], chatml) for row in rows]
    for max_length in range(len(prompts[0]) + 1, 90):
        tally = Tally()
        for row in encoded(rows, chatml, max_length, truncation="keep_start", tally=tally):
            for one in row.sequences:
                assert prompt_of(one) == prompts[row.row_id]
                assert len(one.input_ids) <= max_length
            first, second = row.sequences
            assert first.input_ids != second.input_ids
        assert "rows.jsonl:4" in tally.same
        assert ("rows.jsonl:1" in tally.same) is (max_length <= len(prompts[0]) + len("same start, o"))
        assert tally.dropped == (["rows.jsonl:3"] if max_length <= len(prompts[2]) else [])


def test_equal_answers_of_a_ranking_count_once(chatml: Any, make_rows: Rows) -> None:
    """The better place holds; a row is dropped only where nothing is left to compare."""
    rows = make_rows(
        {"prompt": "Q", "responses": ["a", "b", "a"], "ranking": [3, 2, 1]},
        {"prompt": "Q", "responses": ["a", "a"], "ranking": [1, 2]},
    )
    tally = Tally()
    (row,) = encoded(rows, chatml, tally=tally)
    assert (row.places, tally.same) == ((1, 2), ["rows.jsonl:2"])


def test_a_judged_answer_is_seen_beside_one_of_another_prompt(chatml: Any, make_rows: Rows) -> None:
    """The same one in every epoch and every batch; nobody judged it."""
    rows = make_rows(
        *({"prompt": f"Q{i // 2}", "completion": f"A{i}", "label": i % 2 == 0} for i in range(12)),
    )
    examples = encoded(rows, chatml)
    given = []
    for number, row in enumerate(examples):
        own, other = row.sequences
        assert row.places == (int(number % 2 == 0), UNJUDGED)
        assert answer_of(own, chatml) == f"A{number}<|im_end|>"
        assert prompt_of(own) == prompt_of(other)
        given.append(int(answer_of(other, chatml).removeprefix("A").removesuffix("<|im_end|>")))
        assert given[-1] // 2 != number // 2
    assert len(set(given)) >= 8
    assert examples == encoded(rows, chatml)
    (alone,) = encoded(make_rows({"prompt": "Q", "completion": "A", "label": False}), chatml)
    assert alone.places == (0,)


def test_an_encoder_reads_a_pair_of_texts(bert_like: Any, make_rows: Rows) -> None:
    """Prompt and answer with the tokenizer's own marks between, cut at the answer's end alone."""
    tokenizer = bert_like("how", "do", "you", "well", "thanks", "go", "away", "now")
    rows = make_rows(
        {"prompt": "how do you do", "chosen": "well thanks", "rejected": "go away now"},
        {"prompt": "how do you do how do", "chosen": "well", "rejected": "go"},
    )
    tally = Tally()
    (row,) = encoded(rows, tokenizer, 9, whole=True, tally=tally)
    texts = [tokenizer.decode(one.input_ids) for one in row.sequences]
    assert texts == ["[CLS] how do you do [SEP] well thanks [SEP]", "[CLS] how do you do [SEP] go away [SEP]"]
    assert row.beside[0].token_type_ids == [0] * 6 + [1] * 3
    assert (tally.cut, tally.dropped) == (2, ["rows.jsonl:2"])
    batch = collate([row], 0)
    assert torch.equal(batch["labels"], torch.tensor([1, 2])), "places, for a model that says one number"


def test_what_cannot_be_compared_is_refused(chatml: Any, with_template: Any, make_rows: Rows) -> None:
    """No row left, by what happened to them; a template that lets the answer change the prompt, by file and line."""
    pair = {"prompt": "Q" * 50, "chosen": "a", "rejected": "b"}
    with pytest.raises(
        IngraftError, match=r"none of the 2 rows.*in 1 the prompt leaves.*in 1 the answers are the same"
    ):
        encoded(make_rows(pair, {"prompt": "Q", "chosen": "a", "rejected": "a"}), chatml, 60, truncation="keep_start")
    telling = with_template(
        "{{ '!' if messages[-1]['content'] == 'b' else '?' }}{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(IngraftError, match=r"rows\.jsonl:1: the chat template .* does not show"):
        encoded(make_rows(pair), telling)


def test_blanks_before_one_answer_belong_to_it(with_template: Any, make_rows: Rows) -> None:
    """Also with a template whose generation prompt opens what its past does not show, so that the answer is found by its words."""
    thinking = with_template(
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:<think>{% endif %}"
    )
    (row,) = encoded(make_rows({"prompt": "Q", "chosen": "a", "rejected": "\n b"}), thinking)
    assert [thinking.decode(prompt_of(one)) for one in row.sequences] == ["user:Q<|im_end|>assistant:"] * 2
    assert [answer_of(one, thinking) for one in row.sequences] == ["a<|im_end|>", "\n b<|im_end|>"]


def test_the_report_names_dropped_pairs(chatml: Any, make_rows: Rows) -> None:
    """In `ingraft data` and at the start of a run."""
    from ingraft.data import task_of
    from ingraft.data.mixing import Part
    from ingraft.data.report import part_report

    rows = make_rows({"prompt": "Q", "chosen": "a", "rejected": "b"}, {"prompt": "Q", "chosen": "a", "rejected": "a"})
    tally, records = Tally(), read_records(rows)[1]
    found = part_report(
        "train", Part(rows=rows, records=records, examples=encoded(rows, chatml, tally=tally)), tally, task_of("dpo")
    )
    assert "2 rows from rows.jsonl, 2 sequences" in found.lines()[0]
    assert any("the answers are the same" in line and "rows.jsonl:2" in line for line in found.lines())
