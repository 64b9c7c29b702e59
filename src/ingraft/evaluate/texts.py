"""Written answers against those they should be: BLEU, ROUGE-L, exact match.

BLEU is sacrebleu's, with its own tokenizer for Chinese where the right answers are mostly that; ROUGE-L is rouge-score's. That drops
whatever is not ASCII, so it gets words from here: as its own for ASCII, the other scripts' letters kept, and each Chinese or Japanese character a word, as in
the F1 of answers. Some answers are right in several ways; each may then be compared with all of them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from ingraft.data.tagged import UNSPACED

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


def of_texts(said: Sequence[str], right: Sequence[Sequence[str]]) -> dict[str, float]:
    """`bleu` of the whole, 0 to 100 as everybody states it; `rouge_l` (F1) and `exact_match`, means over the answers, 0 to 1.

    Args:
        said: answers. right: for each the ways in which it would be right, at least one.
    """
    letters = "".join(text for texts in right for text in texts)
    chinese = len(_CHINESE.findall(letters)) * 2 > sum(map(str.isalnum, letters))
    sacrebleu: Any = import_module("sacrebleu")
    most = max(map(len, right))
    columns = [[texts[i] if i < len(texts) else None for texts in right] for i in range(most)]
    bleu = sacrebleu.corpus_bleu(list(said), columns, tokenize="zh" if chinese else "13a").score
    scorer: Any = import_module("rouge_score.rouge_scorer").RougeScorer(["rougeL"], tokenizer=Words())
    rouge = [
        max(scorer.score(text, answer)["rougeL"].fmeasure for text in texts)
        for answer, texts in zip(said, right, strict=True)
    ]
    exact = [_folded(answer) in map(_folded, texts) for answer, texts in zip(said, right, strict=True)]
    return {"bleu": float(bleu), "rouge_l": sum(rouge) / len(rouge), "exact_match": sum(exact) / len(exact)}


def _folded(text: str) -> str:
    """The text without what does not count: kinds of spaces, full-width forms."""
    return " ".join(unicodedata.normalize("NFKC", text).split())
