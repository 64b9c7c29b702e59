"""What a model did with rows, of every scorer: metrics of any multiset, their intervals, and the differences of two models."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from ingraft.errors import IngraftError
from ingraft.evaluate import SCORERS, resampling
from ingraft.evaluate.classes import ClassOutcomes
from ingraft.evaluate.earning import EarnedOutcomes
from ingraft.evaluate.embed import FoundOutcomes, RelatedOutcomes
from ingraft.evaluate.loss import LossOutcomes
from ingraft.evaluate.multi_label import SeveralOutcomes
from ingraft.evaluate.outcomes import Outcomes
from ingraft.evaluate.preferred import JudgedOutcomes, PairOutcomes, RewardOutcomes
from ingraft.evaluate.regress import NumberOutcomes
from ingraft.evaluate.resampling import MCNEMAR, PERMUTATION, Resampling, bca, compared, intervals, mcnemar
from ingraft.evaluate.seq2seq import WrittenOutcomes
from ingraft.evaluate.spans import SpanOutcomes
from ingraft.evaluate.tags import TagOutcomes
from ingraft.evaluate.texts import compare_texts
from ingraft.evaluate.writing import ChosenOutcomes
from ingraft.recipe import PreferenceRecipe

FEW = Resampling(count=200)
Rng = np.random.Generator


def losses(rng: Rng, n: int) -> dict[str, Any]:
    counts = rng.integers(1, 9, n)
    return {"sums": (rng.lognormal(0, 0.5, n) * counts).tolist(), "counts": counts.tolist()}


def numbers_of(rng: Rng, n: int, answers: int = 4) -> list[list[float]]:
    return [rng.normal(0, 1, int(rng.integers(2, answers + 1))).round(1).tolist() for _ in range(n)]


def places_of(rows: list[list[float]], rng: Rng) -> list[list[int]]:
    """Orders of answers, some of them sharing a place, never all."""
    return [[1, *rng.integers(1, 4, len(row) - 2).tolist(), 4] for row in rows]


def lm(rng: Rng, n: int) -> Outcomes:
    return LossOutcomes(**losses(rng, n))


def sft(rng: Rng, n: int) -> Outcomes:
    right, chosen = rng.integers(0, 4, n), rng.integers(0, 4, n)
    chosen[: n // 2], right[n // 4 : n // 3], chosen[n // 4 : n // 3] = right[: n // 2], -1, -1
    return ChosenOutcomes(**losses(rng, n), right=right, chosen=chosen)


def seq2seq(rng: Rng, n: int) -> Outcomes:
    def text() -> str:
        return " ".join(rng.choice(["a", "b", "c", "d"], int(rng.integers(1, 9))))

    right = [[text() for _ in range(int(rng.integers(1, 4)))] for _ in range(n)]
    found = compare_texts([row[0] if rng.random() < 0.3 else text() for row in right], right)
    return WrittenOutcomes(**losses(rng, n), bleu=found.bleu_N10, rouge=found.rouge_N, exact=found.exact_N)


def classify(rng: Rng, n: int) -> Outcomes:
    labels = rng.integers(0, 5, n)
    said = np.where(rng.random(n) < 0.6, labels, rng.integers(0, 6, n))
    return ClassOutcomes(losses=rng.lognormal(0, 1, n).tolist(), labels=labels.tolist(), predictions=said.tolist())


def multi_label(rng: Rng, n: int) -> Outcomes:
    labels, said = (rng.integers(0, 2, (n, 4)) for _ in range(2))
    said[: n // 2] = labels[: n // 2]
    return SeveralOutcomes(losses=rng.lognormal(0, 1, n).tolist(), labels=labels, said=said)


def regress(rng: Rng, n: int) -> Outcomes:
    labels = rng.normal(0, 3, n).round()
    said = (labels + rng.normal(0, 2, n)).round(1)
    return NumberOutcomes(losses=((labels - said) ** 2).tolist(), labels=labels.tolist(), said=said.tolist())


def tagging(rng: Rng, n: int, names: list[str]) -> Outcomes:
    right = [rng.choice(names, int(rng.integers(1, 12))).tolist() for _ in range(n)]
    said = [[tag if rng.random() < 0.8 else str(rng.choice(names)) for tag in row] for row in right]
    entities = names[-1] == "O"
    counts = [int(rng.integers(0, len(row) + 1)) for row in right]
    lost = [count * float(rng.lognormal(0, 1)) for count in counts]
    return TagOutcomes(losses=lost, counts=counts, right=right, said=said, entities=entities)


def tag(rng: Rng, n: int) -> Outcomes:
    return tagging(rng, n, ["B-PER", "I-PER", "B-LOC", "I-LOC", "O"])


def words(rng: Rng, n: int) -> Outcomes:
    return tagging(rng, n, ["NOUN", "VERB", "X"])


def qa(rng: Rng, n: int) -> Outcomes:
    lost = [rng.lognormal(0, 1, int(rng.integers(1, 4))).tolist() for _ in range(n)]
    share = rng.random(n).round(1)
    return SpanOutcomes(losses=lost, exact=(share == 1).astype(float).tolist(), f1=share.tolist())


def found(rng: Rng, n: int) -> Outcomes:
    return FoundOutcomes(losses=rng.lognormal(0, 1, n), places=rng.integers(1, 4, n) + 0.5 * rng.integers(0, 2, n))


def related(rng: Rng, n: int, binary: bool = False) -> Outcomes:
    values = rng.integers(0, 2 if binary else 6, n).astype(float)
    cosines = np.tanh(values / 4 + rng.normal(0, 0.3, n)).round(1)
    return RelatedOutcomes(
        values=values, cosines=cosines, groups=np.arange(n) // 8, temperature=0.05, binary=binary
    )  # fmt: skip


def binary(rng: Rng, n: int) -> Outcomes:
    return related(rng, n, binary=True)


def pairs(rng: Rng, n: int) -> Outcomes:
    numbers = numbers_of(rng, n)
    rewards = [[0.1 * x for x in row] for row in numbers]
    lost = rng.lognormal(0, 1, n).tolist()
    return PairOutcomes(ratios_of=numbers, rewards=rewards, places=places_of(numbers, rng), losses=lost)


def judged(rng: Rng, n: int) -> Outcomes:
    beside = np.where(rng.random(n) < 0.2, np.nan, rng.normal(0.5, 1, n))
    how = PreferenceRecipe(desirable_weight=1.5)
    return JudgedOutcomes(own=rng.normal(0.5, 1, n), beside=beside, good=np.arange(n) % 3 > 0, how=how)


def reward(rng: Rng, n: int) -> Outcomes:
    numbers = numbers_of(rng, n)
    return RewardOutcomes(numbers=numbers, places=places_of(numbers, rng))


def earned(rng: Rng, n: int) -> Outcomes:
    return EarnedOutcomes(
        rewards=rng.normal(0, 1, n).tolist(),
        kl=rng.normal(0, 1, n).tolist(),
        lengths=rng.integers(1, 9, n).tolist(),
        ended=rng.integers(0, 2, n).astype(float).tolist(),
    )


MAKERS: dict[str, tuple[Callable[[Rng, int], Outcomes], ...]] = {
    "sft": (sft, lm),
    "lm": (lm,),
    "seq2seq": (seq2seq, lm),
    "classify": (classify,),
    "image-classify": (classify,),
    "multi-label": (multi_label,),
    "regress": (regress,),
    "tag": (tag, words),
    "qa": (qa,),
    "embed": (found, related, binary),
    "reward": (reward,),
    "dpo": (pairs,),
    "ipo": (pairs,),
    "kto": (judged,),
    "ppo": (earned,),
    "grpo": (earned,),
}
EVERY = sorted({make for makers in MAKERS.values() for make in makers}, key=lambda make: make.__name__)
every = pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)


def rng_of(seed: int = 0) -> Rng:
    return np.random.default_rng(seed)


def ends_of(outcomes: Outcomes, name: str, how: Resampling = FEW) -> tuple[float, float]:
    found = intervals(outcomes, how)[name]
    assert found is not None
    return found


def test_no_scorer_is_left_out() -> None:
    assert MAKERS.keys() == SCORERS.keys()


@every
def test_the_way_round_is_the_definition(make: Callable[..., Outcomes]) -> None:
    """Metrics of multisets at once are those that the libraries give for each, its rows written down as often as they are in it; also of few rows, all alike."""
    outcomes, rng = make(rng_of(), 40), rng_of(1)
    times = np.stack([np.bincount(rng.integers(0, 40, size), minlength=40) for size in (40, 40, 40, 6, 3)])
    alone = np.eye(40)[[3, 17]] * 2
    times_RN = np.concatenate([times, alone, np.ones((1, 40))]).astype(float)
    ways = {**outcomes.ratios(), **outcomes.others(times_RN)}
    assert ways.keys() == outcomes.metrics().keys(), "nothing is left to the slow way"
    quick = outcomes.resampled(times_RN)
    for number, times_N in enumerate(times_RN):
        wanted = outcomes.taken(np.repeat(np.arange(40), times_N.astype(int))).metrics()
        for name, value in wanted.items():
            assert quick[name][number] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, number)


@every
def test_the_order_of_rows_does_not_matter(make: Callable[..., Outcomes]) -> None:
    outcomes = make(rng_of(), 30)
    turned = outcomes.taken(rng_of(2).permutation(30))
    assert turned.metrics() == pytest.approx(outcomes.metrics(), rel=1e-6)
    assert turned.bounds() == pytest.approx(outcomes.bounds())


def test_what_has_no_way_round_is_computed_by_the_definition() -> None:
    class Slow(LossOutcomes):
        def ratios(self) -> dict[str, Any]:
            return {}

        def others(self, times_RN: Any) -> dict[str, Any]:
            return {}

    quick = lm(rng_of(), 9)
    slow = Slow(**losses(rng_of(), 9))
    times_RN = np.stack([np.arange(9.0), np.ones(9)])
    for name, values in quick.resampled(times_RN).items():
        assert slow.resampled(times_RN)[name] == pytest.approx(values)


@every
def test_an_interval_holds_its_metric(make: Callable[..., Outcomes]) -> None:
    """One for each metric that rows can tell of; the same every time; wider for more confidence; of a single row, shares alone have one."""
    outcomes = make(rng_of(), 40)
    metrics, ends = outcomes.metrics(), intervals(outcomes, FEW)
    assert ends.keys() == metrics.keys()
    assert {name for name in ends if ends[name] is None} == outcomes.together
    assert ends == intervals(outcomes, FEW)
    wide = intervals(outcomes, replace(FEW, confidence=0.99))
    for name, (low, high) in ((name, between) for name, between in ends.items() if between is not None):
        assert low <= metrics[name] <= high
        assert all(map(math.isfinite, (low, high)))
        assert low < high
        assert wide[name][0] <= low + 1e-12 and high <= wide[name][1] + 1e-12
    alone = outcomes.taken([0])
    assert {name for name, between in intervals(alone, FEW).items() if between} <= alone.shares().keys()


def test_rows_that_are_all_alike_tell_nothing_of_what_varies() -> None:
    """All right, and macro F1 might as well be less; the share of rows has Wilson's interval all the same."""
    outcomes = ChosenOutcomes(sums=[1.0] * 30, counts=[1] * 30, right=np.arange(30) % 2, chosen=np.arange(30) % 2)
    ends = intervals(outcomes, FEW)
    assert ends["loss"] is ends["perplexity"] is ends["macro_f1"] is None
    assert ends["accuracy"] == pytest.approx((30 / (30 + 1.959964**2), 1.0))


