"""Texts that belong together, each a sequence of its own with the tokenizer's special tokens: a row is as many sequences as it has texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ingraft.data.cutting import cutting
from ingraft.data.examples import Example, Tally, count_unknown
from ingraft.data.labelled import about_numbers
from ingraft.data.records import Measured, Record, Related
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True, slots=True)
class Matched(Example):
    """A text, the one that belongs to it, and others that do not.

    `values` holds how much they belong together, where that is a number, and every sequence has it.

    Attributes:
        beside: the sequences behind the first: the match, then the others.
    """

    beside: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids) + sum(map(len, self.beside))

    def moved(self, by: int) -> Matched:
        return replace(self, row_id=self.row_id + by, beside=tuple(one.moved(by) for one in self.beside))

    @property
    def sequences(self) -> tuple[Example, ...]:
        own = Example(
            input_ids=self.input_ids, values=self.values, token_type_ids=self.token_type_ids, row_id=self.row_id
        )
        return (own, *self.beside)

    @property
    def learned(self) -> int:
        return 1


def encode_texts(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tally: Tally,
    truncation: str = "keep_start",
) -> list[Example]:
    """Each text as a sequence; `row_id` is its position, and so are the numbers of those that were cut."""
    if not texts:
        return []
    whole = cast("list[list[int]]", tokenizer(list(texts), verbose=False)["input_ids"])
    with cutting(tokenizer, truncation):
        short = tokenizer(list(texts), truncation=True, max_length=max_length, verbose=False)
    count_unknown(texts, whole, tokenizer, tally)
    tally.tokens -= len(texts) * tokenizer.num_special_tokens_to_add(pair=False)  # they are no part of the text
    types = cast("list[list[int]] | None", short.get("token_type_ids"))
    examples: list[Example] = []
    for number, ids in enumerate(cast("list[list[int]]", short["input_ids"])):
        tally.lengths.append(len(whole[number]))
        if len(ids) < len(whole[number]):
            tally.shortened.append(number)
        kinds = types[number] if types is not None else None
        examples.append(Example(input_ids=ids, token_type_ids=kinds, row_id=number))
    return examples


def encode_related(
    records: Sequence[Related],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "keep_start",
    *,
    tally: Tally,
) -> list[Matched]:
    """Each row with all of its texts, cut to `max_length` one by one."""
    texts = [text for record in records for text in (record.text, record.match, *record.others)]
    encoded = iter(encode_texts(texts, tokenizer, max_length, tally, truncation))
    owners = [number for number, record in enumerate(records) for _ in range(2 + len(record.others))]
    tally.shortened = sorted({owners[text] for text in tally.shortened})
    examples: list[Matched] = []
    for number, record in enumerate(records):
        values = None if record.value is None else (record.value,)
        own, *beside = (
            Example(input_ids=one.input_ids, token_type_ids=one.token_type_ids, values=values, row_id=number)
            for one in (next(encoded) for _ in range(2 + len(record.others)))
        )
        kinds = own.token_type_ids
        examples.append(
            Matched(input_ids=own.input_ids, token_type_ids=kinds, values=values, row_id=number, beside=tuple(beside))
        )
    return examples


def spread_of(records: Sequence[Record]) -> tuple[float, float]:
    """The scale of cosines, which need none, once it is sure that there is an order to learn.

    Raises:
        IngraftError: all numbers are the same.
    """
    values = {record.value for record in records if isinstance(record, Related)}
    if len(values) == 1 and None not in values:
        raise IngraftError(
            f"All rows have the one label {values.pop():g}, so there is no order to learn. If the texts of each row belong together, name the fields "
            "`query` and `positive` and leave the label out."
        )
    return 0.0, 1.0


def about_related(records: Sequence[Related]) -> list[str]:
    """What a report says of the rows of a part: the numbers, or how many texts are to be told apart."""
    numbers = [
        Measured(text=record.text, text2=record.match, value=record.value)
        for record in records
        if record.value is not None
    ]
    if numbers:
        return about_numbers(numbers)
    return [f"pairs: {len(records):,}, with {sum(len(record.others) for record in records):,} texts that do not belong"]
