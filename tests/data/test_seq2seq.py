"""Questions and answers for encoder-decoders."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from ingraft.data import preview
from ingraft.data.examples import Tally
from ingraft.data.records import Chat
from ingraft.data.rows import Row
from ingraft.data.seq2seq import encode_pairs

PLACE = Row(values={}, file="f", line=1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """`<end>` is 1 and is put behind every text, as T5's own tokenizer does; words are those of the test."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<end>", "<unk>", "what", "is", "it", "a", "film", "good", "and"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", pad_token="<pad>", unk_token="<unk>")


def chat(*texts: str) -> Chat:
    roles = ["user", "assistant"] * len(texts)
    return Chat(messages=tuple({"role": role, "content": text} for role, text in zip(roles, texts, strict=False)))


def test_both_sides_end_and_are_cut_each_for_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    """A question that is cut still ends; an answer that is cut does not, for it would teach to stop there."""
    tally = Tally()
    found = encode_pairs(
        [chat("what is it", "a film"), chat("it " * 9, "good " * 9)], [PLACE] * 2, tokenizer, 5, tally=tally
    )
    assert (found[0].input_ids, found[0].target) == ([3, 4, 5, 1], [6, 7, 1])
    assert (found[1].input_ids, found[1].target) == ([5, 5, 5, 5, 1], [8] * 5)
    assert (len(found[0]), found[0].learned, found[0].answer) == (7, 3, (6, 7, 1))
    assert tally.cut == len(tally.lost) == 1
    assert tally.lengths == [7, 20]


def test_the_last_answer_is_learned_and_the_turns_before_it_are_read(tokenizer: PreTrainedTokenizerFast) -> None:
    tally = Tally()
    found = encode_pairs([chat("what is it", "a film", "and", "good")], [PLACE] * 2, tokenizer, 16, tally=tally)[0]
    assert found.input_ids == [3, 4, 5, 6, 7, 9, 1]
    assert found.target == [8, 1]
    assert tally.more["earlier answers of conversations, which are read and not learned"] == 1
    assert tally.tokens == 7, "special tokens are none of the texts'"


def test_a_tokenizer_that_ends_nothing_gets_its_answers_ended(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    found = encode_pairs([chat("what", "a film")], [PLACE] * 2, tokenizer, 16, tally=Tally())[0]
    assert (found.input_ids, found.target) == ([3], [6, 7, 1])


def test_the_preview_marks_the_answer(tokenizer: PreTrainedTokenizerFast) -> None:
    row = Row(values={"prompt": "what is it", "completion": "a film"}, file="f", line=1)
    shown = preview(row, tokenizer, task="seq2seq")
    assert [learned for _, learned in shown] == [False] * 4 + [True] * 3
    assert "film" in shown[-2][0]
