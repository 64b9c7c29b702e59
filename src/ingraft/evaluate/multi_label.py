"""A classifier that may give a row several labels, or none, judged: a class is said where it is likelier than not."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from ingraft.data.examples import Example
from ingraft.evaluate import weighted
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import of_several
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats, mean
from ingraft.evaluate.outputs import outputs, texts
from ingraft.evaluate.scorer import Asked, Done, Scorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row

Shares = tuple[float, ...]
"""The probability of each class."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SeveralOutcomes(Outcomes):
    """Of a classifier that may name several classes: by row its loss, and 0 or 1 for each class that is right, and that is said."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"exact_match"})

    losses: Sequence[float] = column()
    labels: NDArray[np.int64] = column()
    said: NDArray[np.int64] = column()

    def metrics(self) -> dict[str, float]:
        return {"loss": math.fsum(self.losses) / len(self.losses), **of_several(self.labels, self.said)}

    def ratios(self) -> dict[str, Ratio]:
        hits, named = (self.labels * self.said).sum(1), (self.labels + self.said).sum(1)
        return {
            "loss": mean(self.losses),
            "micro_f1": (floats(2 * hits), floats(named)),
            "exact_match": mean((self.labels == self.said).all(1)),
        }

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        right, said = floats(self.labels), floats(self.said)
        return {"macro_f1": weighted.macro_f1(right, said, right * said, times_RN, every=True)}


class MultiLabelScorer(Scorer):
    """Binary cross entropy as the loss, micro and macro F1, and the share of rows whose labels are all right."""

    task: ClassVar[str] = "multi-label"
    headline: ClassVar[str] = "micro_f1"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "micro_f1", "macro_f1", "exact_match")
    adds: ClassVar[tuple[str, ...]] = ("prediction", "scores")
    needs: ClassVar[tuple[str, ...]] = ("sklearn",)

    def shares(
        self,
        examples: Sequence[Example],
        batch_size: int = 8,
        poll: Poll | None = None,
        done: Callable[[int, Shares], None] | None = None,
    ) -> tuple[list[float], list[Shares]]:
        """The loss of each example in nats, the mean over classes, and the probability of each class."""
        losses = [0.0] * len(examples)
        found: list[Shares] = [()] * len(examples)
        for positions, logits_BK, labels_BK in outputs(self.model, examples, self.pad_id, batch_size, poll):
            losses_B = F.binary_cross_entropy_with_logits(logits_BK, labels_BK, reduction="none").mean(-1)
            columns = zip(positions, losses_B.tolist(), logits_BK.double().sigmoid().tolist(), strict=True)
            for position, loss, shares in columns:
                losses[position], found[position] = loss, tuple(shares)
                if done is not None:
                    done(position, found[position])
        return losses, found

    def named(self, shares: Shares) -> list[str]:
        """The classes that are likelier than not."""
        return [name for name, share in zip(self.labels, shares, strict=True) if share >= 0.5]

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> SeveralOutcomes:
        del whole
        examples = data.parts[part].examples
        losses, found = self.shares(examples, batch_size, poll)
        labels = np.array([[int(value) for value in example.values or ()] for example in examples])
        return SeveralOutcomes(losses=losses, labels=labels, said=(np.array(found) >= 0.5).astype(int))

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        asked = zip(texts(part, examples), examples, strict=True)
        return [{"prompt": text, "expected": _joined(self.named(example.values or ()))} for text, example in asked]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        del part
        return [_joined(self.named(shares)) for shares in self.shares(examples, poll=poll)[1]]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(position: int, shares: Shares) -> None:
            scores = dict(zip(self.labels, (round(p, 6) for p in shares), strict=True))
            done(position, {"prediction": self.named(shares), "scores": scores})

        self.shares(self.encoded(rows, asked).examples, asked.batch_size, done=told)


def _joined(names: Sequence[str]) -> str:
    return ", ".join(names) or "(none)"
