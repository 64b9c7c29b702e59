"""PPO's and GRPO's arithmetic against the definitions written out, one answer and one token at a time, in Python's own numbers."""

from __future__ import annotations

import math
import random
import statistics

import pytest
import torch
from torch import Tensor

from ingraft.train.objectives.policy_gradient import (
    adapted,
    gae,
    group_advantages,
    kl_of_samples,
    policy_loss,
    token_rewards,
    value_loss,
    whitened,
)

STRETCHES = [(2, 7), (0, 3), (4, 5), (1, 9)]
"""Where each answer begins and ends among nine tokens."""
WIDTH = 9


def mask() -> Tensor:
    found = torch.zeros(len(STRETCHES), WIDTH, dtype=torch.bool)
    for row, (start, end) in enumerate(STRETCHES):
        found[row, start:end] = True
    return found


def drawn(seed: int, spread: float = 1.0) -> Tensor:
    """Numbers everywhere, also where nothing may look."""
    return torch.randn(len(STRETCHES), WIDTH, generator=torch.Generator().manual_seed(seed)) * spread


def close(found: Tensor, wanted: list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_rewards_of_tokens() -> None:
    """The penalty at each token of the answer, the score at the last one, nothing elsewhere."""
    scores, ratio = torch.tensor([1.0, -2.0, 0.5, 3.0]), drawn(1)
    wanted = [[0.0] * WIDTH for _ in STRETCHES]
    for row, (start, end) in enumerate(STRETCHES):
        for t in range(start, end):
            wanted[row][t] = -0.3 * ratio[row, t].item()
        wanted[row][end - 1] += scores[row].item()
    close(token_rewards(scores, ratio, mask(), 0.3), wanted)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (0.99, 0.0)])
def test_advantages_are_the_weighted_sum_of_surprises(gamma: float, lam: float) -> None:
    """A_t = sum over k of (gamma lambda)^k delta_{t+k}, summed forwards and not by recursion; returns are A_t + V_t."""
    rewards, values = drawn(2), drawn(3)
    advantages, returns = [[0.0] * WIDTH for _ in STRETCHES], [[0.0] * WIDTH for _ in STRETCHES]
    for row, (start, end) in enumerate(STRETCHES):
        r, v = rewards[row].tolist(), values[row].tolist()
        for t in range(start, end):
            for k in range(end - t):
                at = t + k
                delta = r[at] + (gamma * v[at + 1] if at + 1 < end else 0.0) - v[at]
                advantages[row][t] += (gamma * lam) ** k * delta
            returns[row][t] = advantages[row][t] + v[t]
    found = gae(rewards, values, mask(), gamma, lam)
    close(found[0], advantages)
    close(found[1], returns)


def test_with_lambda_1_the_return_is_what_comes() -> None:
    """The value function then has no say in what it is to learn."""
    rewards = drawn(2)
    returns = gae(rewards, drawn(3), mask(), 1.0, 1.0)[1]
    wanted = [
        [sum(rewards[row, t:end].tolist()) if start <= t < end else 0.0 for t in range(WIDTH)]
        for row, (start, end) in enumerate(STRETCHES)
    ]
    close(returns, wanted)


def test_whitening() -> None:
    """Mean and deviation of the marked tokens alone."""
    x, marked = drawn(4, 3.0) + 5, mask()
    values = x[marked].tolist()
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    for centre in (True, False):
        wanted = (x - mean) / deviation + (0.0 if centre else mean)
        torch.testing.assert_close(whitened(x, marked, centre=centre), torch.where(marked, wanted, 0.0))


def test_advantages_within_a_group() -> None:
    """Groups lie mixed; equal rewards earn nothing; scaled by the sample deviation or not."""
    groups = [7, 3, 7, 3, 7, 3, 5, 5]
    rewards = [1.0, 0.0, 0.0, 0.5, 0.0, 2.0, 1.0, 1.0]
    for scale in (True, False):
        wanted: list[float] = []
        for group, reward in zip(groups, rewards, strict=True):
            others = [r for g, r in zip(groups, rewards, strict=True) if g == group]
            apart = reward - statistics.fmean(others)
            wanted.append(apart / (statistics.stdev(others) + 1e-4) if scale else apart)
        found = group_advantages(torch.tensor(rewards), torch.tensor(groups), scale=scale)
        torch.testing.assert_close(found, torch.tensor(wanted))
        assert found[6:].tolist() == [0.0, 0.0]
    assert group_advantages(torch.tensor([4.0]), torch.tensor([0])).tolist() == [0.0]


@pytest.mark.parametrize("high", [None, 0.4])
def test_the_policy_s_loss_and_where_it_stops_pushing(high: float | None) -> None:
    """min(ratio A, clipped ratio A) by cases, and its gradient: none where the ratio has gone far enough in the direction of the advantage."""
    now, old, advantages = drawn(5, 0.5).requires_grad_(), drawn(6, 0.5), drawn(7)
    loss = policy_loss(now, old, advantages, 0.2, high)
    (gradient,) = torch.autograd.grad(loss.sum(), now)
    top = 1.2 if high is None else 1.4
    for i in range(now.numel()):
        ratio = math.exp(now.flatten()[i].item() - old.flatten()[i].item())
        a = advantages.flatten()[i].item()
        stopped = (a > 0 and ratio > top) or (a < 0 and ratio < 0.8)
        bound = top if a > 0 else 0.8
        assert loss.flatten()[i].item() == pytest.approx(-a * (bound if stopped else ratio), rel=1e-4, abs=1e-6)
        assert gradient.flatten()[i].item() == pytest.approx(0.0 if stopped else -a * ratio, rel=1e-4, abs=1e-6)


def test_the_value_s_loss() -> None:
    """The larger of two squared errors, halved."""
    now, old, returns = drawn(8), drawn(9), drawn(10)
    wanted = [
        [
            0.5 * max((v - r) ** 2, (min(max(v, o - 0.2), o + 0.2) - r) ** 2)
            for v, o, r in zip(*(x[row].tolist() for x in (now, old, returns)), strict=True)
        ]
        for row in range(len(STRETCHES))
    ]
    close(value_loss(now, old, returns, 0.2), wanted)


def test_the_estimate_of_the_divergence_is_one() -> None:
    """Over all outcomes, weighted by how often the policy draws them, it gives KL(policy || reference), and no outcome gives less than 0."""
    rng = random.Random(0)
    p, q = ([rng.random() + 0.05 for _ in range(6)] for _ in range(2))
    p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
    ratio = torch.tensor([[math.log(a / b) for a, b in zip(p, q, strict=True)]])
    found = kl_of_samples(ratio)[0].tolist()
    assert min(found) >= 0
    wanted = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert sum(a * x for a, x in zip(p, found, strict=True)) == pytest.approx(wanted, abs=1e-6)
    assert kl_of_samples(torch.tensor([1e-4])).item() == pytest.approx(0.5e-8, rel=1e-2), (
        "small ratios are not lost in rounding"
    )


@pytest.mark.parametrize(
    ("kl", "wanted"),
    [
        (6.0, 0.1),
        (6.6, 0.1 * (1 + 0.1 * 64 / 1000)),
        (60.0, 0.1 * (1 + 0.2 * 64 / 1000)),
        (0.0, 0.1 * (1 - 0.2 * 64 / 1000)),
    ],
)
def test_the_penalty_follows_its_target(kl: float, wanted: float) -> None:
    """Held at the target, moved in proportion near it, by a bounded step beyond a fifth."""
    assert adapted(0.1, kl, 6.0, 64, 1000) == pytest.approx(wanted)
