"""Truncation, plain text, classes, unknown tokens: what encoding loses is counted, and nothing to learn is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ingraft.data.examples import IGNORED, Tally, as_chat, encode_lm, encode_sft
from ingraft.data.labelled import encode_classify, label_names
from ingraft.data.records import Document, Labelled
from ingraft.errors import IngraftError


def test_long_rows_are_cut_at_their_end_and_counted(chatml: Any, make_rows: Callable[..., Any]) -> None:
    rows = make_rows(
        {"instruction": "Q", "output": "A" * 50},
        {"instruction": "Q" * 80, "output": "A"},
        {"instruction": "Q", "output": "A"},
    )
    whole = encode_sft(rows, chatml, 1000)
    tally = Tally()
    cut = encode_sft(rows, chatml, 60, truncation="keep_start", tally=tally)
    assert [e.row_id for e in cut] == [0, 2], "row ids name rows, also after one was dropped"
    assert cut[0].input_ids == whole[0].input_ids[:60]
    assert cut[0].labels == (whole[0].labels or [])[:60]
    assert (tally.cut, tally.dropped, tally.lengths) == (2, ["rows.jsonl:2"], [len(e) for e in whole])


def test_regression_25_no_learned_token_is_an_error(chatml: Any, make_rows: Callable[..., Any]) -> None:
    rows = make_rows(*[{"instruction": "Q" * 80, "output": "A"}] * 3)
    with pytest.raises(IngraftError, match=r"none of the 3 rows has a learned token within max_length 20.*max-length"):
        encode_sft(rows, chatml, 20, truncation="keep_start")


def test_plain_text_has_no_answer(chatml: Any, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match=r"rows\.jsonl:1: .*--task lm"):
        encode_sft(make_rows({"text": "a"}), chatml, 20)
    assert as_chat(Document(text="a")) is None


def test_documents_are_cut_into_blocks_and_nothing_is_lost(chatml: Any, make_rows: Callable[..., Any]) -> None:
    texts = ["the first", "", "a second one", "x"]
    examples = encode_lm(make_rows(*[{"text": text} for text in texts]), chatml, 8)
    stream = [token for e in examples for token in e.input_ids]
    assert chatml.decode(stream) == "the first<|im_end|>a second one<|im_end|>x<|im_end|>"
    assert {len(e) for e in examples[:-1]} == {8}
    assert all(e.labels == e.input_ids for e in examples)
    assert [e.row_id for e in examples] == list(range(len(examples)))


def test_lines_of_a_file_stay_one_text(chatml: Any, metaspace: Any) -> None:
    from ingraft.data.readers import read_bytes

    rows = read_bytes(b"One.\n\nTwo\nthree\n", "a.txt") + read_bytes(b"Other", "b.txt")
    assert chatml.decode(encode_lm(rows, chatml, 100)[0].input_ids) == "One.\n\nTwo\nthree<|im_end|>Other<|im_end|>"
    tokens = metaspace.convert_ids_to_tokens(encode_lm(rows[:1], metaspace, 100)[0].input_ids)
    assert (tokens[0], tokens[-1]) == ("<s>", "</s>"), "a begin token where the tokenizer itself uses one"


def test_no_text_is_an_error(chatml: Any, make_rows: Callable[..., Any]) -> None:
    with pytest.raises(IngraftError, match="no text to learn"):
        encode_lm(make_rows({"text": " "}), chatml, 8)
    with pytest.raises(IngraftError, match="task lm learns plain text"):
        encode_lm(make_rows({"text": "a", "label": 1}), chatml, 8)


def test_classes_and_pairs(bert_like: Any, make_rows: Callable[..., Any]) -> None:
    tokenizer = bert_like("good", "bad", "food")
    rows = make_rows({"text": "Good food", "label": "yes"}, {"text": "bad bad bad", "label": "no"})
    tally = Tally()
    examples = encode_classify(rows, tokenizer, ["no", "yes"], 4, tally=tally)
    assert [tokenizer.convert_ids_to_tokens(e.input_ids) for e in examples] == [
        ["[CLS]", "good", "food", "[SEP]"],
        ["[CLS]", "bad", "bad", "[SEP]"],
    ]
    assert [e.label for e in examples] == [1, 0]
    assert (tally.cut, tally.lengths, examples[0].labels) == (1, [4, 5], None)
    pair = encode_classify(make_rows({"text": "good", "text2": "bad food", "label": 1}), tokenizer, ["0", "1"], 20)[0]
    assert tokenizer.convert_ids_to_tokens(pair.input_ids) == ["[CLS]", "good", "[SEP]", "bad", "food", "[SEP]"]
    assert pair.token_type_ids == [0, 0, 0, 1, 1, 1]


def test_unknown_labels_are_named(bert_like: Any, make_rows: Callable[..., Any]) -> None:
    rows = make_rows({"text": "good", "label": "yes"}, {"text": "bad", "label": "yess"})
    with pytest.raises(
        IngraftError,
        match=r"(?s)Known labels: no, yes.*rows\.jsonl:2: label 'yess' is unknown \(did you mean 'yes'\?\)",
    ):
        encode_classify(rows, bert_like("good"), ["no", "yes"], 20)
    with pytest.raises(IngraftError, match="these are instruction rows"):
        encode_classify(make_rows({"instruction": "Q", "output": "A"}), bert_like("good"), ["no"], 20)


def test_labels_have_a_stable_order() -> None:
    def names(*labels: str) -> tuple[str, ...]:
        return label_names([Labelled(text="t", text2=None, label=label) for label in labels])

    assert names("10", "9", "-1", "9") == ("-1", "9", "10")
    assert names("b", "a", "10") == ("10", "a", "b")


def test_unknown_tokens_are_counted_but_not_the_spelt_ones(
    bert_like: Any, chatml: Any, make_rows: Callable[..., Any]
) -> None:
    tally = Tally()
    encode_classify(make_rows({"text": "good [UNK] food", "label": 1}), bert_like("good"), ["1"], 20, tally=tally)
    assert (tally.unknown, tally.tokens) == (1, 3)
    tally = Tally()
    encode_sft(make_rows({"instruction": "问", "output": "答"}), chatml, 100, tally=tally)
    assert tally.unknown == 0


def test_learned_does_not_count_the_first_token(chatml: Any, make_rows: Callable[..., Any]) -> None:
    example = encode_lm(make_rows({"text": "abc"}), chatml, 10)[0]
    assert (len(example), example.learned) == (4, 3)
    masked = encode_sft(make_rows({"instruction": "Q", "output": "A"}), chatml, 100)[0]
    assert masked.learned == sum(label != IGNORED for label in masked.labels or []) == 2
