"""Causal language models: supervised answers (`sft`) and plain text (`lm`). Only learned tokens reach the model's head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ingraft.data.examples import Example
from ingraft.evaluate import ChoiceRow, Evaluation, evaluate
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.loss import Poll
from ingraft.train.objectives.base import Objective


class CausalObjective(Objective):
    """Cross entropy of the next token, over the tokens that are learned."""

    def __init__(self, model: nn.Module, pad_id: int, task: str, choices: Sequence[ChoiceRow] = ()) -> None:
        super().__init__(model, pad_id, task)
        self._choices = choices
        self._head: CausalHead | None = None

    def begin(self) -> None:
        self._head = CausalHead(self.model)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        assert self._head is not None, "begin was not called"
        return self._head.loss(batch)

    def evaluate(
        self, examples: Sequence[Example], batch_size: int, *, whole: bool, poll: Poll | None = None
    ) -> Evaluation:
        choices = self._choices if whole else ()
        return evaluate(
            self.model, examples, task=self.task, pad_id=self.pad_id, batch_size=batch_size, choices=choices, poll=poll
        )

    @property
    def cheap_metrics(self) -> tuple[str, ...]:
        return ("loss", "perplexity")
