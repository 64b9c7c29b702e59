"""Multi-task prompt tuning: one prompt shared by several tasks, changed for each by a matrix of low rank.

    x' = [p * (u_k v_k); x]        for a row of task k; * entry by entry, u_k v_k of rank R

Paper: Wang et al., "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", ICLR 2023 (arXiv:2303.02861), section 3.1.
Read against: Hugging Face PEFT's `multitask_prompt_tuning`.
What differs: u_k v_k starts near one instead of near zero (PEFT's start, a deviation of 0.02 on each factor, wipes the prompt out and leaves it
hardly any gradient); the prompt starts from embeddings of real tokens, as in `prompt`. The task of a row is told by `adapt.context(tasks=...)`,
or by `task_ids` in `ingraft.peft`; a row without one is of task 0. The distillation of the paper's source prompts is a matter of training data.

Legend: P virtual tokens, D width, K tasks, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods.contract import InputPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts
from ingraft.methods.prompt import embeddings_to_start_from, start_problems


@dataclass(frozen=True, kw_only=True)
class MultitaskPromptConfig(MethodConfig):
    """Multi-task prompt tuning's hyperparameters.

    Attributes:
        num_virtual_tokens: P, at least 1.
        num_tasks: K, at least 1.
        num_ranks: R, at least 1 and at most the smaller of P and D.
        prompt_init, prompt_init_ids: where the shared prompt starts, as in `prompt`.
    """

    method: ClassVar[str] = "multitask-prompt"

    num_virtual_tokens: int = 20
    num_tasks: int = 1
    num_ranks: int = 1
    prompt_init: str = "sample"
    prompt_init_ids: tuple[int, ...] | None = None

    def problems(self) -> list[str]:
        sizes = {"num_tasks": self.num_tasks, "num_ranks": self.num_ranks}
        found = [f"{name} must be at least 1, got {value}." for name, value in sizes.items() if value < 1]
        return start_problems(self.num_virtual_tokens, self.prompt_init) + found


class MultitaskPrompt(InputPart):
    """See the file's header."""

    reads_context = True

    def __init__(self, config: MultitaskPromptConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.num_virtual_tokens
        start_PD = embeddings_to_start_from(facts, self.length, config.prompt_init, config.prompt_init_ids)
        self.prompt = nn.Parameter(start_PD)
        cols_KPR = torch.randn(config.num_tasks, self.length, config.num_ranks) * 0.02 + 1.0 / config.num_ranks
        rows_KRD = torch.randn(config.num_tasks, config.num_ranks, facts.width) * 0.02 + 1.0
        self.cols, self.rows = (nn.Parameter(start.to(start_PD.device)) for start in (cols_KPR, rows_KRD))

    def embeddings(self, shared: Any, rows: RowsAtHand) -> Tensor:
        del shared
        prompt, u, v = (tensor.to(rows.dtype).float() for tensor in (self.prompt, self.cols, self.rows))
        if rows.tasks is None:
            return prompt * (u[0] @ v[0])
        K = u.shape[0]
        if not torch.compiler.is_compiling() and not bool(((rows.tasks >= 0) & (rows.tasks < K)).all()):
            raise IngraftError(f"multitask-prompt: tasks are numbered from 0 to {K - 1}, got {rows.tasks.tolist()}.")
        tasks_B = rows.tasks.to(u.device)
        return prompt * (u[tasks_B] @ v[tasks_B])


def refuses(config: MultitaskPromptConfig, facts: SiteFacts) -> str | None:
    """More ranks than a matrix of the prompt's shape can have."""
    P, D = config.num_virtual_tokens, facts.width
    if facts.finished or config.num_ranks <= min(P, D):
        return None
    return (
        f"multitask-prompt: num_ranks = {config.num_ranks} is above the rank that a prompt of {P} x {D} can have; it must be at most {min(P, D)}. "
        "Lower num_ranks."
    )


def count(config: MultitaskPromptConfig, facts: SiteFacts) -> int:
    """The shared prompt, and for each task two factors."""
    P, D = config.num_virtual_tokens, facts.width
    return P * D + config.num_tasks * config.num_ranks * (P + D)


METHOD = Method(
    name="multitask-prompt",
    config=MultitaskPromptConfig,
    part=MultitaskPrompt,
    sites=("input",),
    identity_at_init=False,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="MULTITASK_PROMPT_TUNING",
        fields={"prompt_init": None, "prompt_init_ids": None},
        accepted={"num_transformer_submodules": (None, 1)},
        written={"num_transformer_submodules": 1, "prompt_tuning_init": "RANDOM"},
        ignored=(
            *("token_dim", "num_attention_heads", "num_layers"),
            *("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
            *("prompt_tuning_init_state_dict_path", "prompt_tuning_init_task"),
        ),
        tensors={"prompt": "prompt_embeddings"},
        stacked="prompt_embeddings",
        beside={"cols": "prefix_task_cols", "rows": "prefix_task_rows"},
    ),
)
