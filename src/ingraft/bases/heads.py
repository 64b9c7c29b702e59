"""What a task needs of a base: the head that transformers puts on it. One declaration a task.

A head either is part of the base (a language model's) or begins at random, because the base's files hold none for the task; then it is trained whole
beside the adapter and saved with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from torch import nn


ALONE, PAIR = "alone", "pair"
TEXT, IMAGES = "text", "images"
REFUSED = {
    ALONE: ("has no encoder beside what writes", "sft"),
    PAIR: ("writes what an encoder reads", "seq2seq"),
    None: ("does not write text", "classify"),
}
"""Ways of writing: what is wrong with them for a task that wants another, and the task for them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A kind of head.

    Attributes:
        loader: the class of transformers that loads a base with it.
        families: the table of `transformers.models.auto.modeling_auto` with the model types that have one.
        what: how a message calls it.
        reads: `TEXT`, by a tokenizer, or `IMAGES`, by an image processor.
        fresh: whether it begins at random, so that weights which the files lack are no damage.
        named: whether its outputs are called something: labels, in order.
        outputs: how many it has, where that is no matter of labels.
        takes: ways of writing (see `way_of_writing`) that the base may have.
        unused: parts of the base that the task has no use for, so that they are taken off.
        generic: transformers' parts of such a head, for families that it does not put them on; see `bases.generic`.
        problem: transformers' name for what a sequence classifier's outputs are, where one and the same class serves several.
    """

    loader: str
    families: str
    what: str
    reads: str = TEXT
    fresh: bool = True
    named: bool = False
    outputs: int | None = None
    problem: str | None = None
    takes: tuple[str | None, ...] = (ALONE, PAIR, None)
    unused: tuple[str, ...] = ()
    generic: str | None = None

    def loads(self, name: str, config: Any, task: str) -> Any:
        """The class that loads the base with this head.

        Args:
            name: what the user called the base. config: transformers' of it.

        Raises:
            IngraftError: a base that cannot have it, saying what its family lacks.
        """
        import transformers
        from transformers.models.auto import modeling_auto as tables

        from ingraft.bases.generic import class_for

        kind, loader = str(config.model_type), getattr(transformers, self.loader)
        known = kind in getattr(tables, self.families) or hasattr(config, "auto_map")
        if self.generic is not None:
            found = class_for(config, loader, self.generic)
        else:
            found = loader if known else None
        writes = way_of_writing(config)
        if not self.fresh and (writes not in self.takes or not known):
            what, instead = REFUSED[writes]
            raise IngraftError(
                f"{name}: a {kind} model {what}, so the task {task!r} is not for it; use --task {instead}, or another base."
            )
        if found is None:
            raise IngraftError(f"{name}: transformers has no {self.what} for a {kind} model; use another base.")
        return found

    def prepare(
        self,
        config: Any,
        labels: list[str] | None = None,
        num_labels: int | None = None,
        scale: tuple[float, float] | None = None,
    ) -> None:
        """Tell a base's config what the outputs are.

        Args:
            labels: what they are called. num_labels: how many they are, where they have no names yet.
            scale: mean and standard deviation of the one output, a number; see `scale_of`.
        """
        if self.outputs is not None:
            config.num_labels = self.outputs
        if self.problem is not None:
            config.problem_type = self.problem
        if self.named and labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        elif self.named and num_labels is not None:
            config.num_labels = num_labels
        elif self.problem == "regression":
            config.num_labels = 1
            config.label_mean, config.label_std = scale if scale is not None else (0.0, 1.0)


def way_of_writing(config: Any) -> str | None:
    """How a base writes: `alone`, or a decoder behind an encoder (`pair`); None if it does not."""
    from transformers.models.auto import modeling_auto as tables

    if getattr(config, "is_encoder_decoder", False):
        return PAIR
    encoder = config.model_type in tables.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    known = config.model_type in tables.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")
    return None if encoder or not known else ALONE


def scale_of(model: nn.Module) -> tuple[float, float]:
    """What a model that puts out a number means by 0 and by the step to 1: mean and standard deviation of the labels that it learned from.

    The model itself works on that scale, for reasons that `docs/decisions.md` tells; its config keeps it (`label_mean`, `label_std`). A model of another
    make means its numbers as they are.
    """
    config = cast(Any, model).config
    return float(getattr(config, "label_mean", 0.0)), float(getattr(config, "label_std", 1.0))


WRITER = Head(
    loader="AutoModelForCausalLM",
    families="MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    what="language model",
    fresh=False,
    takes=(ALONE,),
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
    "seq2seq": Head(
        loader="AutoModelForSeq2SeqLM",
        families="MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
        what="decoder behind an encoder",
        fresh=False,
        takes=(PAIR,),
    ),
    "classify": CLASSIFIER,
    "image-classify": Head(
        loader="AutoModelForImageClassification",
        families="MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        what="image classifier",
        reads=IMAGES,
        named=True,
    ),
    "multi-label": replace(CLASSIFIER, problem="multi_label_classification"),
    "regress": replace(CLASSIFIER, named=False, problem="regression"),
    "tag": Head(
        loader="AutoModelForTokenClassification",
        families="MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
        what="token classifier",
        generic="GenericForTokenClassification",
        named=True,
    ),
    "qa": Head(
        loader="AutoModelForQuestionAnswering",
        families="MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
        what="head for finding answers",
        generic="GenericForQuestionAnswering",
    ),
    "embed": Head(
        loader="AutoModel",
        families="MODEL_MAPPING_NAMES",
        what="encoder",
        fresh=False,
        takes=(ALONE, None),
        unused=("pooler",),
    ),
    "reward": NUMBER,
    "dpo": WRITER,
    "ipo": WRITER,
    "kto": WRITER,
    "ppo": WRITER,
    "grpo": WRITER,
}
"""The head of each task."""


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """The parts of a model that lie beside its base and have parameters: the head, which must be trained whatever the method."""
    prefix = getattr(model, "base_model_prefix", "")
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )
