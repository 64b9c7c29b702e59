"""Models that learned from preferences, judged: policies by what they prefer against their reference, reward models by the pairs they get right.

Names of metrics are those that TRL gives them. `rewards/...` of a policy are beta times its log-ratios, as DPO implies them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar, cast

import torch
from torch import Tensor, nn

from ingraft.data.chat import encode_prompt
from ingraft.data.examples import Example, Tally
from ingraft.data.formats import read_records
from ingraft.data.preferences import Compared, answers_of, encode_answers
from ingraft.data.records import Judged, Preference, Ranking, Record
from ingraft.evaluate.loss import Poll, by_length, device_of, score_loss
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.preference import PairScores, bradley_terry, dpo, ipo, kto, kto_baseline, score_pairs
from ingraft.evaluate.roles import as_reference
from ingraft.evaluate.room import hold
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.writing import SftScorer
from ingraft.recipe import Losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row


def interval(scores: PairScores) -> dict[str, float]:
    """The ends of the 95 % interval of the accuracy."""
    low, high = scores.interval
    return {"accuracy_low": low, "accuracy_high": high}


class PolicyScorer(SftScorer):
    """Compares a policy with its reference. Abstract."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str] | None = None,
        losses: Losses | None = None,
    ) -> None:
        super().__init__(model, tokenizer, labels, losses)
        self._reference: dict[str, Tensor] = {}

    def evaluate(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> dict[str, float]:
        del whole
        rows = cast("list[Compared]", data.parts[part].examples)
        if part not in self._reference:  # it is frozen, and says the same every time
            with as_reference(self.model):
                self._reference[part] = self._log_probs(rows, batch_size, poll)
        return self.of(rows, self._log_probs(rows, batch_size, poll) - self._reference[part])

    def _log_probs(self, rows: Sequence[Compared], batch_size: int, poll: Poll | None) -> Tensor:
        """(S,) of the answers of all rows, in their order."""
        sequences = [one for row in rows for one in row.sequences]
        return -torch.tensor(score_loss(self.model, sequences, self.pad_id, batch_size, poll).sums)

    @abstractmethod
    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> dict[str, float]:
        """The metrics.

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

    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> dict[str, float]:
        places = [row.places for row in rows]
        rewards = score_pairs(_by_row(self.losses.preference.beta * ratios_S, rows), places)
        return {
            "loss": self.loss(rows, ratios_S),
            "rewards/chosen": rewards.mean(rewards.chosen),
            "rewards/rejected": rewards.mean(rewards.rejected),
            "rewards/accuracies": rewards.accuracy,
            "rewards/margins": rewards.margin,
            "kl": ratios_S.mean().item(),
            **interval(rewards),
        }

    def loss(self, rows: Sequence[Compared], ratios_S: Tensor) -> float:
        """The mean over rows."""
        scores = score_pairs(_by_row(ratios_S, rows), [row.places for row in rows])
        losses_P = dpo(
            torch.tensor(scores.margins), self.losses.preference.beta, self.losses.preference.label_smoothing
        )
        return scores.mean(losses_P.tolist())


class IpoScorer(DpoScorer):
    """The same with the loss of IPO."""

    task: ClassVar[str] = "ipo"

    def loss(self, rows: Sequence[Compared], ratios_S: Tensor) -> float:
        lengths_S = torch.tensor([one.learned for row in rows for one in row.sequences])
        scores = score_pairs(_by_row(ratios_S / lengths_S, rows), [row.places for row in rows])
        return scores.mean(ipo(torch.tensor(scores.margins), self.losses.preference.beta).tolist())


class KtoScorer(PolicyScorer):
    """Loss, implied rewards of good and of bad answers, and how many are on their side of the point of reference."""

    task: ClassVar[str] = "kto"
    cheap: ClassVar[tuple[str, ...]] = (
        *("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "kl"),
    )

    def of(self, rows: Sequence[Compared], ratios_S: Tensor) -> dict[str, float]:
        by_row, settings = _by_row(ratios_S, rows), self.losses.preference
        own_B = torch.tensor([row[0] for row in by_row])
        good_B = torch.tensor([row.label == 1 for row in rows])
        baseline = kto_baseline(torch.tensor([row[1] for row in by_row if len(row) > 1]))
        weights = settings.desirable_weight, settings.undesirable_weight
        right_B = torch.where(good_B, own_B > baseline, own_B < baseline).float()
        chosen, rejected = (settings.beta * own_B[kind_B].mean().item() for kind_B in (good_B, ~good_B))
        found = {
            "loss": kto(own_B, good_B, baseline, settings.beta, *weights).mean().item(),
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": right_B.mean().item(),
            "rewards/margins": chosen - rejected,
            "kl": baseline.item(),
        }
        return {name: value for name, value in found.items() if not math.isnan(value)}  # answers of one kind only


class RewardScorer(Scorer):
    """Which answer gets the larger number: the share of pairs that are right, with its interval, by how much, and how well sureness fits."""

    task: ClassVar[str] = "reward"
    cheap: ClassVar[tuple[str, ...]] = (
        *("loss", "accuracy", "accuracy_low", "accuracy_high", "margin", "brier", "calibration_error"),
    )
    adds: ClassVar[tuple[str, ...]] = ("reward",)

    def evaluate(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> dict[str, float]:
        del whole
        rows = cast("list[Compared]", data.parts[part].examples)
        numbers = score_answers(self.model, [row.sequences for row in rows], self.pad_id, batch_size, poll)
        scores = score_pairs(numbers, [row.places for row in rows])
        return {
            "loss": scores.mean(bradley_terry(torch.tensor(scores.margins)).tolist()),
            "accuracy": scores.accuracy,
            **interval(scores),
            "margin": scores.margin,
            "brier": scores.brier,
            "calibration_error": scores.calibration_error(),
        }

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
