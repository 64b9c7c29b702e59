"""A sequence classifier, judged: its loss, its likeliest classes against the right ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.examples import Example
from ingraft.data.records import Pictured
from ingraft.evaluate import weighted
from ingraft.evaluate.loss import Poll, as_computed, by_length, device_of
from ingraft.evaluate.measures import of_classes
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, mean
from ingraft.evaluate.outputs import texts
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.weighted import one_hot

if TYPE_CHECKING:
    from ingraft.bases.images import ImageReader
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row


@dataclass(frozen=True, kw_only=True)
class ClassScores:
    """What a classifier said about some rows, in their order.

    Attributes:
        losses: negative log-likelihood of the right class, in nats.
        predictions, labels: the likeliest class, and the right one.
        probabilities: per row, of each class.
    """

    losses: tuple[float, ...]
    predictions: tuple[int, ...]
    labels: tuple[int, ...]
    probabilities: tuple[tuple[float, ...], ...]

    @property
    def loss(self) -> float:
        """The mean over rows, in nats."""
        return math.fsum(self.losses) / max(1, len(self.losses))


def score_classes(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 8,
    poll: Poll | None = None,
    done: Callable[[int, int, Sequence[float]], None] | None = None,
) -> ClassScores:
    """Score every example; its `label` must be set. Equal calls give equal bits.

    Args:
        model: a sequence classifier, with whatever adapters act.
        pad_id: what to fill short rows with.
        poll: called between batches; may raise to stop.
        done: told of every example as soon as it is scored: its position, the likeliest class, each class's probability.
    """
    found: dict[int, tuple[float, int, int, tuple[float, ...]]] = {}
    with scoring(model):
        for positions, batch in by_length(examples, pad_id, batch_size, device_of(model), poll):
            labels_B = batch.pop("labels")
            logits_BK = model(**as_computed(model, batch)).logits.float()
            losses_B = F.cross_entropy(logits_BK, labels_B, reduction="none")
            columns = (
                losses_B.tolist(),
                logits_BK.argmax(-1).tolist(),
                labels_B.tolist(),
                logits_BK.double().softmax(-1).tolist(),
            )
            for position, (loss, prediction, label, probabilities) in zip(positions, zip(*columns), strict=True):
                found[position] = (loss, prediction, label, tuple(probabilities))
                if done is not None:
                    done(position, prediction, probabilities)
    ordered = [found[i] for i in range(len(examples))]
    return ClassScores(
        losses=tuple(row[0] for row in ordered),
        predictions=tuple(row[1] for row in ordered),
        labels=tuple(row[2] for row in ordered),
        probabilities=tuple(row[3] for row in ordered),
    )


def macro_f1(predictions: Sequence[int], labels: Sequence[int]) -> float:
    """F1 of each class that occurs, averaged with equal weight."""
    scores = []
    for kind in sorted({*predictions, *labels}):
        hits = sum(p == kind == y for p, y in zip(predictions, labels, strict=True))
        scores.append(2 * hits / (predictions.count(kind) + labels.count(kind)))
    return sum(scores) / max(1, len(scores))


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassOutcomes(Outcomes):
    """Of a classifier, as in `ClassScores`."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"accuracy", "micro_f1"})

    losses: Sequence[float] = column()
    labels: Sequence[int] = column()
    predictions: Sequence[int] = column()

    def metrics(self) -> dict[str, float]:
        loss = math.fsum(self.losses) / max(1, len(self.losses))
        return {"loss": loss, **of_classes(self.labels, self.predictions)}

    def ratios(self) -> dict[str, Ratio]:
        right = mean(np.equal(self.labels, self.predictions))
        return {"loss": mean(self.losses), "accuracy": right, "micro_f1": right}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        kinds = 1 + max(*self.labels, *self.predictions)
        right_NK, said_NK = (one_hot(np.asarray(x, np.int64), kinds) for x in (self.labels, self.predictions))
        return {
            "macro_f1": weighted.macro_f1(right_NK, said_NK, right_NK * said_NK, times_RN),
            "matthews": weighted.matthews(right_NK, said_NK, times_RN),
        }


class ClassifyScorer(Scorer):
    """One class a row."""

    task: ClassVar[str] = "classify"
    prompted: ClassVar[str | None] = "sft"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "macro_f1", "micro_f1", "matthews")
    needs: ClassVar[tuple[str, ...]] = ("sklearn",)
    adds: ClassVar[tuple[str, ...]] = ("prediction", "scores")

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> ClassOutcomes:
        del whole
        scores = score_classes(self.model, data.parts[part].examples, self.pad_id, batch_size, poll)
        return ClassOutcomes(losses=scores.losses, labels=scores.labels, predictions=scores.predictions)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        asked = zip(texts(part, examples), examples, strict=True)
        return [{"prompt": text, "expected": self.labels[example.label or 0]} for text, example in asked]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        del part
        scores = score_classes(self.model, examples, self.pad_id, poll=poll)
        found = zip(scores.predictions, scores.probabilities, strict=True)
        return [f"{self.labels[prediction]} ({max(p):.0%})" for prediction, p in found]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        def told(position: int, best: int, shares: Sequence[float]) -> None:
            scores = dict(zip(self.labels, (round(p, 6) for p in shares), strict=True))
            done(position, {"prediction": self.labels[best], "scores": scores})

        score_classes(self.model, self.encoded(rows, asked).examples, self.pad_id, asked.batch_size, done=told)


class ImageClassifyScorer(ClassifyScorer):
    """One class a picture."""

    task: ClassVar[str] = "image-classify"
    prompted: ClassVar[str | None] = None

    def trial(self) -> dict[str, Tensor]:
        from PIL import Image

        noise = torch.randint(256, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        picture = Image.fromarray(noise.numpy())
        return {"pixel_values": torch.from_numpy(cast("ImageReader", self.reader)(picture))[None]}

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            record = part.records[example.row_id]
            assert isinstance(record, Pictured), "the task's records"
            size = " x ".join(map(str, record.image.size))
            asked = {"prompt": f"{record.image.name} ({size})", "picture": record.image.thumbnail()}
            found.append({**asked, "expected": record.label})
        return found
