"""Rows that say what another row has said: repetitions, contradictions, and held-out rows that training has seen.

Two texts are *the same* letter by letter, and *alike* where only case, spaces, punctuation and the width of characters tell them apart. Alike is found by a hash of what is
left without those, in one pass and without comparing rows with each other. Rows that share most of their words are not looked for: that needs an index of
pieces of words (MinHash), which costs more than reading and tokenising together.

Nothing is taken out. Two rows alike may both be meant, and a warning with file and line lets a person decide.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ingraft.data.records import Record, given, told
from ingraft.data.rows import Row

SHOWN = 3
"""Pairs that a line names."""

_BESIDE = re.compile(r"[\W_]+")


@dataclass(kw_only=True, slots=True)
class Pairs:
    """Rows and what they repeat: how many, and the first of them by place."""

    count: int = 0
    first: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])

    def add(self, row: Row, earlier: Row) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < SHOWN:
            self.first.append((row.place, earlier.place))

    @property
    def shown(self) -> str:
        """The first of them, in brackets."""
        more = ", ..." if self.count > len(self.first) else ""
        return f"({', '.join(f'{one} = {other}' for one, other in self.first)}{more})"


@dataclass(kw_only=True, slots=True)
class Repeats:
    """Of the rows of a part.

    Attributes:
        same: rows that repeat an earlier one entirely. alike: that repeat one but for case, spaces and punctuation.
        contrary: rows that ask what an earlier row asks, letter by letter, and are told something else.
    """

    same: Pairs = field(default_factory=Pairs)
    alike: Pairs = field(default_factory=Pairs)
    contrary: Pairs = field(default_factory=Pairs)


@dataclass(kw_only=True, slots=True)
class Leaks:
    """Held-out rows whose text the model is given in training as well: the same, or alike."""

    same: Pairs = field(default_factory=Pairs)
    alike: Pairs = field(default_factory=Pairs)


def bare(text: str) -> str:
    """What is left of a text without case, punctuation, widths of characters and lengths of spaces; the text itself where nothing is."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return _BESIDE.sub(" ", text.casefold()).strip() or text


def repeats_of(rows: Sequence[Row], records: Sequence[Record]) -> Repeats:
    """What the rows of a part repeat of each other. Lines of a running text are none of it."""
    found = Repeats()
    whole: dict[int, int] = {}
    alike: dict[int, int] = {}
    asked: dict[int, tuple[int, str]] = {}
    for number, record in _apart(rows, records):
        row, question, answer = rows[number], given(record), told(record)
        before = whole.setdefault(hash((question, answer)), number)
        if before != number:
            found.same.add(row, rows[before])
            continue
        near = alike.setdefault(hash((bare(question), bare(answer))), number)
        if near != number:
            found.alike.add(row, rows[near])
        first, said = asked.setdefault(hash(question), (number, answer))
        if said != answer:
            found.contrary.add(row, rows[first])
    return found


def leaks_of(rows: Sequence[Row], records: Sequence[Record], train: tuple[Sequence[Row], Sequence[Record]]) -> Leaks:
    """Which of these held-out rows stand in training too, whatever their answers are."""
    found, seen, like = Leaks(), dict[int, int](), dict[int, int]()
    for number, record in _apart(*train):
        question = given(record)
        seen.setdefault(hash(question), number)
        like.setdefault(hash(bare(question)), number)
    for number, record in _apart(rows, records):
        question = given(record)
        if (before := seen.get(hash(question))) is not None:
            found.same.add(rows[number], train[0][before])
        elif (before := like.get(hash(bare(question)))) is not None:
            found.alike.add(rows[number], train[0][before])
    return found


def _apart(rows: Sequence[Row], records: Sequence[Record]) -> Iterable[tuple[int, Record]]:
    """The records that stand for themselves, with their positions."""
    return ((n, record) for n, (row, record) in enumerate(zip(rows, records, strict=True)) if row.reader != "txt")