@every
def test_a_thing_does_not_differ_from_itself(make: Callable[..., Outcomes]) -> None:
    outcomes = make(rng_of(), 25)
    for difference in compared(outcomes, outcomes, FEW).values():
        assert difference.value == 0.0
        assert difference.interval in ((0.0, 0.0), None)
        assert difference.p == 1.0


@every
def test_turned_round_a_difference_is_the_same(make: Callable[..., Outcomes]) -> None:
    """Two models of which the other one comes first: the other sign, the same p; p of shares is McNemar's."""
    one = make(rng_of(), 30)
    other = replace(make(rng_of(5), 30))
    there, back = compared(one, other, FEW), compared(other, one, FEW)
    for name, difference in there.items():
        assert difference.value == -back[name].value
        assert difference.p == back[name].p
        assert 0 < difference.p <= 1
        assert difference.test == (MCNEMAR if name in one.shares().keys() & other.shares().keys() else PERMUTATION)


def test_a_real_difference_is_found_and_told_with_its_sign() -> None:
    """A model that is better on nearly every row, by less than rows differ among themselves."""
    rng = rng_of()
    hard = rng.lognormal(1, 1, 60)
    better, worse = (
        LossOutcomes(sums=(hard + more).tolist(), counts=[1] * 60) for more in (0.0, rng.normal(0.3, 0.1, 60))
    )
    found = compared(better, worse, Resampling(count=1000))["loss"]
    assert found.value == pytest.approx(-0.3, abs=0.05)
    assert found.interval is not None and found.interval[1] < 0
    assert found.p == pytest.approx(1 / 1001)
    low, high = ends_of(better, "loss")
    assert high - low > 1


