"""A model that finds answers in a context, judged as SQuAD judges: exact match and F1 of the texts, the best of a question's right answers counting.

The answer to a row is the likeliest span over all of its windows, by the sum of its first token's and last token's logits. Spans across tokens of the
question, backward ones, and those longer than `LONGEST` tokens are no answers. Every row has an answer, so the place for "not in this window"
(`data/spans.py`) teaches windows to stay silent and is never chosen.

Texts are compared without case, punctuation, English articles and spaces of another width. Characters of scripts without spaces count as words each, as
the evaluations of MLQA and CMRC 2018 have it. (CMRC's own program then takes the longest common run of them where SQuAD's, and this one, takes common ones
in any order.)
"""

from __future__ import annotations

import math
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.examples import Example
from ingraft.data.records import Span
from ingraft.data.spans import ELSEWHERE
from ingraft.data.tagged import UNSPACED
from ingraft.evaluate.loss import Poll, by_length, device_of
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.outcomes import Outcomes, Ratio, column, floats, mean
from ingraft.evaluate.scorer import Asked, Done, Scorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row

LONGEST = 64
"""An answer has so many tokens at most. The field's usual 30 are English; an answer of Chinese has a token a character."""

Best = tuple[float, int, int]
"""A span: its logits' sum, its first character in the context, and the one behind its last."""


