"""A row as the model sees it: its tokens as text, each marked as learned or not. `ingraft data` prints them in
colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ingraft.data.examples import IGNORED, Tally
from ingraft.data.rows import Row
from ingraft.data.tasks import TASKS, Settings
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader


def preview(
    row: Row,
    tokenizer: Reader,
    *,
    task: str = "sft",
    form: str = "auto",
    max_length: int = 512,
    learn: str = "answer",
    chat: bool | None = None,
    truncation: str = "keep_answer",
) -> list[tuple[str, bool]]:
    """The tokens of one row, (text, learned), in order; the texts join to what the model reads.

    A token that ends within a character (common in Chinese) has an empty text, and the one that completes it carries
    the character. What is no token comes first, what a row teaches beside tokens, such as its class, last.

    Raises:
        IngraftError: as `load` does for this row.
    """
    if task not in TASKS:
        raise IngraftError(f"There is no preview for task '{task}' yet: {', '.join(TASKS)} have one.")
    shown, rows = TASKS[task], [row]
    records = shown.read(rows, form)[1]
    labels = shown.labels(records) if shown.labels is not None else ()
    how = Settings(
        reader=tokenizer, max_length=max_length, labels=labels, learn=learn, chat=chat, truncation=truncation
    )
    example = shown.encode(records, rows, how, Tally())[0]
    ids = [*example.input_ids, *(example.target or ())]
    learned = [label != IGNORED for label in example.labels or [IGNORED] * len(example.input_ids)]
    learned += [True] * len(example.target or ())
    if example.span is not None:
        learned = [example.span[0] <= at <= example.span[1] for at in range(len(example))]
    seen = [(shown.sketch(example), False)] if shown.sketch is not None else []
    told = [(f" → {shown.told(records[0])}", True)] if shown.told is not None else []
    return [*seen, *zip(token_texts(ids, how.reader), learned, strict=True), *told]


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """Each token's text in its context; the texts of a whole sequence join to its decoding."""
    texts: list[str] = []
    before: list[int] = []  # the last whole token: some tokenizers drop the space of a token that stands first
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        head = _decode(before, tokenizer)
        text = _decode([*before, *pending], tokenizer)[len(head) :]
        if text.endswith("\ufffd") and len(pending) < 8:
            texts.append("")
            continue
        texts.append(text)
        before, pending = pending, []
    if pending:
        texts[-1] = _decode(pending, tokenizer)
    return texts


def _decode(ids: Sequence[int], tokenizer: Any) -> str:
    return cast("str", tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""
