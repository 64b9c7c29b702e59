"""What a row means, whatever its fields were called.

Twelve shapes cover every form that Ingraft recognises. `formats.py` turns rows into these; everything after it
(templates, encoding, splits) sees only these, so a new form of row costs one entry there and nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from ingraft.data.pixels import Picture


class Message(TypedDict):
    """One turn of a conversation, with the keys that chat templates expect."""

    role: str
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Chat:
    """A conversation; the assistant's turns are what a model should learn.

    Attributes:
        messages: the turns in order.
        plain: the row was a bare prompt and its continuation, which a base without a chat template reads as they stand.
    """

    messages: tuple[Message, ...]
    plain: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelled:
    """A text, or a pair of texts, and its class (the label's name, always a string)."""

    text: str
    text2: str | None
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Pictured:
    """A picture and its class."""

    image: Picture
    label: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """A text, or a pair of texts, and a number."""

    text: str
    text2: str | None
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Multilabelled:
    """A text, or a pair of texts, and the classes that it is of: any number of them, none included."""

    text: str
    text2: str | None
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Document:
    """Plain text. `line_of_file` marks a line of a text file, which continues the line before it."""

    text: str
    line_of_file: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Preference:
    """A prompt and two answers to it, the first one preferred."""

    messages: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """A prompt, several answers to it and the place of each: 1 is the best, and answers of one place are as good as each other."""

    messages: tuple[Message, ...]
    answers: tuple[str, ...]
    places: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """A prompt, one answer to it and whether a reader found it good. Never learned as it stands: half of such
    answers are bad ones.
    """

    messages: tuple[Message, ...]
    completion: str
    good: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Tagged:
    """Words and one tag for each."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A question whose answers are passages of the context: (text, character offset)."""

    context: str
    question: str
    answers: tuple[tuple[str, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Related:
    """A text and one that belongs to it.

    Attributes:
        others: texts that do not, although one might think so.
        value: how much the two belong together, larger is more; None where they simply do.
    """

    text: str
    match: str
    others: tuple[str, ...] = ()
    value: float | None = None


Record = (
    Related
    | Chat
    | Labelled
    | Pictured
    | Measured
    | Multilabelled
    | Document
    | Preference
    | Ranking
    | Judged
    | Tagged
    | Span
)


def given(record: Record) -> str:
    """What a model is given of this record, as one string: two records with the same are duplicates for a split.

    The answer is left out on purpose. A row whose question stands on both sides of the split measures memory, also
    when its answer is worded differently.
    """
    match record:
        case Chat():
            last = max(
                (i for i, m in enumerate(record.messages) if m["role"] == "assistant"), default=len(record.messages)
            )
            return "\x1e".join(f"{m['role']}\x1f{m['content']}" for m in record.messages[:last])
        case Labelled() | Measured() | Multilabelled():
            return record.text if record.text2 is None else f"{record.text}\x1e{record.text2}"
        case Pictured():
            return record.image.digest
        case Document():
            return record.text
        case Related():
            return f"{record.text}\x1e{record.match}"
        case Preference() | Ranking() | Judged():
            return "\x1e".join(f"{m['role']}\x1f{m['content']}" for m in record.messages)
        case Tagged():
            return "\x1f".join(record.tokens)
        case Span():
            return f"{record.context}\x1e{record.question}"


def told(record: Record) -> str:
    """What a record says beside what is `given`, as one string; the turns of a conversation that are given are no part of it."""
    match record:
        case Chat():
            return "\x1e".join(m["content"] for m in record.messages[-1:] if m["role"] == "assistant")
        case Labelled() | Pictured():
            return record.label
        case Multilabelled():
            return "\x1f".join(sorted(record.labels))
        case Measured() | Related():  # a text that belongs to another is part of what is given
            return "" if record.value is None else repr(record.value)
        case Document():
            return ""
        case Preference():
            return f"{record.chosen}\x1e{record.rejected}"
        case Ranking():
            return "\x1e".join(f"{place}\x1f{text}" for text, place in zip(record.answers, record.places, strict=True))
        case Judged():
            return f"{record.completion}\x1e{record.good}"
        case Tagged():
            return "\x1f".join(record.tags)
        case Span():
            return "\x1e".join(text for text, _ in record.answers)


def kept_together(record: Record) -> str:
    """What may not stand on both sides of a split: what the model is given, the context that several questions share, the text that several others
    belong to."""
    if isinstance(record, Related):
        return record.text
    return record.context if isinstance(record, Span) else given(record)


def label_of(record: Record) -> str | None:
    """The class of a record that has just one, else None."""
    return record.label if isinstance(record, Labelled | Pictured) else None