def test_p_is_that_of_all_exchanges() -> None:
    """Of eight rows all 256 ways to exchange outcomes can be tried; the draws come to the same share. A ratio, so that rows weigh differently."""
    one, other = (LossOutcomes(**losses(rng_of(seed), 8)) for seed in (1, 7))
    apart = abs(one.metrics()["loss"] - other.metrics()["loss"])
    as_large = 0
    for ways in itertools.product((False, True), repeat=8):
        rows = [n + 8 * way for n, way in enumerate(ways)]
        both, turned = one.joined(other), [(row + 8) % 16 for row in rows]
        found = abs(both.taken(rows).metrics()["loss"] - both.taken(turned).metrics()["loss"])
        as_large += found >= apart - 1e-9
    assert 0.05 < as_large / 256 < 0.95
    p = compared(one, other, Resampling(count=4000))["loss"].p
    assert p == pytest.approx(as_large / 256, abs=0.03)


def test_mcnemar_is_the_binomial_test() -> None:
    for first, second in ((0, 0), (1, 0), (3, 9), (9, 3), (5, 5), (120, 160), (4000, 4300)):
        wanted = stats.binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
        assert mcnemar(first, second) == pytest.approx(wanted, rel=1e-9)


def test_bca_is_scipys() -> None:
    """On the same multisets."""
    rng = rng_of()
    values = rng.lognormal(0, 1, 60)
    outcomes = LossOutcomes(sums=values.tolist(), counts=[1] * 60)
    how = Resampling(count=3000)
    low, high = ends_of(outcomes, "loss", how)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, method="BCa", rng=rng).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), rel=0.03)
    drawn = np.concatenate([outcomes.resampled(times)["loss"] for times in resampling._draws(60, how)])
    plain = np.quantile(drawn, [0.025, 0.975])
    assert low > plain[0] and high > plain[1], "to the right, as the rows are crooked"


