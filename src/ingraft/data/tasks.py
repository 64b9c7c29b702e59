"""What each task learns from, one declaration a task: which records, how they become examples, what the model's outputs are called.

Whoever reads rows for a task asks its declaration and never its name, so a new task is an entry here and an encoder in a file of its own.
The other layers have a table each under the same names: `bases.heads`, `evaluate.SCORERS`, `train.objectives.OBJECTIVES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from ingraft.data.chat import has_template, name_of
from ingraft.data.examples import Example, Tally, as_chat, encode_chats, encode_documents
from ingraft.data.fields import Format, Values
from ingraft.data.formats import ROLES, read_records
from ingraft.data.labelled import (
    about_numbers,
    about_several,
    encode_labelled,
    encode_measured,
    encode_multilabelled,
    label_names,
    scale_of,
    several_names,
)
from ingraft.data.matched import about_related, encode_related, spread_of
from ingraft.data.pictured import about_pictures, encode_pictured, sketch
from ingraft.data.preferences import answers_of, encode_judged, encode_preferences
from ingraft.data.prompts import encode_prompts, with_answer
from ingraft.data.records import (
    Chat,
    Document,
    Judged,
    Labelled,
    Measured,
    Multilabelled,
    Pictured,
    Preference,
    Ranking,
    Record,
    Related,
    Span,
    Tagged,
)
from ingraft.data.rows import Row
from ingraft.data.seq2seq import encode_pairs
from ingraft.data.spans import encode_spans
from ingraft.data.tagged import OUTSIDE, about_tags, encode_tagged, tag_names
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.bases.images import ImageReader
    from ingraft.bases.reading import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How records become examples.

    Attributes:
        reader: what the base reads rows with: a tokenizer or an image processor, as the task needs it.
        max_length: longest sequence in tokens.
        labels: what the model's outputs are called, in their order; empty for a task without such names.
        learn: for sft, `answer` or `all`.
        chat: for sft, whether bare prompt and completion rows become a conversation; None does so when the tokenizer has a template.
        stride: for qa, tokens that neighbouring windows of a long context share.
        truncation: what is left of rows that are longer, see `cutting`.
    """

    reader: Reader
    max_length: int
    labels: tuple[str, ...] = ()
    learn: str = "answer"
    chat: bool | None = None
    stride: int = 128
    truncation: str = "keep_answer"

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The reader of a task on text."""
        return cast("PreTrainedTokenizerBase", self.reader)


Encode = Callable[[Sequence[Any], Sequence[Row], Settings, Tally], list[Example]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A task, as the data see it.

    Attributes:
        name: the recipe's.
        records: which kinds of record it can learn from.
        rows: how a message calls such rows.
        encode: records and the rows they come from, as examples.
        blocks: whether examples are blocks of a running text, so that their `row_id` counts blocks and not rows.
        labels: what the outputs are called, from the training records; None where outputs have no names.
        scale: mean and standard deviation of what the output is, from the training records; None where it is no number.
        classes: the classes of a record, whose balance is reported; None where it has none.
        about: lines for a report on the records of a part.
        reads: forms of row whose fields mean something else to this task, and the form that reads them so.
        told: what a row teaches beside the tokens that are marked as learned; None where those are all.
        unanswered: the fields of a row that may lack its answer, with a stand-in for the answer (`labels` are the model's).
        cuts: the ways of cutting a row between which it makes a difference, of those that keep part of it.
        asks: whether rows are only asked, so that they may lack their answer in training too.
        notes: what is decided about a set of rows and may surprise.
        counted: what a report calls examples, and what goes through the model.
        sketch: what the model sees of an example, for people, where that is no tokens.
    """

    name: str
    records: tuple[type[Record], ...]
    rows: str
    encode: Encode
    blocks: bool = False
    labels: Callable[[Sequence[Record]], tuple[str, ...]] | None = None
    scale: Callable[[Sequence[Record]], tuple[float, float]] | None = None
    classes: Callable[[Any], Sequence[str]] | None = None
    about: Callable[[Sequence[Any]], list[str]] | None = None
    reads: Mapping[str, str] = field(default_factory=dict[str, str])
    told: Callable[[Any], str] | None = None
    unanswered: Callable[[Row, Sequence[str]], Values]
    cuts: tuple[str, ...] = ()
    asks: bool = False
    notes: Callable[[Format, Settings], list[str]] | None = None
    counted: tuple[str, str] = ("sequences", "tokens")
    sketch: Callable[[Example], str] | None = None

    def read(self, rows: Sequence[Row], form: str = "auto") -> tuple[Format, list[Record]]:
        """The form of the rows and what they mean.

        Raises:
            IngraftError: as `read_records`, or this task cannot learn from such rows.
        """
        chosen, records = read_records(self.filled(rows) if self.asks else rows, form, self.reads)
        if chosen.meaning not in self.records:
            fitting = [name for name, other in TASKS.items() if chosen.meaning in other.records]
            ways = " or ".join(f"`--task {name}`" for name in fitting)
            hint = f" These rows fit {ways}." if fitting else " The task for such rows comes later."
            raise IngraftError(
                f"{rows[0].file}: task {self.name} needs {self.rows}; these are {chosen.name} rows.{hint}"
            )
        return chosen, records

    def filled(self, rows: Sequence[Row], labels: Sequence[str] = ()) -> list[Row]:
        """The rows with a stand-in where an answer belongs, so that rows without one can be read."""
        return [
            Row(values=self.unanswered(row, labels), file=row.file, line=row.line, reader=row.reader) for row in rows
        ]


