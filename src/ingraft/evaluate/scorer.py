"""What is asked of a model in a task, apart from learning: its metrics, its answer to a row for people, and predictions for rows without an answer.

One class a task, named in `SCORERS`. A verb, a report or the training loop asks the class and never the task's name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import Tensor

from ingraft import adapt
from ingraft.data import pad_id
from ingraft.data.dataset import Part
from ingraft.data.examples import Example, Tally
from ingraft.data.tasks import Settings, task_of
from ingraft.errors import IngraftError, nearest
from ingraft.evaluate.files import of_files
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.measures import require
from ingraft.evaluate.outcomes import Outcomes
from ingraft.evaluate.room import hold, room
from ingraft.recipe import Losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.bases.reading import Reader
    from ingraft.data.dataset import DataSet
    from ingraft.data.rows import Row
    from ingraft.evaluate.rewards import Rewards

SCORERS: Mapping[str, str] = {
    "sft": "writing:SftScorer",
    "lm": "writing:LmScorer",
    "seq2seq": "seq2seq:Seq2SeqScorer",
    "classify": "classes:ClassifyScorer",
    "image-classify": "classes:ImageClassifyScorer",
    "multi-label": "multi_label:MultiLabelScorer",
    "regress": "regress:RegressScorer",
    "tag": "tags:TagScorer",
    "qa": "spans:QaScorer",
    "embed": "embed:EmbedScorer",
    "reward": "preferring:RewardScorer",
    "dpo": "preferring:DpoScorer",
    "ipo": "preferring:IpoScorer",
    "kto": "preferring:KtoScorer",
    "ppo": "earning:PpoScorer",
    "grpo": "earning:GrpoScorer",
}
"""Task -> module and class."""

LOWER = frozenset({"loss", "perplexity", "mse", "mae", "brier", "calibration_error"})
"""The metrics of which less is better."""

# Abraham Lincoln's address at Gettysburg, 1863: public domain.
TEXT = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to the "
    "proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, or any nation so "
    "conceived and so dedicated, can long endure. We are met on a great battle-field of that war. We have come to dedicate a portion of "
    "that field, as a final resting place for those who here gave their lives that that nation might live."
)

Done = Callable[[int, dict[str, Any]], None]
"""Told of every row as soon as it is answered: its position, and the fields it gets."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """How rows without an answer are to be answered.

    Attributes:
        form: of the rows, or `auto`.
        max_length: longest sequence in tokens. stride: what windows of a long context share. batch_size: rows in a forward pass.
        truncation: what is left of longer rows. max_new_tokens: longest answer, where one is written.
        say: told what may surprise.
    """

    form: str = "auto"
    max_length: int = 512
    stride: int = 128
    truncation: str = "keep_answer"
    batch_size: int = 8
    max_new_tokens: int = 128
    say: Callable[[str], None] = lambda text: None


class Scorer(ABC):
    """Asks a model, as it stands, with whatever adapters act. Abstract.

    Attributes:
        notes: what was done and may surprise, after `outcomes`.
        task: its name.
        headline: the metric that a report shows first, where it was measured.
        cheap: the metrics that an evaluation has even if it is not whole.
        adds: the fields that a predicted row gets.
        needs: what its metrics are computed with, as it is imported; see `measures.PACKAGES`.
        writes: whether the model answers in text, so that one can talk to it.
        rewarded: whether answers earn something here, so that it has to be told what.
        prompted: the task for which a base that writes can be asked for the same in words (`evaluate.shots`); None where it cannot.
    """

    task: ClassVar[str]
    headline: ClassVar[str] = "accuracy"
    cheap: ClassVar[tuple[str, ...]] = ("loss",)
    adds: ClassVar[tuple[str, ...]] = ("prediction",)
    needs: ClassVar[tuple[str, ...]] = ()
    writes: ClassVar[bool] = False
    rewarded: ClassVar[bool] = False
    prompted: ClassVar[str | None] = None

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Reader,
        labels: Sequence[str] | None = None,
        losses: Losses | None = None,
        rewards: Rewards | None = None,
    ) -> None:
        """Args:
        tokenizer: what the base reads the task's rows with.
        labels: what the outputs are called, in their order; None where they have no names.
        losses: settings that only some tasks have; None for the usual ones.
        rewards: what answers earn, for a task that is `rewarded`.
        """
        self.losses = losses or Losses()
        self.model, self.reader, self.pad_id = model, tokenizer, pad_id(tokenizer)
        self.labels: tuple[str, ...] = tuple(labels) if labels is not None else ()
        self.rewards = rewards
        self.notes: list[str] = []

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reader of a task on text."""
        return cast("PreTrainedTokenizerBase", self.reader)

    @abstractmethod
    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> Outcomes:
        """What the model does with a part that has rows: all that its metrics are computed from.

        Args:
            whole: for every metric of the task; False leaves out what takes further passes over the rows.
            poll: called between batches; may raise to stop.
        """

    def evaluate(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> dict[str, float]:
        """The metrics of these outcomes, by name, and ends of intervals that cost nothing."""
        found = self.outcomes(data, part, batch_size, whole=whole, poll=poll)
        return found.metrics() | found.bounds()

    def before(self) -> AbstractContextManager[None]:
        """Inside it the model is what training is compared with: the base alone."""
        return adapt.disabled(self.model)

    @abstractmethod
    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        """What rows ask (`prompt`) and what answer they have (`expected`), as a person wrote them.

        Args:
            examples: of the part, one for each row that is wanted.
        """

    @abstractmethod
    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        """What the model says to the rows of these examples, for people."""

    @abstractmethod
    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        """Answer every row; what stands in the place of an answer is not looked at.

        Raises:
            IngraftError: rows that cannot be used, by file and line.
        """

    def trial(self) -> dict[str, Tensor]:
        """The model's inputs of one row that no adapter was trained on, to compare two models on where no data are named."""
        ids = self.tokenizer(TEXT, truncation=True, max_length=min(self.tokenizer.model_max_length, room(self.model)))
        return {"input_ids": torch.tensor([ids["input_ids"]])}

    def encoded(self, rows: Sequence[Row], asked: Asked) -> Part:
        """Rows to be answered, as examples of this task; the tokenizer then declares no more than the model has room for.

        Raises:
            IngraftError: rows that cannot be used, by file and line.
        """
        hold(self.reader, self.model)
        task, tally = task_of(self.task), Tally()
        longest = min(asked.max_length, self.reader.model_max_length)
        how = Settings(
            reader=self.reader,
            max_length=longest,
            labels=self.labels,
            stride=asked.stride,
            truncation=asked.truncation,
        )
        records = task.read(task.filled(rows, self.labels), asked.form)[1]
        examples = task.encode(records, rows, how, tally)
        if tally.cut:
            asked.say(f"note: {tally.cut} rows were cut at {longest} tokens")
        return Part(rows=list(rows), records=records, examples=examples)


def scorer_of(task: str) -> type[Scorer]:
    """The scorer of a task.

    Raises:
        IngraftError: the task has none.
    """
    if task not in SCORERS:
        raise IngraftError(
            f"task: {task!r} has no evaluation yet{nearest(task, SCORERS)}; today {', '.join(SCORERS)} have one."
        )
    module, name = SCORERS[task].split(":")
    return getattr(import_module(f"ingraft.evaluate.{module}"), name)


def evaluate(
    model: PreTrainedModel,
    tokenizer: Reader,
    data: DataSet,
    part: str = "eval",
    *,
    batch_size: int = 8,
    poll: Poll | None = None,
    losses: Losses | None = None,
    rewards: Rewards | None = None,
) -> dict[str, float]:
    """Every metric of a part of the data, by name, for the task that it was read for.

    Args:
        losses: settings that only some tasks have.
        rewards: what answers earn.

    Raises:
        IngraftError: there are no rows in it, or the task has no evaluation.
    """
    scorer = ready(model, tokenizer, data, part, losses, rewards)
    found = scorer.evaluate(data, part, batch_size, poll=poll)
    return found | of_files(scorer, data, part, batch_size, poll=poll)


def ready(
    model: PreTrainedModel,
    tokenizer: Reader,
    data: DataSet,
    part: str,
    losses: Losses | None = None,
    rewards: Rewards | None = None,
) -> Scorer:
    """The scorer of a part of the data, for the task that it was read for; as `evaluate`.

    Raises:
        IngraftError: there are no rows in it, or the task has no evaluation, or what its metrics are computed with is not installed.
    """
    if part not in data.parts or not data.parts[part].examples:
        raise IngraftError("There are no rows to evaluate on.")
    kind = scorer_of(data.report.task)
    require(kind.task, kind.needs)
    return kind(model, tokenizer, data.labels, losses, rewards)