def test_the_interval_of_a_perplexity_is_that_of_its_loss() -> None:
    """BCa goes along with every rising function."""
    outcomes, how = lm(rng_of(), 200), Resampling(count=1000)
    wanted = [math.exp(end) for end in ends_of(outcomes, "loss", how)]
    assert list(ends_of(outcomes, "perplexity", how)) == pytest.approx(wanted, rel=2e-3)


def simulated(draw: Callable[[Rng], Outcomes], truth: dict[str, float], runs: int = 100) -> dict[str, int]:
    """How many of so many intervals hold the truth."""
    held = dict.fromkeys(truth, 0)
    for run in range(runs):
        outcomes = draw(rng_of(run))
        for name, value in truth.items():
            low, high = ends_of(outcomes, name, Resampling(count=300, seed=run))
            held[name] += low <= value <= high
    return held


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 in 100 of simulated data sets, means of crooked numbers, shares near 1 and correlations; binomial chance allows for 87 to 100."""

    def texts(rng: Rng) -> Outcomes:
        return LossOutcomes(sums=rng.gamma(2.0, 0.5, 60).tolist(), counts=[1] * 60)

    def classes(rng: Rng) -> Outcomes:
        said = (rng.random(40) < 0.95).astype(int)
        return ChosenOutcomes(sums=[0.0] * 40, counts=[1] * 40, right=np.ones(40, int), chosen=said)

    def numbers(rng: Rng) -> Outcomes:
        x = rng.normal(0, 1, 60)
        y = 0.8 * x + 0.6 * rng.normal(0, 1, 60)
        return NumberOutcomes(losses=[0.0] * 60, labels=x.tolist(), said=y.tolist())

    found = simulated(texts, {"loss": 1.0, "perplexity": math.e})
    found |= simulated(classes, {"accuracy": 0.95}) | simulated(numbers, {"pearson": 0.8, "mse": 0.4})
    assert all(87 <= count <= 100 for count in found.values()), found


def test_models_that_are_alike_differ_as_often_as_chance_has_it() -> None:
    """p is below 0.2 in a fifth of simulated pairs of models, whatever the metric: F1 too."""
    small = {"macro_f1": 0, "accuracy": 0}
    for run in range(80):
        rng = rng_of(run)
        labels = rng.integers(0, 3, 40)
        easy = rng.random(40)
        said = [np.where(rng.random(40) < easy, labels, rng.integers(0, 3, 40)) for _ in range(2)]
        one, other = (ChosenOutcomes(sums=[0.0] * 40, counts=[1] * 40, right=labels, chosen=chosen) for chosen in said)
        for name, difference in compared(one, other, Resampling(count=150, seed=run)).items():
            if name in small:
                small[name] += difference.p <= 0.2
    assert 6 <= small["macro_f1"] <= 27
    assert small["accuracy"] <= 27, "an exact test of few rows is careful"


def test_a_calibration_error_is_not_below_its_interval() -> None:
    """Few rows move it upwards, and resampling moves it further: the interval goes the other way, and not below 0."""
    numbers = [[x, 0.0] for x in rng_of().normal(1, 1.5, 60)]
    outcomes = RewardOutcomes(numbers=numbers, places=[[1, 2]] * 60)
    low, high = ends_of(outcomes, "calibration_error")
    point = outcomes.metrics()["calibration_error"]
    assert 0 <= low < point <= high < point + (point - low) / 2
    drawn = np.full(100, 2.0)
    assert bca(1.0, drawn, np.ones(10), 0.95) == (0.0, 1.0)


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(IngraftError, match="only on the same rows"):
        compared(lm(rng_of(), 5), lm(rng_of(), 6), FEW)
    with pytest.raises(IngraftError, match="at least two rows"):
        compared(lm(rng_of(), 1), lm(rng_of(), 1), FEW)
    with pytest.raises(IngraftError, match=r"0\.95 is usual"):
        Resampling(confidence=95)
    with pytest.raises(ValueError, match="different lengths"):
        LossOutcomes(sums=[1.0], counts=[1, 2])
