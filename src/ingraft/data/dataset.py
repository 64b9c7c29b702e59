"""The one way from paths to encoded data, for `train`, `eval` and `data` alike, so that all three see the same rows.

It takes plain arguments and no recipe: data does not know where its settings came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ingraft.data.chat import name_of
from ingraft.data.examples import Example, Tally
from ingraft.data.readers import read_rows
from ingraft.data.records import Record, given
from ingraft.data.report import UNKNOWN_LIMIT, DataReport, part_report
from ingraft.data.rows import Row
from ingraft.data.splits import Eval, choose, evaluation_size
from ingraft.data.tasks import Settings, task_of
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows and what became of them; `rows[example.row_id]` is an example's row, unless the task's examples are `blocks`."""

    rows: list[Row]
    records: list[Record]
    examples: list[Example]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Encoded data.

    Attributes:
        train, eval, test: the examples; empty where there is no such part.
        labels: what the head's outputs are called, in their order; None where they have no names.
        scale: mean and standard deviation of the training labels, where they are numbers.
        report: what was counted on the way.
        parts: rows and records behind the examples, by part name (train, eval, test).
    """

    train: list[Example]
    eval: list[Example]
    test: list[Example]
    labels: tuple[str, ...] | None
    scale: tuple[float, float] | None
    report: DataReport
    parts: Mapping[str, Part]


def load(
    train: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "sft",
    eval: Eval = None,
    test: str | None = None,
    form: str = "auto",
    max_length: int = 512,
    learn: str = "answer",
    chat: bool | None = None,
    seed: int = 42,
    labels: Sequence[str] | None = None,
    scale: tuple[float, float] | None = None,
    stride: int = 128,
) -> DataSet:
    """Read, split, check and encode a data set.

    Args:
        train: file, `datasets` folder or hub id with the rows to train on (for an evaluation alone: the rows to
            evaluate on).
        tokenizer: the base's.
        task: a name of `data.tasks.TASKS`.
        eval: share, number of rows, or another file; see `split`.
        test: a file of rows that neither training nor the choice of a checkpoint ever sees.
        form: a format's name or `auto`; it holds for all files.
        max_length: longest sequence in tokens; lowered to what the tokenizer says the base can read.
        learn: for sft, `answer` or `all`.
        chat: for sft, whether bare prompt and completion rows become a conversation; None does so when the tokenizer
            has a template.
        seed: of the split.
        labels: what the outputs of a model that is already trained are called; None takes them from the training rows.
        scale: mean and standard deviation of the labels that a model was trained on; None takes them from the training rows.
        stride: for qa, tokens that neighbouring windows of a long context share.

    Raises:
        IngraftError: everything that `read_rows`, `split` and the encoders refuse; a task that cannot use these rows;
            more than 5 % unknown tokens.
    """
    wanted = task_of(task)
    if max_length < 2:
        raise IngraftError(f"data.max_length must be at least 2, not {max_length}.")
    files = {"train": read_rows(train)}
    chosen, records = wanted.read(files["train"], form)
    read: dict[str, tuple[list[Row], list[Record]]] = {"train": (files["train"], records)}
    aside = evaluation_size(eval, len(records))
    if isinstance(aside, str):
        rows = read_rows(aside)
        read["eval"] = (rows, wanted.read(rows, form)[1])
    elif aside:
        taken = choose(records, aside, seed)
        kept = [i for i in range(len(records)) if i not in taken]
        for name, positions in (("train", kept), ("eval", sorted(taken))):
            read[name] = ([files["train"][i] for i in positions], [records[i] for i in positions])
    if test is not None:
        rows = read_rows(test)
        read["test"] = (rows, wanted.read(rows, form)[1])

    notes: list[str] = []
    if tokenizer.model_max_length < max_length:
        notes.append(
            f"max_length lowered from {max_length} to {tokenizer.model_max_length}, the most that this base reads"
        )
        max_length = tokenizer.model_max_length
    names: tuple[str, ...] = ()
    if wanted.labels is not None:
        names = tuple(labels) if labels is not None else wanted.labels(records)
        if len(names) < 2:
            raise IngraftError(
                f"{train}: all rows have the one label '{names[0] if names else ''}'; there is nothing to tell apart."
            )
    how = Settings(tokenizer=tokenizer, max_length=max_length, labels=names, learn=learn, chat=chat, stride=stride)
    if wanted.scale is not None and scale is None:
        scale = wanted.scale(records)
    if wanted.notes is not None:
        notes += wanted.notes(chosen, how)

    parts: dict[str, Part] = {}
    reports = []
    for name, (rows, part_records) in read.items():
        tally = Tally()
        examples = wanted.encode(part_records, rows, how, tally)
        parts[name] = Part(rows=rows, records=part_records, examples=examples)
        reports.append(part_report(name, rows, part_records, examples, tally, wanted))
    _refuse_unknown([(report.source, report.unknown_share) for report in reports], tokenizer)
    seen = {given(record) for record in parts["train"].records}
    report = DataReport(
        format=chosen.name,
        task=task,
        max_length=max_length,
        parts=tuple(reports),
        shared=sum(given(r) in seen for name in parts if name != "train" for r in parts[name].records)
        if chosen.name != "lines"
        else 0,
        notes=tuple(notes),
    )
    return DataSet(
        train=parts["train"].examples,
        eval=parts["eval"].examples if "eval" in parts else [],
        test=parts["test"].examples if "test" in parts else [],
        labels=names or None,
        scale=scale if wanted.scale is not None else None,
        report=report,
        parts=parts,
    )


def _refuse_unknown(shares: Sequence[tuple[str, float]], tokenizer: PreTrainedTokenizerBase) -> None:
    worst: dict[str, float] = {}
    for source, share in shares:  # one line a file, also where it was split
        worst[source] = max(share, worst.get(source, 0.0))
    problems = [
        f"{source}: {share:.0%} of the tokens are unknown to the tokenizer of {name_of(tokenizer)} "
        f"(limit {UNKNOWN_LIMIT:.0%}): it does not know this language or script. Use a base that does (a multilingual one)."
        for source, share in worst.items()
        if share > UNKNOWN_LIMIT
    ]
    if problems:
        raise IngraftError(*problems)
