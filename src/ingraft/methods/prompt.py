"""Prompt tuning: learned embeddings in front of the input.

    x' = [p_1 ... p_P; x], or with p behind the prompt, or on both sides of it

Paper: Lester et al., "The Power of Scale for Parameter-Efficient Prompt Tuning", EMNLP 2021 (arXiv:2104.08691).
Read against: Hugging Face PEFT's `prompt_tuning`.
What differs: the default start is embeddings of real tokens (the paper's "sampled vocabulary"), not random numbers, which decides whether
prompt tuning works at all; outputs hold real tokens only.

Legend: P virtual tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods.contract import InputPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts

STARTS = ("sample", "random")
POSITIONS = ("front", "split", "answer")


@dataclass(frozen=True, kw_only=True)
class PromptTuningConfig(MethodConfig):
    """Prompt tuning's hyperparameters.

    Attributes:
        num_virtual_tokens: P, at least 1.
        prompt_init: "sample": embeddings of tokens drawn from the vocabulary's first 5,000; "random": normal, deviation 0.02.
        prompt_init_ids: start from the embeddings of these token ids instead, repeated or cut to P.
        position: "front": ahead of the row; "answer": behind the row's prompt, just before the answer; "split": the first half ahead of the
            row, the others before the answer. The prompt ends where `adapt.context` says, or labels, or `generate`; else where the second
            text of a pair begins, or the row.
    """

    method: ClassVar[str] = "prompt"

    num_virtual_tokens: int = 20
    prompt_init: str = "sample"
    prompt_init_ids: tuple[int, ...] | None = None
    position: str = "front"

    def problems(self) -> list[str]:
        return start_problems(self.num_virtual_tokens, self.prompt_init) + position_problems(self.position)


class Prompt(InputPart):
    """See the file's header."""

    def __init__(self, config: PromptTuningConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.num_virtual_tokens
        self.behind = behind(self.length, config.position)
        self.prompt = nn.Parameter(
            embeddings_to_start_from(facts, self.length, config.prompt_init, config.prompt_init_ids)
        )

    def embeddings(self, shared: Any, rows: RowsAtHand) -> Tensor:
        del shared, rows
        return self.prompt


def start_problems(length: int, start: str) -> list[str]:
    """What is wrong with a prompt's length or start."""
    found = [] if length >= 1 else [f"num_virtual_tokens must be at least 1, got {length}."]
    if start not in STARTS:
        found.append(f"prompt_init must be one of {', '.join(STARTS)}, got {start!r}.")
    return found


def position_problems(position: str) -> list[str]:
    """What is wrong with where virtual tokens are to stand."""
    return [] if position in POSITIONS else [f"position must be one of {', '.join(POSITIONS)}, got {position!r}."]


def behind(length: int, position: str) -> int:
    """How many of the virtual tokens stand behind the row's prompt."""
    return {"front": 0, "split": length // 2, "answer": length}[position]


@torch.no_grad()
def embeddings_to_start_from(facts: SiteFacts, length: int, start: str, ids: tuple[int, ...] | None) -> Tensor:
    """(P, D) float32."""
    assert facts.tokens is not None
    vocabulary = facts.tokens.weight
    assert isinstance(vocabulary, Tensor)
    if ids is None and start == "random":
        return torch.randn(length, facts.width, device=vocabulary.device) * 0.02
    ids = ids or tuple(torch.randint(min(vocabulary.shape[0], 5000), (length,)).tolist())
    if wrong := [token for token in ids if not 0 <= token < vocabulary.shape[0]]:
        raise IngraftError(f"prompt_init_ids: {wrong} lie outside the vocabulary of {vocabulary.shape[0]} tokens.")
    picked = torch.tensor([ids[slot % len(ids)] for slot in range(length)], device=vocabulary.device)
    return facts.tokens(picked).float().clone()


def count(config: PromptTuningConfig, facts: SiteFacts) -> int:
    """P embeddings."""
    return config.num_virtual_tokens * facts.width


METHOD = Method(
    name="prompt",
    config=PromptTuningConfig,
    part=Prompt,
    sites=("input",),
    identity_at_init=False,
    count=count,
    peft=PeftLayout(
        peft_type="PROMPT_TUNING",
        fields={"prompt_init": None, "prompt_init_ids": None, "position": None},
        only={"position": "front"},
        accepted={"num_transformer_submodules": (None, 1, 2)},
        spare_rows=True,
        written={"num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM"},
        ignored=(
            *("token_dim", "num_attention_heads", "num_layers"),
            *("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
        ),
        tensors={"prompt": "prompt_embeddings"},
        stacked="prompt_embeddings",
    ),
)
