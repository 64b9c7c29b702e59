"""The one way from paths to encoded data, for `train`, `eval` and `data` alike, so that all three see the same rows.

It takes plain arguments and no recipe: data does not know where its settings came from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import name_of
from ingraft.data.examples import Example, Tally
from ingraft.data.formats import Format
from ingraft.data.mixing import Mixture, Origin, Part, joined, short_names
from ingraft.data.readers import read_rows
from ingraft.data.records import Record
from ingraft.data.repeats import leaks_of
from ingraft.data.report import UNKNOWN_LIMIT, DataReport, PartReport, report_of_files, shares_of
from ingraft.data.rows import Row, refuse
from ingraft.data.splits import Eval, choose, evaluation_size
from ingraft.data.tasks import Settings, Task, task_of
from ingraft.errors import IngraftError
from ingraft.recipe import Source, sources_of

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSet:
    """Encoded data.

    Attributes:
        train, eval, test: the examples; empty where there is no such part.
        labels: what the head's outputs are called, in their order; None where they have no names.
        scale: mean and standard deviation of the training labels, where they are numbers.
        report: what was counted on the way.
        parts: rows and records behind the examples, by part name (train, eval, test).
        mixture: which training examples each epoch is made of.
    """

    train: list[Example]
    eval: list[Example]
    test: list[Example]
    labels: tuple[str, ...] | None
    scale: tuple[float, float] | None
    report: DataReport
    parts: Mapping[str, Part]
    mixture: Mixture

    def of(self, part: str, origin: Origin) -> DataSet:
        """The data as one file of a part knows them: that part holds its rows alone, and so do the other parts where the file has some there."""
        parts = dict(self.parts)
        for name, whole in self.parts.items():
            own = [each for each in whole.origins if each.name == origin.name] if name != part else [origin]
            if own:
                parts[name] = whole.of(own[0])
        examples = {name: each.examples for name, each in parts.items()}
        return replace(
            self, train=examples["train"], eval=examples.get("eval", []), test=examples.get("test", []), parts=parts
        )


def load(
    train: str | Sequence[Source],
    tokenizer: Reader,
    *,
    task: str = "sft",
    eval: Eval | Sequence[Source] = None,
    test: str | Sequence[Source] | None = None,
    form: str = "auto",
    max_length: int = 512,
    learn: str = "answer",
    chat: bool | None = None,
    seed: int = 42,
    labels: Sequence[str] | None = None,
    scale: tuple[float, float] | None = None,
    stride: int = 128,
    truncation: str = "keep_answer",
) -> DataSet:
    """Read, split, check and encode a data set.

    Args:
        train: file, `datasets` folder or hub id with the rows to train on (for an evaluation alone: the rows to
            evaluate on); or several.
        tokenizer: what the base reads the task's rows with (`bases.load_reader`): its tokenizer, or its image processor.
        task: a name of `data.tasks.TASKS`.
        eval: share, number of rows, or other files; see `split`.
        test: files of rows that neither training nor the choice of a checkpoint ever sees.
        form: a format's name or `auto`; it holds for all files that have no format of their own.
        max_length: longest sequence in tokens; lowered to what the tokenizer says the base can read.
        learn: for sft, `answer` or `all`.
        chat: for sft, whether bare prompt and completion rows become a conversation; None does so when the tokenizer
            has a template.
        seed: of the split, and of what an epoch takes of weighted files.
        labels: what the outputs of a model that is already trained are called; None takes them from the training rows.
        scale: mean and standard deviation of the labels that a model was trained on; None takes them from the training rows.
        stride: for qa, tokens that neighbouring windows of a long context share.
        truncation: what is left of rows that are longer than `max_length`, see `cutting`.

    Raises:
        IngraftError: everything that `read_rows`, `split` and the encoders refuse; a task that cannot use these rows;
            more than 5 % unknown tokens.
    """
    wanted = task_of(task)
    if max_length < 2:
        raise IngraftError(f"data.max_length must be at least 2, not {max_length}.")
    if truncation not in (*wanted.cuts, "keep_answer", "drop", "refuse"):
        ways = f"it cuts by {', '.join(wanted.cuts)}" if wanted.cuts else "it cuts no rows"
        raise IngraftError(f"data.truncation: {truncation!r} is not for task {task!r}: {ways}; leave it out.")
    read = {"train": _read(train, wanted, form)}
    aside = eval if isinstance(eval, Sequence) and not isinstance(eval, str) else None
    if aside is None:
        number = evaluation_size(cast("Eval", eval), sum(len(file.records) for file in read["train"]))
        if isinstance(number, str):
            aside = number
        elif number:
            read["train"], read["eval"] = _split(read["train"], number, seed)
    if aside is not None:
        read["eval"] = _read(aside, wanted, form)
    if test is not None:
        read["test"] = _read(test, wanted, form)

    notes: list[str] = []
    if tokenizer.model_max_length < max_length:
        notes.append(
            f"max_length lowered from {max_length} to {tokenizer.model_max_length}, the most that this base reads"
        )
        max_length = tokenizer.model_max_length
    records = [record for file in read["train"] for record in file.records]
    names: tuple[str, ...] = ()
    if wanted.labels is not None:
        names = tuple(labels) if labels is not None else wanted.labels(records)
        if len(names) < 2:
            files = ", ".join(file.source.file for file in read["train"])
            raise IngraftError(
                f"{files}: all rows have the one label '{names[0] if names else ''}'; there is nothing to tell apart."
            )
    how = Settings(
        reader=tokenizer,
        max_length=max_length,
        labels=names,
        learn=learn,
        chat=chat,
        stride=stride,
        truncation=truncation,
    )
    if wanted.scale is not None and scale is None:
        scale = wanted.scale(records)
    forms = list({file.form.name: file.form for file in read["train"]}.values())
    if wanted.notes is not None:
        notes += dict.fromkeys(note for each in forms for note in wanted.notes(each, how))

    parts: dict[str, Part] = {}
    reports: list[PartReport] = []
    for name, files in read.items():
        encoded = [_encoded(file, wanted, how) for file in files]
        parts[name] = joined([part for part, _ in encoded], blocks=wanted.blocks)
        reports.append(report_of_files(name, encoded, parts[name], wanted))
    _refuse_unknown(
        [(file.source, file.unknown_share) for report in reports for file in report.files or (report,)], tokenizer
    )
    mixture = Mixture(parts["train"].origins, seed)
    behind = parts["train"].rows, parts["train"].records
    leaks = {name: leaks_of(part.rows, part.records, behind) for name, part in parts.items() if name != "train"}
    report = DataReport(
        format=", ".join(each.name for each in forms),
        task=task,
        max_length=max_length,
        parts=tuple(reports),
        shares=shares_of(parts["train"], mixture),
        shared=sum(each.same.count for each in leaks.values()),
        leaks=leaks,
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
        mixture=mixture,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _File:
    """A file as it was read, or what a split has left of it."""

    source: Source
    name: str
    form: Format
    rows: list[Row]
    records: list[Record]

    def only(self, positions: Sequence[int]) -> _File:
        return replace(self, rows=[self.rows[i] for i in positions], records=[self.records[i] for i in positions])


def _read(files: str | Sequence[Source], task: Task, form: str) -> list[_File]:
    """Files with what their rows mean to a task.

    Raises:
        IngraftError: what is wrong with any of them.
    """
    sources = sources_of(files if isinstance(files, str) else list(files))
    found: list[_File] = []
    problems: list[str] = []
    for source, name in zip(sources, short_names([source.file for source in sources]), strict=True):
        try:
            rows = read_rows(source.file)
            chosen, records = task.read(rows, source.format or form)
        except IngraftError as error:
            problems += error.problems
        else:
            found.append(_File(source=source, name=name, form=chosen, rows=rows, records=records))
    if problems:
        raise IngraftError(*problems)
    return found


def _split(files: Sequence[_File], number: int, seed: int) -> tuple[list[_File], list[_File]]:
    """What is left of the files, and what is set aside of them; without files of which nothing is."""
    owners = [owner for owner, file in enumerate(files) for _ in file.records]
    taken = choose([record for file in files for record in file.records], number, seed, owners)
    kept, aside = list[_File](), list[_File]()
    start = 0
    for file in files:
        chosen = [i in taken for i in range(start, start + len(file.records))]
        kept.append(file.only([i for i, out in enumerate(chosen) if not out]))
        aside.append(file.only([i for i, out in enumerate(chosen) if out]))
        start += len(file.records)
    return [file for file in kept if file.rows], [file for file in aside if file.rows]


def _encoded(file: _File, task: Task, how: Settings) -> tuple[Part, Tally]:
    """A file's rows as examples, and what was counted on the way."""
    tally = Tally()
    examples = task.encode(file.records, file.rows, how, tally)
    if how.truncation == "refuse" and (
        long := [*dict.fromkeys([*(file.rows[n].place for n in tally.shortened), *tally.dropped])]
    ):
        refuse(
            long,
            summary=f"{len(long)} of {len(file.rows)} rows are longer than max_length {how.max_length}, and data.truncation is refuse:",
        )
    if how.truncation == "drop" and tally.shortened:
        out = set(tally.shortened)
        tally.long, tally.shortened, tally.lost = [file.rows[n].place for n in tally.shortened], [], []
        tally.dropped = [place for place in tally.dropped if place not in set(tally.long)]
        examples = [example for example in examples if example.row_id not in out]
        if not examples:
            raise IngraftError(
                f"{file.source.file}: all {len(file.rows)} rows are longer than max_length {how.max_length}, and data.truncation is drop. Raise "
                "data.max_length."
            )
    origin = Origin(
        name=file.name,
        file=file.source.file,
        rows=range(len(file.rows)),
        examples=range(len(examples)),
        shift=0,
        weight=file.source.weight,
    )
    return Part(rows=file.rows, records=file.records, examples=examples, origins=(origin,)), tally


def _refuse_unknown(shares: Sequence[tuple[str, float]], tokenizer: Reader) -> None:
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
