"""Written answers against right ones: the libraries' figures, in Chinese too."""

from __future__ import annotations

import math
import random

import pytest

from ingraft.evaluate.texts import Words, compare_texts
from ingraft.evaluate.texts import of_texts as of_compared


def of_texts(said: list[str], right: list[list[str]]) -> dict[str, float]:
    return of_compared(compare_texts(said, right))


def test_bleu_is_its_definition() -> None:
    """One to four words in a row: 4 of 5, 3 of 4, 2 of 3, 1 of 2, of an answer as long as the right one."""
    found = of_texts(["the cat sat down there"], [["the cat sat down here"]])
    wanted = 100 * math.exp(sum(map(math.log, (4 / 5, 3 / 4, 2 / 3, 1 / 2))) / 4)
    assert found["bleu"] == pytest.approx(wanted)
    assert found["rouge_l"] == pytest.approx(0.8)
    assert found["exact_match"] == 0.0
    assert of_texts(["a b c d"], [["a b c d"]]) == pytest.approx({"bleu": 100.0, "rouge_l": 1.0, "exact_match": 1.0})


def test_an_answer_may_be_right_in_several_ways() -> None:
    """And not every question has equally many."""
    said, right = (
        ["one two three four", "five six seven eight"],
        [["no", "one two three four"], ["five six seven eight"]],
    )
    assert of_texts(said, right) == pytest.approx({"bleu": 100.0, "rouge_l": 1.0, "exact_match": 1.0})


def test_rouge_is_rouge_scores_own_for_ascii() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    rng, alphabet = random.Random(0), "ab c_d'e-F.9 \n"
    texts = ["".join(rng.choices(alphabet, k=60)) for _ in range(20)]
    plain = RougeScorer(["rougeL"])
    for said, right in zip(texts[::2], texts[1::2], strict=True):
        wanted = plain.score(right, said)["rougeL"].fmeasure
        assert of_texts([said], [[right]])["rouge_l"] == pytest.approx(wanted)


def test_chinese_counts_by_the_character() -> None:
    """Longest common sequence of three in four and four characters; punctuation is no word for ROUGE. Full-width forms are the same text."""
    found = of_texts(["我喜欢你。"], [["我喜欢他。"]])
    assert found["rouge_l"] == pytest.approx(3 / 4)
    assert found["bleu"] > 0, "by characters: as one word nothing would agree"
    assert of_texts(["价格：１９９８年，很好"], [["价格:1998年,很好"]])["exact_match"] == 1.0
    assert Words().tokenize("Café 北京2008 Привет") == ["café", "北", "京", "2008", "привет"]


def test_nothing_said_is_nothing_right() -> None:
    assert of_texts([""], [["a b c d"]]) == {"bleu": 0.0, "rouge_l": 0.0, "exact_match": 0.0}
