"""The arithmetic of PPO and GRPO: from scores of sampled answers to the loss of their tokens. No model is touched here.

The parts, in the order in which a step uses them: a penalty for leaving the reference is taken off token by token and the score of the whole answer is
added at its end (`token_rewards`); advantages come from a value function (`gae`) or from the other answers to the same prompt
(`group_advantages`); the policy's ratio to the one that sampled is clipped (`policy_loss`), and so is the value function's step (`value_loss`).
How dear the penalty is may follow a target (`adapted`).

Everything is float32 and by token, so that whoever sums decides what is divided by: the loop of this package divides by the number of tokens of the
whole effective batch, so that micro-batches change nothing.

Masks mark the tokens of the answers. An answer is one stretch of tokens; before it stands its prompt, behind it padding.

Legend: B answers, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kl_of_samples(ratio_BT: Tensor) -> Tensor:
    """(B, T) an estimate of KL(policy || reference) by token that is never below 0 (Schulman 2020, "k3"): `exp(-r) - 1 + r`.

    Its mean over tokens that the policy sampled is the divergence, and varies less than the mean of `r` itself.

    Args:
        ratio_BT: r, log policy - log reference.
    """
    return torch.expm1(-ratio_BT.float()) + ratio_BT.float()


def token_rewards(scores_B: Tensor, ratio_BT: Tensor, mask_BT: Tensor, coefficient: float) -> Tensor:
    """(B, T) what each token earns: less the penalty at every token, and the answer's score at its last (Ziegler et al. 2019, equation 2).

    Args:
        scores_B: of whole answers. ratio_BT: log policy - log reference of the tokens when they were sampled.
        mask_BT: bool, at least one token a row. coefficient: of the penalty.
    """
    rewards_BT = torch.where(mask_BT, -coefficient * ratio_BT.float(), 0.0)
    return torch.where(_last(mask_BT), rewards_BT + scores_B.float()[:, None], rewards_BT)


def gae(
    rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that the value function is to learn (Schulman et al. 2016, equations 11 and 16).

    An answer ends with its last token: nothing is worth anything behind it.

    Args:
        values_BT: what the value function said before each token. mask_BT: bool.

    Returns:
        advantages (B, T) and returns (B, T), 0 outside of the answers.
    """
    values_BT = torch.where(mask_BT, values_BT.float(), 0.0)
    behind_B = torch.zeros_like(values_BT[:, 0])
    carried_B = torch.zeros_like(behind_B)
    advantages: list[Tensor] = []
    for t in range(values_BT.shape[1] - 1, -1, -1):
        inside_B = mask_BT[:, t]
        surprise_B = rewards_BT[:, t].float() + gamma * behind_B - values_BT[:, t]
        carried_B = torch.where(inside_B, surprise_B + gamma * lam * carried_B, 0.0)
        behind_B = values_BT[:, t]
        advantages.append(carried_B)
    advantages_BT = torch.stack(advantages[::-1], dim=1)
    return advantages_BT, torch.where(mask_BT, advantages_BT + values_BT, 0.0)


def whitened(x_BT: Tensor, mask_BT: Tensor, *, centre: bool = True) -> Tensor:
    """(B, T) with mean 0 and variance 1 over all marked tokens of the batch; 0 outside.

    Args:
        centre: False keeps the mean, for rewards whose sign means something.
    """
    x_N = x_BT[mask_BT].float()
    mean = x_N.mean()
    scaled_BT = (x_BT.float() - mean) * torch.rsqrt(x_N.var(unbiased=False) + 1e-8)
    return torch.where(mask_BT, scaled_BT if centre else scaled_BT + mean, 0.0)


def group_advantages(rewards_B: Tensor, groups_B: Tensor, *, scale: bool = True) -> Tensor:
    """(B,) what each answer earns beyond the mean of its prompt's answers, in their standard deviations (GRPO, Shao et al. 2024, section 4.1.2).

    Answers that all earn the same teach nothing: 0.

    Args:
        groups_B: int64, the prompt of each answer.
        scale: divide by the standard deviation; False leaves out what favours prompts that are nearly always, or never, answered well
            (Liu et al. 2025).
    """
    _, inverse_B, sizes_G = torch.unique(groups_B, return_inverse=True, return_counts=True)
    rewards_B = rewards_B.float()
    one_BG = torch.nn.functional.one_hot(inverse_B, len(sizes_G)).float()  # a product adds up in a fixed order
    apart_B = rewards_B - ((rewards_B @ one_BG) / sizes_G)[inverse_B]
    if not scale:
        return apart_B
    spread_G = ((apart_B.square() @ one_BG) / (sizes_G - 1).clamp(min=1)).sqrt()
    return apart_B / (spread_G[inverse_B] + 1e-4)


def policy_loss(
    logps_BT: Tensor, old_BT: Tensor, advantages_BT: Tensor, clip: float = 0.2, clip_high: float | None = None
) -> Tensor:
    """(B, T) the clipped surrogate, to be made small (Schulman et al. 2017, equation 7).

    Args:
        logps_BT: of the tokens now. old_BT: when they were sampled.
        clip: how far the ratio may fall below 1 before it earns no more; clip_high: how far above (Yu et al. 2025), as `clip` if None.
    """
    ratio_BT = (logps_BT.float() - old_BT.float()).exp()
    bounded_BT = ratio_BT.clamp(1 - clip, 1 + (clip if clip_high is None else clip_high))
    return -torch.minimum(ratio_BT * advantages_BT, bounded_BT * advantages_BT)


def value_loss(values_BT: Tensor, old_BT: Tensor, returns_BT: Tensor, clip: float = 0.2) -> Tensor:
    """(B, T) half the squared error, of the value or of what may be left of its step, whichever is larger (Schulman et al., baselines).

    Args:
        values_BT: now. old_BT: when the answers were sampled.
    """
    bounded_BT = old_BT.float() + (values_BT.float() - old_BT.float()).clamp(-clip, clip)
    return 0.5 * torch.maximum((values_BT.float() - returns_BT).square(), (bounded_BT - returns_BT).square())


def adapted(coefficient: float, kl: float, target: float, count: int, horizon: int) -> float:
    """The coefficient of the penalty for the next step: larger where the policy is further away than it should be (Ziegler et al. 2019, section 2.2).

    Args:
        kl: of the step, by answer, in nats. target: what it should be.
        count: answers in the step. horizon: so many answers change the coefficient by a fifth at most.
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return coefficient * (1 + error * count / horizon)


def _last(mask_BT: Tensor) -> Tensor:
    """(B, T) bool, the last marked token of each row."""
    behind_BT = torch.nn.functional.pad(mask_BT[:, 1:], (0, 1), value=False)
    return mask_BT & ~behind_BT
