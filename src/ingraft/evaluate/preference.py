"""What preferences cost and what they tell: losses over pairs of answers, and scores of them.

Everything here is arithmetic on a few numbers a row. A row is a prompt with two answers or more, in an order. An answer's number is either its
log-ratio, `log policy(answer | prompt) - log reference(answer | prompt)` in nats, summed over the tokens of the answer (DPO, IPO, KTO), or
what a reward model says of it (Bradley-Terry). A row of K answers gives K(K-1)/2 pairs, or fewer where answers share a place; each weighs one part
in that number, so that a row counts once however many answers it has (Ouyang et al. 2022, equation 1).

Losses are sums in float32 whatever the model computes in: a log-probability of some hundred nats in bfloat16 is known to the nearest whole nat,
and the differences that matter are smaller.

Legend: S answers (sequences) of all rows, P pairs, B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True, eq=False)
class Pairs:
    """Which answers are to be told apart.

    Attributes:
        better_P, worse_P: positions among the answers, int64.
        weight_P: float32; the weights of a row's pairs add up to 1.
    """

    better_P: Tensor
    worse_P: Tensor
    weight_P: Tensor

    def margins(self, x_S: Tensor) -> Tensor:
        """(P,) by how much the better answer's number is above the worse one's."""
        return x_S[self.better_P] - x_S[self.worse_P]

    def total(self, x_P: Tensor) -> Tensor:
        """The weighted sum of something by pair: of a mean by row, the sum over rows."""
        return (self.weight_P * x_P).sum()


def pairs_of(places: Sequence[Sequence[int]]) -> Pairs:
    """All pairs within each row.

    Args:
        places: by row the place of each of its answers, 1 the best; equal places make no pair.
    """
    better, worse, weight = _pairs(places)
    return Pairs(
        better_P=torch.tensor(better, dtype=torch.int64),
        worse_P=torch.tensor(worse, dtype=torch.int64),
        weight_P=torch.tensor(weight, dtype=torch.float32),
    )


def _pairs(places: Sequence[Sequence[int]]) -> tuple[list[int], list[int], list[float]]:
    better: list[int] = []
    worse: list[int] = []
    weight: list[float] = []
    start = 0
    for row in places:
        found = [(i, j) for i, a in enumerate(row) for j, b in enumerate(row) if a < b]
        better += [start + i for i, _ in found]
        worse += [start + j for _, j in found]
        weight += [1 / len(found)] * len(found)
        start += len(row)
    return better, worse, weight


def bradley_terry(margins_P: Tensor) -> Tensor:
    """(P,) `-log sigmoid(r_better - r_worse)` of a reward model (Bradley and Terry 1952; Stiennon et al. 2020)."""
    return -F.logsigmoid(margins_P.float())


def dpo(margins_P: Tensor, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """(P,) the loss of direct preference optimisation (Rafailov et al. 2023, equation 7).

    Args:
        margins_P: differences of log-ratios.
        beta: how dear a step away from the reference is; what it multiplies is the implied reward.
        label_smoothing: the share of pairs that are taken to be the wrong way round (conservative DPO, Mitchell 2023).
    """
    x_P = beta * margins_P.float()
    loss_P = -F.logsigmoid(x_P)
    return loss_P if not label_smoothing else torch.lerp(loss_P, -F.logsigmoid(-x_P), label_smoothing)


def ipo(margins_P: Tensor, beta: float) -> Tensor:
    """(P,) the squared distance of the margin from 1 / (2 beta) (Azar et al. 2023, equation 17, whose tau is beta).

    Args:
        margins_P: differences of log-ratios, each divided by the tokens of its answer: without that the goal would be another for every length.
            The paper leaves it open; TRL divides as well.
    """
    return (margins_P.float() - 1 / (2 * beta)).square()


def kto(
    ratios_B: Tensor, good_B: Tensor, baseline: Tensor, beta: float, desirable: float = 1.0, undesirable: float = 1.0
) -> Tensor:
    """(B,) the loss of answers that are judged alone (Ethayarajh et al. 2024, equation 8).

    Args:
        ratios_B: log-ratios. good_B: bool.
        baseline: see `kto_baseline`; no gradient goes through it.
        desirable, undesirable: weights of the two kinds, to even out their numbers.
    """
    away_B = torch.where(good_B, 1.0, -1.0) * (ratios_B.float() - baseline.detach())
    weight_B = torch.where(good_B, desirable, undesirable)
    return weight_B * torch.sigmoid(-beta * away_B)


def kto_baseline(ratios_N: Tensor) -> Tensor:
    """The point from which KTO counts gains and losses: how far the policy is from the reference, at least 0.

    Args:
        ratios_N: log-ratios of answers that belong to other prompts; none give 0.
    """
    mean = ratios_N.float().mean() if ratios_N.numel() else ratios_N.new_zeros((), dtype=torch.float32)
    return mean.clamp(min=0.0).detach()


@dataclass(frozen=True, kw_only=True)
class PairScores:
    """How well numbers of answers tell the better from the worse.

    Attributes:
        margins, weights: by pair, as in `Pairs`.
        chosen, rejected: by pair, the numbers of the better and of the worse answer.
        row: by pair, which row it is of. rows: how many.
    """

    margins: tuple[float, ...]
    weights: tuple[float, ...]
    chosen: tuple[float, ...]
    rejected: tuple[float, ...]
    row: tuple[int, ...]
    rows: int

    def mean(self, values: Sequence[float]) -> float:
        """Of something by pair, every row counting once."""
        return math.fsum(w * x for w, x in zip(self.weights, values, strict=True)) / max(1, self.rows)

    def by_row(self, values: Sequence[float]) -> list[float]:
        """The mean of something by pair, in each row."""
        found = [0.0] * self.rows
        for row, weight, value in zip(self.row, self.weights, values, strict=True):
            found[row] += weight * value
        return found

    @property
    def right(self) -> list[float]:
        """By pair whether the better answer has the larger number; a half where both have the same."""
        return [0.5 if m == 0 else float(m > 0) for m in self.margins]

    @property
    def accuracy(self) -> float:
        """The share of pairs that are right."""
        return self.mean(self.right)

    @property
    def margin(self) -> float:
        """The mean difference."""
        return self.mean(self.margins)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % of the accuracy, rows being the independent units (see `wilson`)."""
        return wilson(self.accuracy, self.rows)

    @property
    def lacking(self) -> list[float]:
        """By pair the square of what sigmoid(margin) lacks to 1."""
        return [(1 - _sigmoid(m)) ** 2 for m in self.margins]

    @property
    def brier(self) -> float:
        """The mean of that; 0.25 says nothing, 0 is always sure and right."""
        return self.mean(self.lacking)

    def surer_than_right(self, bins: int = 10) -> list[list[float]]:
        """By row and part of sureness (see `calibration_error`), by how much sureness is above truth, each pair by its weight."""
        found = [[0.0] * bins for _ in range(self.rows)]
        for row, weight, margin, right in zip(self.row, self.weights, self.margins, self.right, strict=True):
            sure = _sigmoid(abs(margin))
            found[row][min(bins - 1, int((sure - 0.5) * 2 * bins))] += weight * (sure - right)
        return found

    def calibration_error(self, bins: int = 10) -> float:
        """By how much sureness and truth differ on average (expected calibration error, Naeini et al. 2015).

        How sure a pair is lies between 0.5 and 1; over `bins` equal parts of that, the distance of mean sureness and share of right pairs.
        """
        parts = zip(*self.surer_than_right(bins), strict=True)
        return math.fsum(abs(math.fsum(part)) for part in parts) / max(1, self.rows)


def score_pairs(numbers: Sequence[Sequence[float]], places: Sequence[Sequence[int]]) -> PairScores:
    """Scores of rows.

    Args:
        numbers: by row those of its answers. places: as in `pairs_of`.
    """
    better, worse, weight = _pairs(places)
    flat = [x for row in numbers for x in row]
    chosen, rejected = tuple(flat[i] for i in better), tuple(flat[i] for i in worse)
    return PairScores(
        margins=tuple(a - b for a, b in zip(chosen, rejected, strict=True)),
        weights=tuple(weight),
        chosen=chosen,
        rejected=rejected,
        row=tuple(number for number, row in enumerate(places) for a in row for b in row if a < b),
        rows=len(places),
    )


def wilson(share: float, count: int, z: float = 1.959964) -> tuple[float, float]:
    """An interval of a share among so many independent rows (Wilson 1927): also right near 0 and 1, where resampling sees no spread.

    A row of a ranking counts as its mean, which varies less than a yes or no: the interval is then wider than it need be.
    """
    if not count:
        return 0.0, 1.0
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
