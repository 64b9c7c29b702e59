"""A row as the model sees it: its tokens as text, each marked as learned or not. `ingraft data` prints them in
colour.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from ingraft.data.examples import IGNORED, encode_classify, encode_lm, encode_sft
from ingraft.data.formats import read_records
from ingraft.data.records import label_of
from ingraft.data.rows import Row
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def preview(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    *,
    task: str = "sft",
    form: str = "auto",
    max_length: int = 512,
    learn: str = "answer",
    chat: bool | None = None,
) -> list[tuple[str, bool]]:
    """The tokens of one row, (text, learned), in order; the texts join to what the model reads.

    A token that ends within a character (common in Chinese) has an empty text, and the one that completes it carries
    the character. For `classify`, which learns a class and no token, the last entry is the label.

    Raises:
        IngraftError: as `load` does for this row.
    """
    rows = [row]
    if task == "classify":
        label = label_of(read_records(rows, form)[1][0])
        example = encode_classify(rows, tokenizer, [label] if label is not None else [], max_length, form=form)[0]
        return [*((text, False) for text in token_texts(example.input_ids, tokenizer)), (f" → {label}", True)]
    if task == "lm":
        example = encode_lm(rows, tokenizer, max_length, form=form)[0]
    elif task == "sft":
        example = encode_sft(rows, tokenizer, max_length, form=form, learn=learn, chat=chat)[0]
    else:
        raise IngraftError(f"There is no preview for task '{task}' yet: sft, lm and classify have one.")
    learned = [label != IGNORED for label in example.labels or []]
    return list(zip(token_texts(example.input_ids, tokenizer), learned, strict=True))


def token_texts(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[str]:
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


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return cast("str", tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)) if ids else ""
