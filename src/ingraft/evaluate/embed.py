"""Vectors of texts, judged: by the order of their cosines where rows have numbers, by finding the match again where they have none."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ingraft.data.examples import Example, Tally
from ingraft.data.matched import Matched, encode_texts
from ingraft.data.records import Related
from ingraft.data.rows import refuse
from ingraft.evaluate import weighted
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import of_similarities
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats, mean
from ingraft.evaluate.room import hold
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.similarity import embed, layout, losses_of_pairs, matched

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row

TOGETHER = 64
"""An evaluation's loss is that of so many neighbouring rows at a time, whatever goes through the model at once: it grows with their number."""

SEARCHED = 1024
"""Queries that are looked for at once."""

FIRST, SECOND = ("text", "query", "prompt"), ("text2", "positive", "completion")


@dataclass(frozen=True, kw_only=True, eq=False)
class FoundOutcomes(Outcomes):
    """Of rows that simply belong together: by row its loss among its neighbours, and the place of its match. Whom a row is told apart from stays as it was."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"recall@1"})

    losses: Floats = column()
    places: Floats = column()

    def metrics(self) -> dict[str, float]:
        return {"loss": math.fsum(self.losses) / self.count, **retrieval(self.places)}

    def ratios(self) -> dict[str, Ratio]:
        return {"loss": mean(self.losses), "recall@1": mean(self.places == 1), "mrr": mean(1 / self.places)}


@dataclass(frozen=True, kw_only=True, eq=False)
class RelatedOutcomes(Outcomes):
    """Of rows with numbers: by row the number, the cosine, and which rows its loss is taken over.

    Attributes:
        temperature: of the loss. binary: whether the numbers of all rows are 0 and 1.
    """

    together: ClassVar[frozenset[str]] = frozenset({"loss"})

    values: Floats = column()
    cosines: Floats = column()
    groups: NDArray[np.int64] = column()
    temperature: float
    binary: bool

    def metrics(self) -> dict[str, float]:
        loss = float(self._loss(np.ones((1, self.count)))[0])
        return {"loss": loss, **of_similarities(self.values.tolist(), self.cosines.tolist(), self.binary)}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        found = {"loss": self._loss(times_RN), "spearman": weighted.spearman(self.values, self.cosines, times_RN)}
        if self.binary:
            columns = self.values, self.cosines, times_RN
            found["average_precision"] = weighted.average_precision(*columns)
            found["best_accuracy"] = weighted.best_accuracy(*columns)
        return found

    def _loss(self, times_RN: Floats) -> Floats:
        """(R,) CoSENT (see `similarity`) of each group, as often as it has rows. A row that is there twice makes twice the pairs."""
        total_R = np.zeros(len(times_RN))
        for group in np.unique(self.groups):
            here = np.flatnonzero(self.groups == group)
            z_BB = (self.cosines[None, here] - self.cosines[here, None]) / self.temperature
            wrong_BB = self.values[here, None] > self.values[None, here]
            top = max(0.0, float(np.where(wrong_BB, z_BB, -np.inf).max()))
            e_BB = np.where(wrong_BB, np.exp(np.minimum(z_BB - top, 0.0)), 0.0)
            times_RB = times_RN[:, here]
            sums_R = ((times_RB @ e_BB) * times_RB).sum(1)
            total_R += times_RB.sum(1) * (top + np.log(math.exp(-top) + sums_R))
        return total_R / times_RN.sum(1)


class EmbedScorer(Scorer):
    """The training loss; Spearman's correlation of cosines and numbers, for 0 and 1 average precision and the best accuracy too; else `recall@1` and
    `mrr` of each match among all matches of the part and the texts that do not belong."""

    task: ClassVar[str] = "embed"
    headline: ClassVar[str] = "spearman"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "spearman", "average_precision", "best_accuracy", "recall@1", "mrr")
    adds: ClassVar[tuple[str, ...]] = ("embedding", "embedding2", "similarity")
    needs: ClassVar[tuple[str, ...]] = ("sklearn", "scipy")

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> Outcomes:
        del whole
        rows = matched(data.parts[part].examples)
        vectors = self._vectors(rows, batch_size, poll)
        if rows[0].values is not None:
            values = [row.values[0] for row in rows if row.values is not None]
            return RelatedOutcomes(
                values=floats(values),
                cosines=floats([float(e_SD[0] @ e_SD[1]) for e_SD in vectors]),
                groups=np.arange(len(rows)) // TOGETHER,
                temperature=self.losses.embed.temperature,
                binary=set(values) == {0.0, 1.0},
            )
        losses: list[float] = []
        for start in range(0, len(rows), TOGETHER):
            where = layout(rows[start : start + TOGETHER])
            e_SD = torch.cat(vectors[start : start + TOGETHER])
            losses += losses_of_pairs(e_SD, where, self.losses.embed).tolist()
        return FoundOutcomes(losses=floats(losses), places=floats(places(rows, vectors)))

    def _vectors(self, rows: Sequence[Matched], batch_size: int = 8, poll: Poll | None = None) -> list[Tensor]:
        """By row, the vectors of its sequences."""
        sequences = [one for row in rows for one in row.sequences]
        e_SD = embed(self.model, sequences, self.pad_id, batch_size, poll)
        return list(e_SD.split([len(row.sequences) for row in rows]))

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            record = part.records[example.row_id]
            assert isinstance(record, Related), "the task's records"
            texts = "\n".join((record.text, record.match, *record.others))
            told = "the first two belong together" if record.others else "they belong together"
            found.append({"prompt": texts, "expected": told if record.value is None else f"{record.value:g}"})
        return found

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        del part
        vectors = self._vectors(matched(examples), poll=poll)
        return ["cosine " + ", ".join(f"{float(e_SD[0] @ e_D):.3f}" for e_D in e_SD[1:]) for e_SD in vectors]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        texts, problems = list[list[str]](), list[str]()
        for row in rows:
            given = [
                [row.values[name] for name in names if row.values.get(name) is not None] for names in (FIRST, SECOND)
            ]
            here = [column[0] for column in given if column]
            if not given[0] or not all(isinstance(text, str) and text.strip() for text in here):
                problems.append(f"{row.place}: has no text in {' or '.join(FIRST)}, or one that is empty or no text")
            texts.append(here)
        if problems:
            refuse(problems, summary=f"{len(problems)} of {len(rows)} rows cannot be embedded:")
        hold(self.tokenizer, self.model)
        longest, tally = min(asked.max_length, self.tokenizer.model_max_length), Tally()
        encoded = encode_texts(
            [text for row in texts for text in row], self.tokenizer, longest, tally, asked.truncation
        )
        if tally.cut:
            asked.say(f"note: {tally.cut} texts were cut at {longest} tokens")
        at = 0
        for start in range(0, len(rows), asked.batch_size):  # by rows, so that what is done is told of on the way
            count = sum(map(len, texts[start : start + asked.batch_size]))
            e_SD = embed(self.model, encoded[at : at + count], self.pad_id, asked.batch_size)
            parts = e_SD.split([len(row) for row in texts[start : start + asked.batch_size]])
            for number, e in enumerate(parts, start):
                fields = dict(zip(("embedding", "embedding2"), ([round(x, 6) for x in v.tolist()] for v in e)))
                done(number, fields | ({"similarity": round(float(e[0] @ e[1]), 6)} if len(e) > 1 else {}))
            at += count


def retrieval(places: Sequence[float] | Floats) -> dict[str, float]:
    """`recall@1`, the share of queries nearest to whose vector is their match, and `mrr`, the mean of 1 / the match's place."""
    return {
        "recall@1": sum(place == 1 for place in places) / len(places),
        "mrr": sum(1 / place for place in places) / len(places),
    }


