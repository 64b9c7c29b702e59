"""Demonstrations: rows of a training set that a prompt shows, answered, before it asks (in-context learning, Brown et al. 2020, https://arxiv.org/abs/2005.14165).

They are earlier turns of the conversation, so that the base's own template tells it what they are; only a bare prompt for a base without a template gets them as text
in front. Nothing of them is learned or scored. The row itself, or one that gives the model the same to read, is never among them, and none is shown twice.

A row of text and label is asked in words: the text, then a question that names the labels, then the label's word as the answer. Without the question a model could not
know what is wanted; where an adapter was trained on such rows without it (`--task sft`), its own rows are scored as they were trained, without `--shots`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from ingraft.data.examples import as_chat
from ingraft.data.records import Chat, Labelled, Message, Record, given
from ingraft.errors import IngraftError

Select = Literal["fixed", "random", "nearest"]

QUESTION = "{text}\n\nWhich of these is it: {labels}? Answer with one of them alone."
"""Put around a labelled text where a person says nothing else."""

NOTHING = ("N/A", "[MASK]", "")
"""Texts that say nothing, for which a fair model would find every label alike (Zhao et al. 2021, section 5)."""


@dataclass(frozen=True, kw_only=True)
class Shots:
    """How rows are asked.

    Attributes:
        count: demonstrations. select: the same for every row (balanced over labels), drawn for each row, or those nearest to it. seed: of the draw.
        question: around a labelled text: {text}, {text2} where there are two (else both are in {text}), {labels}.
        words: what is written for a label, where that is not its name.
        calibrate: divide what the model says of each label by what it says of it where the text says nothing.
    """

    count: int = 0
    select: Select = "fixed"
    seed: int = 42
    question: str = QUESTION
    words: Mapping[str, str] = field(default_factory=dict[str, str])
    calibrate: bool = False

    def check(self, labels: Sequence[str]) -> None:
        """Refuse what cannot be asked.

        Args:
            labels: of the rows; none where they are no labelled ones.

        Raises:
            IngraftError: every problem found.
        """
        problems: list[str] = []
        if "{text}" not in self.question:
            problems.append(f"--question {self.question!r}: has no {{text}}, so that nothing would be asked about.")
        if strange := [label for label in self.words if label not in labels]:
            problems.append(
                f"--label-words: no row is labelled {', '.join(map(repr, strange))}; the labels are {', '.join(labels) or 'none'}."
            )
        words = [self.word(label) for label in labels]
        if len(set(words)) < len(words):
            problems.append(f"--label-words: two labels have the same word ({', '.join(words)}).")
        if self.calibrate and not labels:
            problems.append("--calibrate: only the choice between labels can be calibrated; these rows have none.")
        if problems:
            raise IngraftError(*problems)

    def word(self, label: str) -> str:
        """What is written for a label."""
        return self.words.get(label, label)

    def chat(self, record: Record, labels: Sequence[str]) -> Chat | None:
        """A row as the conversation that asks it, answer included; None where it has none."""
        if not isinstance(record, Labelled):
            return as_chat(record)
        text = record.text
        if record.text2 is not None and "{text2}" not in self.question:
            text = f"{record.text}\n\n{record.text2}"
        # One after the other, because a text may itself have braces.
        named = {"{labels}": ", ".join(map(self.word, labels)), "{text2}": record.text2 or "", "{text}": text}
        asked = "".join(named.get(piece, piece) for piece in _pieces(self.question, tuple(named)))
        turns = Message(role="user", content=asked), Message(role="assistant", content=self.word(record.label))
        return Chat(messages=turns)


def _pieces(text: str, marks: Sequence[str]) -> Iterator[str]:
    """The text, cut before and behind every mark."""
    while found := [(at, mark) for mark in marks if (at := text.find(mark)) >= 0]:
        at, mark = min(found)
        yield from (text[:at], mark)
        text = text[at + len(mark) :]
    yield text


def behind(shown: Sequence[Chat], own: Chat, *, as_text: bool) -> Chat:
    """The conversation that shows some others first.

    Args:
        as_text: bare prompts and completions are written one behind the other, with an empty line between two.
    """
    if not shown:
        return own
    if as_text and own.plain and all(chat.plain for chat in shown):
        first = "".join("".join(message["content"] for message in chat.messages) + "\n\n" for chat in shown)
        asked, answer = own.messages
        return replace(own, messages=(Message(role="user", content=first + asked["content"]), answer))
    system = [message for message in own.messages if message["role"] == "system"]
    turns = [message for chat in (*shown, own) for message in chat.messages if message["role"] != "system"]
    return Chat(messages=(*system, *turns))


def distinct(records: Sequence[Record]) -> list[Record]:
    """The records without those that give a model what an earlier one gives."""
    return list({given(record): record for record in reversed(records)}.values())[::-1]


def draw(
    pool: Sequence[Record], rows: Sequence[Record], how: Shots, nearness_NP: np.ndarray | None = None
) -> list[list[int]]:
    """By row the places in the pool of its demonstrations, in the order in which they are shown.

    Args:
        pool: distinct records. rows: those that are asked.
        nearness_NP: of each row and record of the pool, larger is nearer; for `nearest`, which shows the nearest one last.

    Raises:
        IngraftError: the pool is too small.
    """
    if not how.count:
        return [[] for _ in rows]
    keys = [given(record) for record in pool]
    fixed, found = _balanced(pool, how.seed), list[list[int]]()
    for number, row in enumerate(rows):
        order = fixed
        if how.select == "random":
            order = _shuffled(len(pool), f"{how.seed}\x1f{given(row)}")
        elif how.select == "nearest":
            assert nearness_NP is not None, "whoever draws by nearness measures it"
            order = np.argsort(-nearness_NP[number], kind="stable").tolist()
        chosen = _first(order, keys, row, how.count)
        found.append(chosen[::-1] if how.select == "nearest" else chosen)
    if found and (least := min(map(len, found))) < how.count:
        raise IngraftError(
            f"--shots {how.count}: there are only {least} different rows to show, the row that is asked not counted. Ask for fewer, or name more rows "
            "with --shots-from."
        )
    return found


def _first(order: Sequence[int], keys: Sequence[str], row: Record, count: int) -> list[int]:
    own, found = given(row), list[int]()
    for place in order:
        if len(found) == count:
            break
        if keys[place] != own:
            found.append(place)
    return found


def _balanced(pool: Sequence[Record], seed: int) -> list[int]:
    """All places, shuffled, so that labels take turns."""
    order = _shuffled(len(pool), str(seed))
    groups: dict[str, list[int]] = defaultdict(list)
    for place in order:
        record = pool[place]
        groups[record.label if isinstance(record, Labelled) else ""].append(place)
    turn = {place: number for members in groups.values() for number, place in enumerate(members)}
    return sorted(order, key=turn.__getitem__)


def _shuffled(count: int, seed: str) -> list[int]:
    digest = hashlib.sha256(seed.encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big")).permutation(count).tolist()
