"""Models that learned from preferences, judged: policies by what they prefer against their reference, reward models by the pairs they get right.

Names of metrics are those that TRL gives them. `rewards/...` of a policy are beta times its log-ratios, as DPO implies them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ingraft.data.chat import encode_prompt
from ingraft.data.examples import Example, Tally
from ingraft.data.formats import read_records
from ingraft.data.preferences import Compared, answers_of, encode_answers
from ingraft.data.records import Judged, Preference, Ranking, Record
from ingraft.evaluate.loss import Poll, by_length, device_of, score_loss
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.outcomes import Outcomes, floats
from ingraft.evaluate.preference import dpo, ipo, score_pairs
from ingraft.evaluate.preferred import JudgedOutcomes, PairOutcomes, RewardOutcomes
from ingraft.evaluate.roles import as_reference
from ingraft.evaluate.room import hold
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.writing import SftScorer
from ingraft.recipe import Losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row
    from ingraft.evaluate.rewards import Rewards


class PolicyScorer(SftScorer):
    """Compares a policy with its reference. Abstract."""

    prompted: ClassVar[str | None] = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str] | None = None,
        losses: Losses | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        super().__init__(model, tokenizer, labels, losses, rewards)
        self._reference: dict[tuple[int, ...], float] = {}

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> Outcomes:
        del whole
        rows = cast("list[Compared]", data.parts[part].examples)
        sequences = [one for row in rows for one in row.sequences]
        keys = [(one.learned, *one.input_ids) for one in sequences]
        # It is frozen, and says the same of a sequence every time.
        unknown = [one for one, key in zip(sequences, keys, strict=True) if key not in self._reference]
        if unknown:
            with as_reference(self.model):
                said = self._log_probs(unknown, batch_size, poll)
            self._reference |= {(one.learned, *one.input_ids): x for one, x in zip(unknown, said, strict=True)}
        reference_S = torch.tensor([self._reference[key] for key in keys])
        return self.of(rows, torch.tensor(self._log_probs(sequences, batch_size, poll)) - reference_S)

    def _log_probs(self, sequences: Sequence[Example], batch_size: int, poll: Poll | None) -> list[float]:
        """Of the answers, in their order."""
        return [-total for total in score_loss(self.model, sequences, self.pad_id, batch_size, poll).sums]

    @abstractmethod
    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> Outcomes:
        """What the metrics are computed from.

        Args:
            ratios_S: log policy - log reference, of the answers of all rows.
        """

    def before(self) -> AbstractContextManager[None]:
        return as_reference(self.model)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        return [_question(part.records[example.row_id]) for example in examples]

    def prompt(self, record: Record) -> list[int]:
        if isinstance(record, Preference | Ranking | Judged):
            return encode_prompt(record.messages, self.tokenizer)
        return super().prompt(record)


class DpoScorer(PolicyScorer):
    """Loss, implied rewards of both answers, how often and by how much the better one is ahead."""

    task: ClassVar[str] = "dpo"
    cheap: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl"),
        *("accuracy_low", "accuracy_high"),
    )

    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> PairOutcomes:
        return PairOutcomes(
            ratios_of=_by_row(ratios_S, rows),
            rewards=_by_row(self.losses.preference.beta * ratios_S, rows),
            places=[row.places for row in rows],
            losses=self.loss(rows, ratios_S),
        )

    def loss(self, rows: Sequence[Compared], ratios_S: Tensor) -> list[float]:
        """By row."""
        scores = score_pairs(_by_row(ratios_S, rows), [row.places for row in rows])
        losses_P = dpo(
            torch.tensor(scores.margins), self.losses.preference.beta, self.losses.preference.label_smoothing
        )
        return scores.by_row(losses_P.tolist())


class IpoScorer(DpoScorer):
    """The same with the loss of IPO."""

    task: ClassVar[str] = "ipo"

    def loss(self, rows: Sequence[Compared], ratios_S: Tensor) -> list[float]:
        lengths_S = torch.tensor([one.learned for row in rows for one in row.sequences])
        scores = score_pairs(_by_row(ratios_S / lengths_S, rows), [row.places for row in rows])
        return scores.by_row(ipo(torch.tensor(scores.margins), self.losses.preference.beta).tolist())


class KtoScorer(PolicyScorer):
    """Loss, implied rewards of good and of bad answers, and how many are on their side of the point of reference."""

    task: ClassVar[str] = "kto"
    cheap: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl"),
    )

    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> JudgedOutcomes:
        by_row = _by_row(ratios_S, rows)
        return JudgedOutcomes(
            own=floats([row[0] for row in by_row]),
            beside=floats([row[1] if len(row) > 1 else math.nan for row in by_row]),
            good=np.array([row.label == 1 for row in rows]),
            how=self.losses.preference,
        )


class RewardScorer(Scorer):
    """Which answer gets the larger number: the share of pairs that are right, with its interval, by how much, and how well sureness fits."""

    task: ClassVar[str] = "reward"
    cheap: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "accuracy_low", "accuracy_high", "margin", "brier", "calibration_error"),
    )
    adds: ClassVar[tuple[str, ...]] = ("reward",)

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> RewardOutcomes:
        del whole
        rows = cast("list[Compared]", data.parts[part].examples)
        numbers = score_answers(self.model, [row.sequences for row in rows], self.pad_id, batch_size, poll)
        return RewardOutcomes(numbers=numbers, places=[row.places for row in rows])

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            answers = "\n".join(f"{place}. {text}" for text, place in answers_of(part.records[example.row_id]))
            found.append({**_question(part.records[example.row_id]), "expected": answers})
        return found

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        rows = cast("list[Compared]", examples)
        numbers = score_answers(self.model, [row.sequences for row in rows], self.pad_id, poll=poll)
        shown = (zip(row.places, each, strict=True) for row, each in zip(rows, numbers, strict=True))
        return ["   ".join(f"{place}. {number:+.2f}" for place, number in row) for row in shown]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        hold(self.tokenizer, self.model)
        longest = min(asked.max_length, self.tokenizer.model_max_length)
        tally = Tally()
        found = encode_answers(read_records(rows, asked.form)[1], rows, self.tokenizer, longest, tally=tally)
        if tally.cut:
            asked.say(f"note: {tally.cut} rows were cut at {longest} tokens")
        numbers = score_answers(self.model, found, self.pad_id, asked.batch_size)
        for position, each in enumerate(numbers):
            done(position, {"reward": round(each[0], 6) if len(each) == 1 else [round(x, 6) for x in each]})


def score_answers(
    model: nn.Module, rows: Sequence[Sequence[Example]], pad_id: int, batch_size: int = 8, poll: Poll | None = None
) -> list[list[float]]:
    """By row, what a reward model says of each answer. Equal calls give equal bits.

    Args:
        rows: the sequences of each.
        poll: called between batches; may raise to stop.
    """
    sequences = [one for row in rows for one in row]
    found_S = torch.zeros(len(sequences))
    with scoring(model):
        for positions, batch in by_length(sequences, pad_id, batch_size, device_of(model), poll):
            batch.pop("labels", None)
            found_S[positions] = model(**batch).logits.float()[:, 0].cpu()
    return [part.tolist() for part in found_S.split([len(row) for row in rows])]


def _by_row(numbers_S: Tensor, rows: Sequence[Compared]) -> list[list[float]]:
    return [part.tolist() for part in numbers_S.split([len(row.sequences) for row in rows])]


def _question(record: Record) -> dict[str, str]:
    """What a row asks, and its best answer."""
    assert isinstance(record, Preference | Ranking | Judged)
    prompt = "\n".join(message["content"] for message in record.messages if message["role"] != "system")
    return {"prompt": prompt, "expected": answers_of(record)[0][0]}