def places(rows: Sequence[Matched], vectors: Sequence[Tensor]) -> list[float]:
    """By row the place of its match among all texts, the nearest having place 1; half of what is exactly as near counts as nearer.

    Args:
        rows: without numbers. vectors: by row, of its sequences. Texts that occur more than once are one; those that other rows give the same query are
            left out.
    """
    where = layout(rows)
    tokens = [tuple(one.input_ids) for row in rows for one in row.sequences]
    first = {tokens[place]: number for number, place in reversed(list(enumerate(where.candidate_C.tolist())))}
    kept_K = torch.tensor(sorted(first.values()))
    column = {number: k for k, number in enumerate(kept_K.tolist())}
    own_B = torch.tensor([column[first[tokens[place]]] for place in where.match_B.tolist()])
    e_SD = torch.cat(list(vectors))
    candidates_KD = e_SD[where.candidate_C[kept_K]]
    found: list[float] = []
    for start in range(0, len(rows), SEARCHED):
        piece = slice(start, start + SEARCHED)
        z_PK = e_SD[where.query_B[piece]] @ candidates_KD.T
        own_P1 = own_B[piece, None]
        mine_P1 = z_PK.gather(1, own_P1)
        wrong_PK = ~where.excused_BC[piece][:, kept_K]
        wrong_PK.scatter_(1, own_P1, False)
        nearer_P = ((z_PK > mine_P1) & wrong_PK).sum(1) + 0.5 * ((z_PK == mine_P1) & wrong_PK).sum(1)
        found += (1 + nearer_P).tolist()
    return found