def task_of(name: str) -> Task:
    """The declaration of a task.

    Raises:
        IngraftError: there is none of this name.
    """
    if name not in TASKS:
        raise IngraftError(f"No data is prepared for task '{name}'{nearest(name, TASKS)}. Now: {', '.join(TASKS)}.")
    return TASKS[name]


def _sft(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    chats = [as_chat(record) for record in records]
    return encode_chats(
        chats,
        rows,
        how.tokenizer,
        how.max_length,
        learn=how.learn,
        chat=how.chat,
        truncation=how.truncation,
        tally=tally,
    )


def _seq2seq(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    chats = [as_chat(record) for record in records]
    return encode_pairs(chats, rows, how.tokenizer, how.max_length, how.truncation, tally=tally)


def _lm(records: Sequence[Document], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_documents(records, rows, how.tokenizer, how.max_length, tally=tally)


def _classify(records: Sequence[Labelled], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_labelled(records, rows, how.tokenizer, how.labels, how.max_length, how.truncation, tally=tally)


def _image_classify(records: Sequence[Pictured], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_pictured(records, rows, cast("ImageReader", how.reader), how.labels, tally=tally)


def _regress(records: Sequence[Measured], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    del rows
    return encode_measured(records, how.tokenizer, how.max_length, how.truncation, tally=tally)


def _multi_label(records: Sequence[Multilabelled], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_multilabelled(records, rows, how.tokenizer, how.labels, how.max_length, how.truncation, tally=tally)


def _tag(records: Sequence[Tagged], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_tagged(records, rows, how.tokenizer, how.labels, how.max_length, tally=tally)


def _qa(records: Sequence[Span], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_spans(records, rows, how.tokenizer, how.max_length, how.stride, tally=tally)


def _embed(records: Sequence[Related], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    del rows
    return [*encode_related(records, how.tokenizer, how.max_length, how.truncation, tally=tally)]


def _preference(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return [*encode_preferences(records, rows, how.tokenizer, how.max_length, truncation=how.truncation, tally=tally)]


def _reward(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    how_cut = how.truncation
    return [
        *encode_preferences(records, rows, how.tokenizer, how.max_length, whole=True, truncation=how_cut, tally=tally)
    ]


def _kto(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return [*encode_judged(records, rows, how.tokenizer, how.max_length, truncation=how.truncation, tally=tally)]


def _prompts(records: Sequence[Record], rows: Sequence[Row], how: Settings, tally: Tally) -> list[Example]:
    return encode_prompts(records, rows, how.tokenizer, how.max_length, tally=tally)


def _beaten(record: Record) -> str:
    """The answers that are not the best, for people."""
    return "".join(f"\n{place}. {text}" for text, place in answers_of(record)[1:])


def _template_notes(form: Format, how: Settings) -> list[str]:
    if has_template(how.tokenizer):
        return []
    bare = how.chat is not True and form.name == "prompt-completion"
    how_read = "prompts and completions are read as they stand" if bare else "Ingraft's default template is used"
    return [f"{name_of(how.tokenizer)} has no chat template: {how_read}"]


ANSWERS = {"instruction": "output", "prompt": "completion", "text": "label"}
"""The field that makes a row recognisable -> the field that holds its answer, which a row to be answered may lack."""

TURNS = {"messages": ("role", "content"), "conversations": ("from", "value")}
"""The fields that hold turns, and what the turns' own fields are called; the last answer may be lacking."""


def _unwritten(row: Row, labels: Sequence[str]) -> Values:
    """For a model that writes: a stand-in where an answer is missing, and for the answering turn."""
    del labels
    values = dict(row.values)
    for name, answer in ANSWERS.items():
        if name in values and _absent(values.get(answer)) and (answer != "label" or row.reader != "txt"):
            values[answer] = "?"
    for name, (role, text) in TURNS.items():
        if name in values:
            values[name] = _answered(values[name], role, text)
    return values


def _absent(answer: Any) -> bool:
    return answer is None or (isinstance(answer, str) and not answer.strip())


def _answered(turns: Any, role: str, text: str) -> Any:
    """The turns with a stand-in for the answer that is wanted, in the place of one that is there. What is no list of turns is left for the
    reader to name."""
    if not isinstance(turns, list) or not turns:
        return turns
    known, stand_in = cast("list[Any]", turns), {role: "assistant", text: "?"}
    if not isinstance(known[-1], dict):
        return known
    speaker = ROLES.get(str(cast("dict[str, Any]", known[-1]).get(role)).lower())
    return [*(known[:-1] if speaker == "assistant" else known), stand_in]


def _as_it_is(row: Row, labels: Sequence[str]) -> Values:
    """For a model that judges answers: they have to be there."""
    del labels
    return row.values


def _unclassified(row: Row, labels: Sequence[str]) -> Values:
    return {**row.values, "label": labels[0]}  # any class: it is not looked at


def _unmeasured(row: Row, labels: Sequence[str]) -> Values:
    del labels
    return {**row.values, "label": 0}


def _untold(row: Row, labels: Sequence[str]) -> Values:
    del labels
    return {**row.values, "label": []}


def _untagged(row: Row, labels: Sequence[str]) -> Values:
    words = row.values.get("tokens")
    return (
        {**row.values, "tags": [labels[0]] * len(cast("Sequence[Any]", words))}
        if isinstance(words, (list, tuple))
        else row.values
    )


def _unfound(row: Row, labels: Sequence[str]) -> Values:
    del labels
    context = row.values.get("context")
    start = len(context) - len(context.lstrip()) if isinstance(context, str) else 0
    return {**row.values, "answers": [{"text": str(context)[start : start + 1], "answer_start": start}]}


AS_NUMBERS = {"text-label": "text-number", "pair-label": "pair-number"}
AS_RELATED = {"pair-label": "pair-similarity", "prompt-completion": "completion-match"}
AS_LISTS = {"text-label": "text-labels", "pair-label": "pair-labels"}

ANYWHERE, AT_AN_END = ("keep_answer", "keep_start", "keep_end"), ("keep_start", "keep_end")

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sft",
            records=(Chat, Labelled),
            rows="rows with an answer: instructions, conversations, prompt and completion, or text and label",
            encode=_sft,
            cuts=ANYWHERE,
            unanswered=_unwritten,
            notes=_template_notes,
        ),
        Task(
            name="lm",
            records=(Document,),
            rows="plain text: {text} rows or a text file",
            encode=_lm,
            blocks=True,
            unanswered=_unwritten,
        ),
        Task(
            name="seq2seq",
            records=(Chat, Labelled),
            rows="rows with an answer: instructions, conversations, prompt and completion, or text and label",
            encode=_seq2seq,
            cuts=AT_AN_END,
            unanswered=_unwritten,
        ),
        Task(
            name="classify",
            records=(Labelled,),
            rows="{text, label} or {text, text2, label} rows",
            encode=_classify,
            cuts=AT_AN_END,
            labels=label_names,
            classes=lambda record: (record.label,),
            told=lambda record: record.label,
            unanswered=_unclassified,
        ),
        Task(
            name="image-classify",
            records=(Pictured,),
            rows="pictures with a class: a folder of class folders, {image, label} rows, or an .npz with images and labels",
            encode=_image_classify,
            labels=label_names,
            classes=lambda record: (record.label,),
            about=about_pictures,
            told=lambda record: record.label,
            unanswered=_unclassified,
            counted=("images", "images"),
            sketch=sketch,
        ),
        Task(
            name="multi-label",
            records=(Multilabelled,),
            rows="{text, label} or {text, text2, label} rows, label being a list of labels",
            reads=AS_LISTS,
            encode=_multi_label,
            cuts=AT_AN_END,
            labels=several_names,
            classes=lambda record: record.labels,
            about=about_several,
            told=lambda record: ", ".join(record.labels) or "none",
            unanswered=_untold,
        ),
        Task(
            name="regress",
            records=(Measured,),
            rows="{text, label} or {text, text2, label} rows, label being a number",
            reads=AS_NUMBERS,
            encode=_regress,
            cuts=AT_AN_END,
            scale=scale_of,
            about=about_numbers,
            told=lambda record: f"{record.value:g}",
            unanswered=_unmeasured,
        ),
        Task(
            name="tag",
            records=(Tagged,),
            rows="{tokens, tags} rows",
            encode=_tag,
            cuts=("keep_start",),
            labels=tag_names,
            about=about_tags,
            told=lambda record: " ".join(tag for tag in record.tags if tag != OUTSIDE) or OUTSIDE,
            unanswered=_untagged,
        ),
        Task(
            name="qa",
            records=(Span,),
            rows="{context, question, answers} rows, as SQuAD has them",
            encode=_qa,
            told=lambda record: record.answers[0][0],
            unanswered=_unfound,
        ),
        Task(
            name="embed",
            records=(Related,),
            rows="texts that belong together: {query, positive}, {query, positive, negative}, {prompt, completion}, or {text, text2, label}, label being "
            "a number",
            reads=AS_RELATED,
            encode=_embed,
            cuts=AT_AN_END,
            scale=spread_of,
            about=about_related,
            told=lambda record: record.match if record.value is None else f"{record.value:g} {record.match}",
            unanswered=_as_it_is,
        ),
        *(
            Task(
                name=name,
                records=(Preference, Ranking),
                rows="answers in an order: {prompt, chosen, rejected}, {messages, chosen, rejected} or {prompt, responses, ranking}",
                encode=encode,
                cuts=ANYWHERE,
                told=_beaten,
                unanswered=unanswered,
            )
            for name, encode, unanswered in (
                ("reward", _reward, _as_it_is),
                ("dpo", _preference, _unwritten),
                ("ipo", _preference, _unwritten),
            )
        ),
        Task(
            name="kto",
            records=(Judged,),
            rows="answers judged one by one: {prompt, completion, label}, the label true or false",
            encode=_kto,
            cuts=ANYWHERE,
            told=lambda record: "good" if record.good else "bad",
            unanswered=_unwritten,
        ),
        *(
            Task(
                name=name,
                records=(Chat, Labelled, Preference, Ranking),
                rows="rows that ask: {prompt}, {messages}, instructions, or preferences, with or without an answer",
                encode=_prompts,
                about=lambda records: ["prompts: the model's own answers are what it learns from"],
                asks=True,
                unanswered=with_answer,
            )
            for name in ("ppo", "grpo")
        ),
    )
}
