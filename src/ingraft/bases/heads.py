"""What a task needs of a base: the head that transformers puts on it. One declaration a task.

A head either is part of the base (a language model's) or begins at random, because the base's files hold none for the task; then it is trained whole
beside the adapter and saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A kind of head.

    Attributes:
        loader: the class of transformers that loads a base with it.
        families: the table of `transformers.models.auto.modeling_auto` with the model types that have one.
        what: how a message calls it.
        fresh: whether it begins at random, so that weights which the files lack are no damage.
        named: whether its outputs are called something: labels, in order.
        outputs: how many it has, where that is no matter of labels.
    """

    loader: str
    families: str
    what: str
    fresh: bool = True
    named: bool = False
    outputs: int | None = None

    def require(self, name: str, config: Any, task: str) -> None:
        """Refuse a base that cannot have this head.

        Args:
            name: what the user called the base. config: transformers' of it.

        Raises:
            IngraftError: saying what its family lacks.
        """
        from transformers.models.auto import modeling_auto as tables

        kind, own_code = str(config.model_type), hasattr(config, "auto_map")
        known = kind in getattr(tables, self.families) or own_code
        if self.fresh:
            if not known:
                raise IngraftError(f"{name}: transformers has no {self.what} for a {kind} model; use another base.")
            return
        encoder = kind in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
        if encoder or not known:
            raise IngraftError(
                f"{name}: a {kind} model does not write text, which the task {task!r} needs; use --task classify, or another base."
            )

    def prepare(self, config: Any, labels: list[str] | None, num_labels: int | None) -> None:
        """Tell a base's config what the outputs are."""
        if self.outputs is not None:
            config.num_labels = self.outputs
        if not self.named:
            return
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        elif num_labels is not None:
            config.num_labels = num_labels


WRITER = Head(
    loader="AutoModelForCausalLM", families="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", what="language model", fresh=False
)
CLASSIFIER = Head(
    loader="AutoModelForSequenceClassification",
    families="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    what="sequence classifier",
    named=True,
)
NUMBER = Head(
    loader="AutoModelForSequenceClassification",
    families="MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    what="head that says one number",
    outputs=1,
)

HEADS: Mapping[str, Head] = {
    "sft": WRITER,
    "lm": WRITER,
    "classify": CLASSIFIER,
    "reward": NUMBER,
    "dpo": WRITER,
    "ipo": WRITER,
    "kto": WRITER,
}
"""The head of each task."""


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The parts of a model that lie beside its base and have parameters: the head, which must be trained whatever the method."""
    prefix = getattr(model, "base_model_prefix", "")
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )
