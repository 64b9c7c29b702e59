"""A model that puts out a number, judged: in the labels' own unit, whatever scale it works on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ingraft.bases.heads import scale_of
from ingraft.data.examples import Example
from ingraft.evaluate import weighted
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import of_numbers
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats, mean
from ingraft.evaluate.outputs import outputs, texts
from ingraft.evaluate.scorer import Asked, Done, Scorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row


@dataclass(frozen=True, kw_only=True, eq=False)
class NumberOutcomes(Outcomes):
    """Of a model that says numbers: by row its loss, the right number, and the one that is said."""

    losses: Sequence[float] = column()
    labels: Sequence[float] = column()
    said: Sequence[float] = column()

    def metrics(self) -> dict[str, float]:
        return {"loss": math.fsum(self.losses) / len(self.losses), **of_numbers(self.labels, self.said)}

    def ratios(self) -> dict[str, Ratio]:
        wrong = floats(self.said) - floats(self.labels)
        return {"loss": mean(self.losses), "mse": mean(wrong**2), "mae": mean(np.abs(wrong))}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        columns = floats(self.labels), floats(self.said)
        return {"pearson": weighted.pearson(*columns, times_RN), "spearman": weighted.spearman(*columns, times_RN)}


class RegressScorer(Scorer):
    """Squared error on the model's scale as the loss; squared and absolute error, Pearson's and Spearman's correlation in the labels' unit."""

    task: ClassVar[str] = "regress"
    headline: ClassVar[str] = "pearson"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "mse", "mae", "pearson", "spearman")
    needs: ClassVar[tuple[str, ...]] = ("sklearn", "scipy")

    def numbers(
        self,
        examples: Sequence[Example],
        batch_size: int = 8,
        poll: Poll | None = None,
        done: Callable[[int, float], None] | None = None,
    ) -> list[float]:
        """What the model says to each example."""
        mean, deviation = scale_of(self.model)
        found = [0.0] * len(examples)
        for positions, logits_B1, _ in outputs(self.model, examples, self.pad_id, batch_size, poll):
            for position, value in zip(positions, logits_B1[:, 0].double().tolist(), strict=True):
                found[position] = mean + deviation * value
                if done is not None:
                    done(position, found[position])
        return found

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> NumberOutcomes:
        del whole
        examples = data.parts[part].examples
        said, labels = self.numbers(examples, batch_size, poll), [_label(example) for example in examples]
        squares = [((y - x) / scale_of(self.model)[1]) ** 2 for x, y in zip(said, labels, strict=True)]
        return NumberOutcomes(losses=squares, labels=labels, said=said)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        asked = zip(texts(part, examples), examples, strict=True)
        return [{"prompt": text, "expected": f"{_label(example):g}"} for text, example in asked]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        del part
        return [f"{value:.4g}" for value in self.numbers(examples, poll=poll)]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(position: int, value: float) -> None:
            done(position, {"prediction": value})

        self.numbers(self.encoded(rows, asked).examples, asked.batch_size, done=told)


def _label(example: Example) -> float:
    assert example.values is not None, "the task's examples"
    return example.values[0]
