"""Evaluations in the course of a run: every adapter's metrics, the best so far, and what is answered to the rows that are shown."""

from __future__ import annotations

from ingraft import adapt
from ingraft.evaluate.files import of_files, plain_name
from ingraft.evaluate.scorer import LOWER
from ingraft.train.session import Progress, Session

SHOWN = 70
"""Characters of a prompt and of an answer that a person is told of during training; log and report have them whole."""


def evaluate(session: Session, progress: Progress) -> None:
    """Score every adapter on the evaluation rows, log it, and note the best.

    Raises:
        Stopped: a signal came; the evaluation counts as not made.
    """
    recipe, scorer = session.recipe, session.scorer
    whole = plain_name(session.metric) not in scorer.cheap
    results: list[dict[str, float]] = []
    judged = [learner for learner in session.learners if not learner.aide]
    for learner in judged:
        if len(judged) > 1:
            adapt.activate(session.model, learner.name)
        size, poll = recipe.per_device_eval_batch_size, session.stop.check
        found = scorer.evaluate(session.data, "eval", size, whole=whole, poll=poll)
        results.append(found | of_files(scorer, session.data, "eval", size, whole=whole, poll=poll))
    told = _answered(session)  # nothing below may be cut short: what is considered is considered once
    lower = plain_name(session.metric) in LOWER
    for learner, metrics in zip(judged, results, strict=True):
        best = learner.consider(metrics[session.metric], progress.step, lower=lower, keep=recipe.load_best_model_at_end)
        named = {f"eval_{name}": value for name, value in metrics.items()}
        extra = {"adapter": learner.name} if len(judged) > 1 else {}
        session.journal.write(
            step=progress.step, epoch=round(progress.step / session.plan.steps_per_epoch, 4), **named, **extra
        )
        shown = "  ".join(f"{name} {value:.4f}" for name, value in named.items())
        session.journal.say(f"step {progress.step}/{session.plan.total}  {shown}{'  (best)' if best else ''}")
    if told:
        session.journal.write(step=progress.step, samples=told)
    for sample in told:
        session.journal.say(f"step {progress.step}  {_short(sample['prompt'])}  ->  {_short(sample['answer'])}")
    progress.evaluated = progress.step
    patience = recipe.early_stopping_patience
    if patience is not None and all(learner.waited >= patience for learner in judged):
        progress.early = True
        session.journal.say(f"Stopped early: no better {session.metric} in {patience} evaluations.")


def _answered(session: Session) -> list[dict[str, str]]:
    """The rows that are shown, with what the first adapter, which acts, answers."""
    name, examples = session.shown
    if not examples:
        return []
    part = session.data.parts[name]
    answers = session.scorer.answers(part, examples, session.stop.check)
    return [
        {"prompt": question["prompt"], "expected": question["expected"], "answer": answer}
        for question, answer in zip(session.scorer.questions(part, examples), answers, strict=True)
    ]


def _short(text: str) -> str:
    """A text in one line of a screen."""
    line = " ".join(text.split())
    return line if len(line) <= SHOWN else line[: SHOWN - 1] + "…"
