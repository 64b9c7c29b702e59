"""Models that write: supervised answers (`sft`, `seq2seq`) and plain text (`lm`). Only learned tokens reach the model's head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ingraft.data.examples import Example
from ingraft.evaluate.head import CausalHead, head_of
from ingraft.train.objectives.base import Objective


class CausalObjective(Objective):
    """Cross entropy of the next token, over the tokens that are learned."""

    _head: CausalHead | None = None

    def begin(self, together: Sequence[Sequence[Example]] = ()) -> None:
        self._head = head_of(self.model)

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        assert self._head is not None, "begin was not called"
        return self._head.loss(batch)
