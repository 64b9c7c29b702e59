"""The one set of numbers for a task, as logs, `metrics.json` and `ingraft eval` show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.evaluate.choices import ChoiceRow, ChoiceScores, score_along
from ingraft.evaluate.classes import ClassScores, score_classes
from ingraft.evaluate.loss import LossScores, Poll, score_loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of one part of the data.

    Attributes:
        metrics: by name; `loss` always (nats), `perplexity` for language models, `accuracy` and `macro_f1` where there are classes.
        losses, classes, choices: what they were computed from, row by row; None where the task has no such thing.
    """

    metrics: dict[str, float]
    losses: LossScores | None = None
    classes: ClassScores | None = None
    choices: ChoiceScores | None = None


def evaluate(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    task: str,
    pad_id: int,
    batch_size: int = 8,
    choices: Sequence[ChoiceRow] = (),
    poll: Poll | None = None,
) -> Evaluation:
    """Score a model as it stands, with whatever adapters act.

    Args:
        examples: encoded rows, of the task's kind.
        task: sft, lm or classify.
        pad_id: what to fill short rows with.
        choices: for sft, the same rows as choices between label words; adds accuracy.
        poll: called between batches; may raise to stop.

    Raises:
        IngraftError: no rows, or a task without an evaluation.
    """
    if not examples:
        raise IngraftError("There are no rows to evaluate on.")
    if task == "classify":
        classes = score_classes(model, examples, pad_id, batch_size, poll)
        metrics = {"loss": classes.loss, "accuracy": classes.accuracy, "macro_f1": classes.macro_f1}
        return Evaluation(metrics=metrics, classes=classes)
    if task not in ("sft", "lm"):
        raise IngraftError(f"task: {task!r} has no evaluation yet; today sft, lm and classify have one.")
    scores = None
    if choices:
        losses, scores = score_along(model, examples, choices, pad_id, batch_size, poll)
    else:
        losses = score_loss(model, examples, pad_id, batch_size, poll)
    metrics = {"loss": losses.loss, "perplexity": losses.perplexity}
    if scores is not None:
        metrics |= {"accuracy": scores.accuracy, "macro_f1": scores.macro_f1}
    return Evaluation(metrics=metrics, losses=losses, choices=scores)
