"""What is left of a row that is longer than `max_length`.

- `keep_answer`, the default: what is read and not learned is shortened, so that what is learned stays whole. A prompt loses its middle: its beginning holds the
  template's opening and mostly the instruction, its end the question and the header of the answer. Of several turns the longest are shortened first, all to one length.
  Where that would leave less than `LEAST` tokens of a turn, the last turns go instead; and where even one turn is too long, the end of its answer.
- `keep_start`: the end is cut away, answers with it. `keep_end`: the beginning, but for the token that begins every sequence.
- `drop`: such rows are left out. `refuse`: the run does not start.

Whatever is cut is counted, and rows that lose something to be learned are named. Cutting the end was the only way until 2026-12-01: of a row with a long
prompt and a label for an answer it left nothing to learn, and the row was dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATION = ("keep_answer", "keep_start", "keep_end", "drop", "refuse")

LEAST = 64
"""So many tokens of a turn stay, or half of `max_length` where that is less."""

Piece = tuple[list[int], bool]
"""Tokens, and whether they are learned."""


def fitted(pieces: Sequence[Piece], most: int, truncation: str, begin: int | None = None) -> list[Piece]:
    """The pieces with at most `most` tokens.

    Args:
        truncation: one of `TRUNCATION`; `drop` and `refuse` cut the end, for whoever does not ask what was cut.
        begin: the token that begins every sequence, where there is one.
    """
    if length(pieces) <= most:
        return list(pieces)
    if truncation == "keep_end":
        return _without_front(pieces, most, begin)
    if truncation == "keep_answer":
        pieces = _shortened(pieces, most)
    kept: list[Piece] = []
    for tokens, counts in pieces:
        kept.append((tokens[:most], counts))
        most -= len(kept[-1][0])
    return kept


def length(pieces: Sequence[Piece]) -> int:
    """Tokens in all."""
    return sum(len(tokens) for tokens, _ in pieces)


def learned(pieces: Sequence[Piece]) -> int:
    """Tokens that are learned."""
    return sum(len(tokens) for tokens, counts in pieces if counts)


def _without_front(pieces: Sequence[Piece], most: int, begin: int | None) -> list[Piece]:
    first = next((tokens[0] for tokens, _ in pieces if tokens), None)
    head: list[Piece] = [([first], False)] if first is not None and first == begin and most > 1 else []
    over = length(pieces) - most + len(head)
    kept: list[Piece] = []
    for tokens, counts in pieces:
        kept.append((tokens[over:], counts))
        over = max(0, over - len(tokens))
    return head + kept


def _shortened(pieces: Sequence[Piece], most: int) -> list[Piece]:
    """As many turns as go with enough of their prompts, these prompts shortened; longer than `most` where one turn's answer is."""
    least = min(LEAST, most // 2)
    ends = [at for at, (tokens, counts) in enumerate(pieces, 1) if counts and tokens]
    for end in reversed(ends):
        turns = pieces[:end]
        read = [len(tokens) for tokens, counts in turns if not counts]
        floor = sum(min(size, least) for size in read)
        if learned(turns) + floor <= most or end == ends[0]:
            sizes = iter(level(read, max(most - learned(turns), floor)))
            return [(tokens if counts else middle_out(tokens, next(sizes)), counts) for tokens, counts in turns]
    return list(pieces)


def level(sizes: Sequence[int], room: int) -> list[int]:
    """The sizes brought down to `room` in all: the largest first, all of them to one height, to one."""
    left, high = room, 0
    for number, size in enumerate(ordered := sorted(sizes)):
        high = left // (len(ordered) - number)
        if size > high:
            break
        left -= size
    else:
        return list(sizes)
    kept = [min(size, high) for size in sizes]
    for at in [at for at, size in enumerate(sizes) if size > high][: room - sum(kept)]:
        kept[at] += 1
    return kept


def middle_out(tokens: list[int], size: int) -> list[int]:
    """The first and the last of them, `size` in all."""
    if size >= len(tokens):
        return tokens
    tail = size // 2
    return tokens[: size - tail] + tokens[len(tokens) - tail :]


@contextmanager
def cutting(tokenizer: PreTrainedTokenizerBase, truncation: str) -> Iterator[None]:
    """Inside it the tokenizer cuts texts where `truncation` says: at the front for `keep_end`, else at the end."""
    open_to = cast(Any, tokenizer)
    before = open_to.truncation_side
    open_to.truncation_side = "left" if truncation == "keep_end" else "right"
    try:
        yield
    finally:
        open_to.truncation_side = before
