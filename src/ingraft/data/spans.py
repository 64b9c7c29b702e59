"""Questions whose answer is a passage of a context, as windows of tokens.

A context that does not fit into `max_length` beside its question is laid out in windows that overlap by `stride` tokens, so that an answer shorter than that
lies whole in one of them. Where a window does not hold the whole answer, its right place is token 0, which in encoders is the token for the sentence:
the usual way to say "not here". The question is never cut.

Each example is a window and knows its row and where its tokens stand in the context, so that an answer is a piece of the user's own text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import name_of
from ingraft.data.examples import Example, Tally, count_unknown, token_ids
from ingraft.data.records import Span
from ingraft.data.rows import Row, refuse
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEAST = 8
"""So many tokens of a context at least must find room beside the question."""

ELSEWHERE = (-1, -1)
"""The place of a token that is not of the context."""


def encode_spans(
    records: Sequence[Span],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    stride: int,
    *,
    tally: Tally,
) -> list[Example]:
    """The windows of every row, in order.

    Args:
        stride: tokens that two neighbouring windows share; at most half of what has room beside the question.

    Raises:
        IngraftError: rows without an answer, or whose question leaves no room for the context, by file and line; a tokenizer that does not know
            where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise IngraftError(f"{name_of(tokenizer)}: its tokenizer does not say where tokens stand; use another base.")
    questions, contexts = [record.question for record in records], [record.context for record in records]
    asked, read = token_ids(questions, tokenizer), token_ids(contexts, tokenizer)
    count_unknown([*questions, *contexts], [*asked, *read], tokenizer, tally)
    special = tokenizer.num_special_tokens_to_add(pair=True)
    rooms = [max_length - special - len(question) for question in asked]
    problems: list[str] = []
    for row, record, room in zip(rows, records, rooms, strict=True):
        if not record.answers:
            problems.append(f"{row.place}: has no answer; questions without one are not learned yet, leave them out")
        elif room < LEAST:
            problems.append(
                f"{row.place}: the question leaves room for {max(0, room)} tokens of the context within max_length {max_length}"
            )
    if problems:
        refuse(problems, summary=f"{len(problems)} of {len(rows)} rows cannot be asked:")
    together: dict[int, list[int]] = defaultdict(list)  # rows by how far their windows overlap
    for number, room in enumerate(rooms):
        together[min(stride, room // 2)].append(number)
    windows: dict[int, list[Example]] = {}
    for overlap, numbers in together.items():
        windows |= _windows(records, numbers, tokenizer, max_length, overlap)
    for number, record in enumerate(records):
        tally.lengths.append(special + len(asked[number]) + len(read[number]))
        _count(record, windows[number], tally)
    return [example for number in range(len(records)) for example in windows[number]]


def _count(record: Span, windows: Sequence[Example], tally: Tally) -> None:
    tally.more["rows in several windows"] += len(windows) > 1
    tally.more["windows without the whole answer"] += sum(window.span == (0, 0) for window in windows)
    tally.more["rows whose answer lies whole in no window"] += all(window.span == (0, 0) for window in windows)


def _windows(
    records: Sequence[Span], numbers: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int, overlap: int
) -> dict[int, list[Example]]:
    """The windows of some rows, by row."""
    made = tokenizer(
        [records[number].question for number in numbers],
        [records[number].context for number in numbers],
        truncation="only_second",
        max_length=max_length,
        stride=overlap,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        verbose=False,
    )
    owners = cast("list[int]", made["overflow_to_sample_mapping"])
    offsets = cast("list[list[tuple[int, int]]]", made["offset_mapping"])
    ids = cast("list[list[int]]", made["input_ids"])
    types = cast("list[list[int]] | None", made.get("token_type_ids"))
    found: dict[int, list[Example]] = {number: [] for number in numbers}
    for window, owner in enumerate(owners):
        number = numbers[owner]
        places = [
            (start, end) if sequence == 1 else ELSEWHERE
            for (start, end), sequence in zip(offsets[window], made.sequence_ids(window), strict=True)
        ]
        answers = records[number].answers
        found[number].append(
            Example(
                input_ids=ids[window],
                span=place_of(answers[0], places) if answers else (0, 0),
                characters=places,
                token_type_ids=types[window] if types is not None else None,
                row_id=number,
            )
        )
    return found


def place_of(answer: tuple[str, int], places: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The first and the last token of an answer in a window, (0, 0) where it does not hold the whole of it.

    Args:
        answer: the text and its first character. places: of its tokens, as `Example.characters`.
    """
    text, start = answer
    lead = len(text) - len(text.lstrip())
    start, end = start + lead, start + len(text.rstrip())  # spaces belong to no token of their own
    inside = [at for at, (begin, stop) in enumerate(places) if begin < end and stop > start and begin < stop]
    if not inside or places[inside[0]][0] > start or places[inside[-1]][1] < end:
        return 0, 0
    return inside[0], inside[-1]
