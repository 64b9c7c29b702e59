"""What policies and reward models did with answers that are better or worse, by row; what their metrics mean is told in `evaluate.preference`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats, mean, quotient
from ingraft.evaluate.preference import PairScores, bradley_terry, kto, kto_baseline, score_pairs
from ingraft.recipe import PreferenceRecipe


def interval(scores: PairScores) -> dict[str, float]:
    """The ends of the 95 % interval of the accuracy."""
    low, high = scores.interval
    return {"accuracy_low": low, "accuracy_high": high}


@dataclass(frozen=True, kw_only=True, eq=False)
class PairOutcomes(Outcomes):
    """Of a policy against its reference, answers being in an order: by row the log-ratio of each answer, its implied reward, its place, and the row's loss."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"rewards/accuracies"})

    ratios_of: Sequence[Sequence[float]] = column()
    rewards: Sequence[Sequence[float]] = column()
    places: Sequence[Sequence[int]] = column()
    losses: Sequence[float] = column()

    def _scores(self) -> PairScores:
        return score_pairs(self.rewards, self.places)

    def metrics(self) -> dict[str, float]:
        rewards = self._scores()
        return {
            "loss": float(np.mean(self.losses)),
            "rewards/chosen": rewards.mean(rewards.chosen),
            "rewards/rejected": rewards.mean(rewards.rejected),
            "rewards/accuracies": rewards.accuracy,
            "rewards/margins": rewards.margin,
            "kl": float(np.mean([ratio for row in self.ratios_of for ratio in row])),
        }

    def bounds(self) -> dict[str, float]:
        return interval(self._scores())

    def ratios(self) -> dict[str, Ratio]:
        rewards = self._scores()
        return {
            "loss": mean(self.losses),
            "rewards/chosen": mean(rewards.by_row(rewards.chosen)),
            "rewards/rejected": mean(rewards.by_row(rewards.rejected)),
            "rewards/accuracies": mean(rewards.by_row(rewards.right)),
            "rewards/margins": mean(rewards.by_row(rewards.margins)),
            "kl": (floats([*map(sum, self.ratios_of)]), floats([*map(len, self.ratios_of)])),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class JudgedOutcomes(Outcomes):
    """Of a policy against its reference, each answer being judged by itself.

    Attributes:
        own, beside: log-ratios of the row's answer, and of one that belongs to another prompt, NaN where there is none.
        good: whether the answer is.
        how: settings of the loss.
    """

    own: Floats = column()
    beside: Floats = column()
    good: NDArray[np.bool_] = column()
    how: PreferenceRecipe

    def metrics(self) -> dict[str, float]:
        own_B, good_B = torch.from_numpy(self.own).float(), torch.from_numpy(self.good)
        baseline = kto_baseline(torch.from_numpy(self.beside[~np.isnan(self.beside)]).float())
        weights = self.how.desirable_weight, self.how.undesirable_weight
        right_B = torch.where(good_B, own_B > baseline, own_B < baseline).float()
        sides = {"rewards/chosen": own_B[good_B], "rewards/rejected": own_B[~good_B]}
        found = {name: self.how.beta * own_N.mean().item() for name, own_N in sides.items() if len(own_N)}
        if len(found) == 2:  # else answers of one kind only
            found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        return {
            "loss": kto(own_B, good_B, baseline, self.how.beta, *weights).mean().item(),
            **found,
            "rewards/accuracies": right_B.mean().item(),
            "kl": baseline.item(),
        }

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        there_N = ~np.isnan(self.beside)
        apart_R = quotient(times_RN @ np.where(there_N, self.beside, 0.0), times_RN @ there_N.astype(float)).clip(0.0)
        away_RN = np.where(self.good, 1.0, -1.0) * (self.own - apart_R[:, None])
        weight_N = np.where(self.good, self.how.desirable_weight, self.how.undesirable_weight)
        rows_R, lost_RN = times_RN.sum(1), weight_N / (1 + np.exp(np.minimum(self.how.beta * away_RN, 700.0)))
        chosen_R, rejected_R = (
            self.how.beta * quotient(times_RN @ (self.own * kind_N), times_RN @ kind_N.astype(float))
            for kind_N in (self.good, ~self.good)
        )
        return {
            "loss": (times_RN * lost_RN).sum(1) / rows_R,
            "rewards/chosen": chosen_R,
            "rewards/rejected": rejected_R,
            "rewards/margins": chosen_R - rejected_R,
            "rewards/accuracies": (times_RN * (away_RN > 0)).sum(1) / rows_R,
            "kl": apart_R,
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RewardOutcomes(Outcomes):
    """Of a reward model: by row what it says of each answer, and the answers' places."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    numbers: Sequence[Sequence[float]] = column()
    places: Sequence[Sequence[int]] = column()

    def _scores(self) -> PairScores:
        return score_pairs(self.numbers, self.places)

    def metrics(self) -> dict[str, float]:
        scores = self._scores()
        return {
            "loss": scores.mean(bradley_terry(torch.tensor(scores.margins)).tolist()),
            "accuracy": scores.accuracy,
            "margin": scores.margin,
            "brier": scores.brier,
            "calibration_error": scores.calibration_error(),
        }

    def bounds(self) -> dict[str, float]:
        return interval(self._scores())

    def ratios(self) -> dict[str, Ratio]:
        scores = self._scores()
        by_pair = {
            "loss": bradley_terry(torch.tensor(scores.margins)).tolist(),
            "accuracy": scores.right,
            "margin": scores.margins,
            "brier": scores.lacking,
        }
        return {name: mean(scores.by_row(values)) for name, values in by_pair.items()}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        parts = floats(self._scores().surer_than_right())
        return {"calibration_error": np.abs(times_RN @ parts).sum(1) / times_RN.sum(1)}