def window_logits(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the first and of the last token of the answer, (B, T) float32 each; padding can be neither, so that it has no part in a loss."""
    found = model(**inputs)
    padding_BT = inputs["attention_mask"] == 0
    start_BT, end_BT = (x.float().masked_fill(padding_BT, -math.inf) for x in (found.start_logits, found.end_logits))
    return start_BT, end_BT


def best_span(start_T: Tensor, end_T: Tensor, places: Sequence[tuple[int, int]]) -> Best:
    """The likeliest span of a window; the first of equals.

    Args:
        start_T, end_T: logits of its tokens, padding behind them allowed. places: as `Example.characters`.
    """
    inside_C = torch.tensor([at for at, place in enumerate(places) if place != ELSEWHERE], device=start_T.device)
    sums_CC = start_T[inside_C, None] + end_T[None, inside_C]
    allowed_CC = torch.ones_like(sums_CC, dtype=torch.bool).triu().tril(LONGEST - 1)
    sums_CC = sums_CC.masked_fill(~allowed_CC, -math.inf)
    first, last = divmod(int(sums_CC.argmax()), len(inside_C))
    value = float(sums_CC[first, last])
    return value, places[int(inside_C[first])][0], places[int(inside_C[last])][1]


@dataclass(frozen=True, kw_only=True, eq=False)
class SpanOutcomes(Outcomes):
    """Of a model that finds answers: by row the losses of its windows, and how right the answer is."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"exact_match"})

    losses: Sequence[Sequence[float]] = column()
    exact: Sequence[float] = column()
    f1: Sequence[float] = column()

    def metrics(self) -> dict[str, float]:
        losses = [loss for row in self.losses for loss in row]
        return {
            "loss": math.fsum(losses) / max(1, len(losses)),
            "exact_match": sum(self.exact) / len(self.exact),
            "f1": sum(self.f1) / len(self.f1),
        }

    def ratios(self) -> dict[str, Ratio]:
        loss = floats([math.fsum(row) for row in self.losses]), floats([len(row) for row in self.losses])
        return {"loss": loss, "exact_match": mean(self.exact), "f1": mean(self.f1)}


class QaScorer(Scorer):
    """Cross entropy of the windows as the loss; exact match and F1 of the rows."""

    task: ClassVar[str] = "qa"
    headline: ClassVar[str] = "f1"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "exact_match", "f1")
    adds: ClassVar[tuple[str, ...]] = ("prediction", "prediction_start")

    def spans(
        self,
        part: Part,
        rows: Sequence[int],
        batch_size: int = 8,
        poll: Poll | None = None,
        done: Callable[[int, str, int], None] | None = None,
    ) -> tuple[list[list[float]], list[str]]:
        """By row the losses of its windows in nats, and the answer.

        Args:
            rows: their numbers in the part.
            done: told of each row as soon as its last window is read: its number, its answer, and the answer's first character.
        """
        wanted = set(rows)
        windows = [example for example in part.examples if example.row_id in wanted]
        left = Counter(window.row_id for window in windows)
        losses, best, said = [0.0] * len(windows), dict[int, tuple[float, int, int, int]](), dict[int, str]()
        by_row: dict[int, list[float]] = {row: [] for row in rows}
        with scoring(self.model):
            for positions, batch in by_length(windows, self.pad_id, batch_size, device_of(self.model), poll):
                ends_B2 = batch.pop("labels")
                start_BT, end_BT = window_logits(self.model, batch)
                both_B = sum(
                    F.cross_entropy(x_BT, ends_B2[:, i], reduction="none") for i, x_BT in enumerate((start_BT, end_BT))
                )
                assert isinstance(both_B, Tensor), "a sum of two"
                for line, position in enumerate(positions):
                    window = windows[position]
                    losses[position] = float(both_B[line]) / 2
                    value, start, end = best_span(start_BT[line], end_BT[line], window.characters or ())
                    row = window.row_id
                    # Windows come by length; among equals the first in the context counts.
                    best[row] = max(best.get(row, (-math.inf, 0, 0, 0)), (value, -start, start, end))
                    left[row] -= 1
                    if not left[row]:
                        _, _, start, end = best[row]
                        context = _span(part, row).context
                        said[row] = context[start:end].strip()
                        if done is not None:
                            done(row, said[row], start + len(context[start:end]) - len(context[start:end].lstrip()))
        for window, loss in zip(windows, losses, strict=True):
            by_row[window.row_id].append(loss)
        return [by_row[row] for row in rows], [said[row] for row in rows]

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> SpanOutcomes:
        del whole
        rows = data.parts[part]
        losses, said = self.spans(rows, range(len(rows.records)), batch_size, poll)
        right = ([text for text, _ in _span(rows, number).answers] for number in range(len(said)))
        pairs = list(zip(said, right, strict=True))
        return SpanOutcomes(
            losses=losses,
            exact=[float(exact_match(answer, texts)) for answer, texts in pairs],
            f1=[f1(answer, texts) for answer, texts in pairs],
        )

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        asked = [_span(part, example.row_id) for example in examples]
        return [
            {"prompt": f"{record.context}\n\n{record.question}", "expected": record.answers[0][0]} for record in asked
        ]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        return self.spans(part, [example.row_id for example in examples], poll=poll)[1]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(row: int, answer: str, start: int) -> None:
            done(row, {"prediction": answer, "prediction_start": start})

        self.spans(self.encoded(rows, asked), range(len(rows)), asked.batch_size, done=told)


def _span(part: Part, row: int) -> Span:
    record = part.records[row]
    assert isinstance(record, Span), "the task's records"
    return record


_PUNCTUATION = set(string.punctuation)


def words(text: str) -> list[str]:
    """What of an answer is compared, in order."""
    plain = unicodedata.normalize("NFKC", text).lower()
    kept = "".join(c for c in plain if c not in _PUNCTUATION and not unicodedata.category(c).startswith("P"))
    kept = re.sub(r"\b(a|an|the)\b", " ", kept)
    return UNSPACED.sub(lambda found: f" {found.group()} ", kept).split()


def exact_match(answer: str, right: Sequence[str]) -> bool:
    """Whether an answer is one of the right ones."""
    return any(words(answer) == words(text) for text in right)


def f1(answer: str, right: Sequence[str]) -> float:
    """The harmonic mean of the share of its words that are right and the share of the right words that it has, for the right answer that suits best."""
    return max((_f1(words(answer), words(text)) for text in right), default=0.0)


def _f1(said: Sequence[str], right: Sequence[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = (Counter(said) & Counter(right)).total()
    return 2 * common / (len(said) + len(right))
