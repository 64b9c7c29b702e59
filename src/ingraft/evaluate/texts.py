"""Written answers against those they should be: BLEU, ROUGE-L, exact match.

BLEU is sacrebleu's, with its own tokenizer for Chinese where the right answers are mostly that; ROUGE-L is rouge-score's. That drops
whatever is not ASCII, so it gets words from here: as its own for ASCII, the other scripts' letters kept, and each Chinese or Japanese character a word, as in
the F1 of answers. Some answers are right in several ways; each may then be compared with all of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from ingraft.data.tagged import UNSPACED
from ingraft.evaluate.outcomes import Floats, floats

NEEDS = ("sacrebleu", "rouge_score")
"""What these metrics are computed with, as it is imported."""

_WORD = re.compile(r"[^\W_]+")
_CHINESE = re.compile(r"[\u4e00-\u9fff]")


class Words:
    """A tokenizer for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """The words of a text, in order, in lower case."""
        plain = unicodedata.normalize("NFKC", text).lower()
        return _WORD.findall(UNSPACED.sub(lambda found: f" {found.group()} ", plain))


BLEU_COUNTS = 10
"""Numbers that BLEU is computed from: how many words are said, how many there should be, then of stretches of one to four words those that are right and all."""


@dataclass(frozen=True, kw_only=True)
class Compared:
    """Answers against those they should be, one by one.

    Attributes:
        bleu_N10: see `BLEU_COUNTS`. rouge_N, exact_N: of each answer, 0 to 1.
    """

    bleu_N10: Floats
    rouge_N: Floats
    exact_N: Floats


def bleu_of(counts_10: Floats) -> float:
    """BLEU of answers together, 0 to 100, from the sums of their counts."""
    said, right, *pairs = (int(x) for x in counts_10)
    bleu: Any = import_module("sacrebleu.metrics").BLEU
    return float(bleu.compute_bleu(pairs[:4], pairs[4:], said, right, smooth_method="exp").score)


def of_texts(compared: Compared) -> dict[str, float]:
    """`bleu` of the whole, 0 to 100 as everybody states it; `rouge_l` (F1) and `exact_match`, means over the answers, 0 to 1."""
    count = len(compared.rouge_N)
    return {
        "bleu": bleu_of(compared.bleu_N10.sum(0)),
        "rouge_l": sum(compared.rouge_N.tolist()) / count,
        "exact_match": sum(compared.exact_N.tolist()) / count,
    }


def compare_texts(said: Sequence[str], right: Sequence[Sequence[str]]) -> Compared:
    """Args:
    said: answers. right: for each the ways in which it would be right, at least one.
    """
    letters = "".join(text for texts in right for text in texts)
    chinese = len(_CHINESE.findall(letters)) * 2 > sum(map(str.isalnum, letters))
    bleu: Any = import_module("sacrebleu.metrics").BLEU(tokenize="zh" if chinese else "13a", effective_order=True)
    each = [bleu.sentence_score(answer, list(texts)) for answer, texts in zip(said, right, strict=True)]
    scorer: Any = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=Words())
    rouge = [
        max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts)
        for answer, texts in zip(said, right, strict=True)
    ]
    exact = [_folded(answer) in map(_folded, texts) for answer, texts in zip(said, right, strict=True)]
    counts = [[one.sys_len, one.ref_len, *one.counts, *one.totals] for one in each]
    return Compared(bleu_N10=floats(counts).reshape(-1, BLEU_COUNTS), rouge_N=floats(rouge), exact_N=floats(exact))


def _folded(text: str) -> str:
    """The text without what does not count: kinds of spaces, full-width forms."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
