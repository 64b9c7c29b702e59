"""AdaLoRA's training: the penalty, the budget's schedule, and which directions are left at each step of it. See `adalora.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ingraft.errors import IngraftError
from ingraft.methods.config import no_scale
from ingraft.methods.contract import Moment

if TYPE_CHECKING:
    from ingraft.methods.adalora import AdaLoRA, AdaLoraConfig


TENSORS = ("lora_A", "lora_B", "lora_E")


def schedule(config: AdaLoraConfig, total: int) -> tuple[int, int]:
    """The last step ahead of the budget's fall, and the step at which it ends."""
    tinit = total // 10 if config.tinit is None else config.tinit
    return tinit, total - (3 * total // 10 if config.tfinal is None else config.tfinal)


def no_time(config: AdaLoraConfig, total: int) -> str | None:
    """Why a training of this length cannot allocate, or None: with no step that notes gradients ahead of the end of the budget's fall, what is
    dropped there would be a matter of the modules' order."""
    tinit, end = schedule(config, total)
    if end > max(tinit, 1):
        return None
    steps = "1 step" if total == 1 else f"{total} steps"
    least = (
        "Train for at least 2." if total < 2 else f"tinit + tfinal must be below {total}, and tfinal below {total - 1}"
    )
    more = "" if total < 2 else ". Lower them, or train longer."
    return f"tinit = {tinit} and tfinal = {total - end} leave none of {steps} to allocate in. {least}{more}"


def schedule_problems(config: AdaLoraConfig) -> list[str]:
    """What is wrong with the scale, with the budget and with when it falls, as far as the config alone tells."""
    found = no_scale({"lora_alpha": config.lora_alpha})
    if config.target_r > config.init_r:
        found.append(
            f"target_r = {config.target_r} is above init_r = {config.init_r}; the budget can only fall. Lower target_r, or raise init_r."
        )
    delays = {"tinit": config.tinit, "tfinal": config.tfinal}
    found += [f"{n} must not be negative, got {v}." for n, v in delays.items() if v is not None and v < 0]
    return found or ([] if config.total_step is None else config.in_steps(config.total_step))


def penalty(config: AdaLoraConfig, parts: Mapping[str, AdaLoRA]) -> Tensor:
    """How far P and Q are from orthonormal, on average."""
    squares = [m for part in parts.values() for m in (part.lora_A @ part.lora_A.mT, part.lora_B.mT @ part.lora_B)]
    far = [torch.linalg.matrix_norm(m - torch.eye(len(m), device=m.device)) for m in squares if len(m)]
    return config.orth_reg_weight * torch.stack(far).mean()


def update(config: AdaLoraConfig, parts: Mapping[str, AdaLoRA], moment: Moment) -> None:
    """Take note of the gradients; where an allocation is due, leave as many directions as the budget allows."""
    total = config.total_step or moment.total
    if not total:
        raise IngraftError(
            "adalora: its budget falls along the whole training, so it must know how long that is: set total_step."
        )
    if (reason := no_time(config, total)) is not None:
        raise IngraftError(f"adalora: {reason}")
    tinit, end = schedule(config, total)
    first, last = sum(len(part.kept) for part in parts.values()), config.target_r * len(parts)
    if moment.step < end:
        for part in parts.values():
            observe_gradients(part, config.beta1, config.beta2)
        left = 1 - (moment.step - tinit) / max(end - tinit, 1)
        if moment.step > tinit and moment.step % config.deltaT == 0:
            allocate(parts, int((first - last) * left**3 + last))
    elif sum(int(part.kept.sum()) for part in parts.values()) > last or moment.step == end:
        allocate(parts, last)
    else:
        for part in parts.values():
            part.lora_E.masked_fill_(~part.kept[:, None], 0.0)


def allocate(parts: Mapping[str, AdaLoRA], budget: int) -> None:
    """Keep the most important directions, exactly as many as the budget; the others' e becomes zero."""
    scores = torch.cat([scores_of(part) for part in parts.values()])
    kept = torch.zeros_like(scores, dtype=torch.bool)
    kept[scores.argsort(descending=True, stable=True)[:budget]] = True
    for part, own in zip(parts.values(), kept.split([len(part.kept) for part in parts.values()]), strict=True):
        part.kept.copy_(own)
        part.lora_E.masked_fill_(~own[:, None], 0.0)


def observe_gradients(part: AdaLoRA, beta1: float, beta2: float) -> None:
    """Smooth each entry's importance, and how much it fluctuates."""
    for name in TENSORS:
        p = part.get_parameter(name)
        if p.grad is None:
            continue
        now, mean = (p * p.grad).abs(), part.get_buffer(f"importance_{name}")
        mean.mul_(beta1).add_(now, alpha=1 - beta1)
        part.get_buffer(f"fluctuation_{name}").mul_(beta2).add_((now - mean).abs(), alpha=1 - beta2)


def scores_of(part: AdaLoRA) -> Tensor:
    """The importance of each direction (R)."""
    A_RI, B_OR, E_R1 = (part.get_buffer(f"importance_{n}") * part.get_buffer(f"fluctuation_{n}") for n in TENSORS)
    return E_R1[:, 0] + A_RI.mean(1) + B_OR.mean(0)


def compact(config: AdaLoraConfig, parts: Mapping[str, AdaLoRA]) -> tuple[AdaLoraConfig, dict[str, dict[str, Tensor]]]:
    """The directions that are left. One that was dropped but has moved since counts as left."""
    left = {path: part.kept | (part.lora_E[:, 0] != 0) for path, part in parts.items()}
    tensors = {
        path: {
            "lora_A": part.lora_A[left[path]],
            "lora_B": part.lora_B[:, left[path]],
            "lora_E": part.lora_E[left[path]],
        }
        for path, part in parts.items()
    }
    ranks = {path: int(own.sum()) for path, own in left.items()}
    return replace(config, rank_pattern={path: r for path, r in ranks.items() if r != config.init_r}), tensors
