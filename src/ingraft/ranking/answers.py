"""Several different answers to a prompt, sampled."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ingraft.evaluate.generation import generate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDS = 3
"""How often a prompt is asked for answers that differ, before there are fewer."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        count: different answers wanted. max_new_tokens: longest answer. temperature, top_p: as transformers names them. seed: decides what is drawn.
    """

    count: int = 4
    max_new_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


def different_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: Sequence[int], how: Sampling
) -> list[str]:
    """Up to `how.count` different answers, none empty; a function of the weights, the prompt and the seed alone.

    Raises:
        IngraftError: the prompt leaves no place for an answer.
    """
    found: dict[str, None] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(random.Random(f"ingraft rank {how.seed} {list(prompt)}").getrandbits(63))
        for _ in range(ROUNDS):
            missing = how.count - len(found)
            said = generate(
                model,
                tokenizer,
                [prompt] * missing,
                how.max_new_tokens,
                missing,
                do_sample=True,
                temperature=how.temperature,
                top_p=how.top_p,
                top_k=0,
            )
            found |= dict.fromkeys(answer for answer in said if answer)
            if len(found) == how.count:
                break
    return list(found)
