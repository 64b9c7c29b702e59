"""Sequence classification: one class a row, cross entropy over the head's outputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.examples import Example
from ingraft.evaluate import Evaluation, evaluate
from ingraft.evaluate.loss import Poll
from ingraft.train.objectives.base import Objective


class ClassifyObjective(Objective):
    """Cross entropy of the right class."""

    def __init__(self, model: nn.Module, pad_id: int) -> None:
        super().__init__(model, pad_id, "classify")

    def loss(self, batch: dict[str, Tensor]) -> Tensor:
        labels_B = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        return F.cross_entropy(self.model(**inputs).logits.float(), labels_B, reduction="sum")

    def evaluate(
        self, examples: Sequence[Example], batch_size: int, *, whole: bool, poll: Poll | None = None
    ) -> Evaluation:
        del whole
        return evaluate(self.model, examples, task=self.task, pad_id=self.pad_id, batch_size=batch_size, poll=poll)

    @property
    def cheap_metrics(self) -> tuple[str, ...]:
        return ("loss", "accuracy", "macro_f1")


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The parts of a classifier that lie beside its base and have parameters: the head, which must be trained whatever the method."""
    prefix = getattr(model, "base_model_prefix", "")
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )
