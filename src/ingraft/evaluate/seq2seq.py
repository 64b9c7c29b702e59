"""Encoder-decoders, judged: the loss of the answers they should write, and the answers that they write against those.

Rows that ask the same (several people's answers to one question) are one question to be answered, which each of their answers would be right for.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ingraft.data.examples import Example, as_chat
from ingraft.data.seq2seq import question_and_answer
from ingraft.evaluate.generation import generate
from ingraft.evaluate.loss import LossOutcomes, Poll, score_loss
from ingraft.evaluate.outcomes import Floats, Ratio, column, floats, mean
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.texts import NEEDS, Compared, bleu_of, compare_texts, of_texts

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row

LONGEST_ANSWER = 256
"""In tokens. An evaluation writes no more than this, and no more than one and a half times the longest right answer."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WrittenOutcomes(LossOutcomes):
    """Of what is written as well; a row here is a question, with all its answers. By question as in `texts.Compared`."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"exact_match"})

    bleu: Floats = column()
    rouge: Floats = column()
    exact: Floats = column()

    def metrics(self) -> dict[str, float]:
        return super().metrics() | of_texts(Compared(bleu_N10=self.bleu, rouge_N=self.rouge, exact_N=self.exact))

    def ratios(self) -> dict[str, Ratio]:
        return super().ratios() | {"rouge_l": mean(self.rouge), "exact_match": mean(self.exact)}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        bleu_R = floats([bleu_of(counts) for counts in times_RN @ self.bleu])
        return super().others(times_RN) | {"bleu": bleu_R}


class Seq2SeqScorer(Scorer):
    """Loss and perplexity of the answers; BLEU, ROUGE-L and exact match of what is written."""

    task: ClassVar[str] = "seq2seq"
    headline: ClassVar[str] = "bleu"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    needs: ClassVar[tuple[str, ...]] = NEEDS

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> LossOutcomes:
        examples = data.parts[part].examples
        losses = score_loss(self.model, examples, self.pad_id, batch_size, poll)
        asked: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for position, example in enumerate(examples):
            asked[tuple(example.input_ids)].append(position)
        sums = [math.fsum(losses.sums[i] for i in rows) for rows in asked.values()]
        counts = [sum(losses.counts[i] for i in rows) for rows in asked.values()]
        if not whole:
            return LossOutcomes(sums=sums, counts=counts)
        right = [[_texts(data.parts[part], examples[i])[1] for i in rows] for rows in asked.values()]
        found = compare_texts(self.written(list(asked), examples, batch_size, poll), right)
        return WrittenOutcomes(sums=sums, counts=counts, bleu=found.bleu_N10, rouge=found.rouge_N, exact=found.exact_N)

    def written(
        self,
        questions: Sequence[Sequence[int]],
        examples: Sequence[Example],
        batch_size: int = 8,
        poll: Poll | None = None,
    ) -> list[str]:
        """Answers to questions, of at most half as many tokens again as the longest right answer of these examples."""
        longest = max(len(example.target or ()) for example in examples)
        limit = min(LONGEST_ANSWER, max(16, longest * 3 // 2))
        return generate(self.model, self.tokenizer, questions, max_new_tokens=limit, batch_size=batch_size, poll=poll)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        pairs = [_texts(part, example) for example in examples]
        return [{"prompt": question, "expected": answer} for question, answer in pairs]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        del part
        return self.written([example.input_ids for example in examples], examples, poll=poll)

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(position: int, answer: str) -> None:
            done(position, {"prediction": answer})

        questions = [example.input_ids for example in self.encoded(rows, asked).examples]
        size, longest = asked.batch_size, asked.max_new_tokens
        generate(self.model, self.tokenizer, questions, max_new_tokens=longest, batch_size=size, done=told)


def _texts(part: Part, example: Example) -> tuple[str, str]:
    """What the row of an example asks, and its answer."""
    chat = as_chat(part.records[example.row_id])
    assert chat is not None, "the task's records"
    return question_and_answer(chat)
