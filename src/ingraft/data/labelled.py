"""Rows of a text, or a pair of texts, and something the whole row gets: a class, several classes, or a number. With the tokenizer's own special tokens."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from ingraft.data.cutting import cutting
from ingraft.data.examples import CHUNK, Example, Tally, count_unknown
from ingraft.data.formats import read_records
from ingraft.data.records import Labelled, Measured, Multilabelled, Record, label_of
from ingraft.data.rows import Row, refuse
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def encode_classify(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    *,
    form: str = "auto",
    tally: Tally | None = None,
) -> list[Example]:
    """Sequence classification of a text or a pair of texts, with the tokenizer's own special tokens.

    Args:
        labels: the classes, in the order of the head's outputs (`label_names` gives them for a training set).

    Raises:
        IngraftError: rows without text and label; a label that is not among `labels`, by file and line.
    """
    chosen, records = read_records(rows, form)
    if chosen.meaning is not Labelled:
        raise IngraftError(
            f"{rows[0].file}: task classify needs {{text, label}} or {{text, text2, label}} rows; these are {chosen.name} rows."
        )
    return encode_labelled(cast("list[Labelled]", records), rows, tokenizer, labels, max_length, tally=tally)


def encode_labelled(
    records: Sequence[Labelled],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    truncation: str = "keep_start",
    *,
    tally: Tally | None = None,
) -> list[Example]:
    """`encode_classify` for records that were read already."""
    check_labels([(record.label,) for record in records], rows, labels)
    numbers = {name: number for number, name in enumerate(labels)}
    goals = [{"label": numbers[record.label]} for record in records]
    return _encode(records, goals, tokenizer, max_length, truncation, Tally() if tally is None else tally)


def encode_multilabelled(
    records: Sequence[Multilabelled],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    truncation: str = "keep_start",
    *,
    tally: Tally,
) -> list[Example]:
    """A number for each class, 1 where the row is of it, else 0.

    Raises:
        IngraftError: as `check_labels`.
    """
    check_labels([record.labels for record in records], rows, labels)
    goals = [{"values": tuple(float(name in record.labels) for name in labels)} for record in records]
    return _encode(records, goals, tokenizer, max_length, truncation, tally)


def encode_measured(
    records: Sequence[Measured],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str = "keep_start",
    *,
    tally: Tally,
) -> list[Example]:
    """One number a row, as it stands in the data."""
    return _encode(
        records, [{"values": (record.value,)} for record in records], tokenizer, max_length, truncation, tally
    )


def check_labels(
    found: Sequence[Sequence[str]], rows: Sequence[Row], labels: Sequence[str], what: str = "label"
) -> None:
    """Refuse rows with labels that are not among `labels`.

    Args:
        found: the labels of each row. what: how to call one.

    Raises:
        IngraftError: by file and line, with the nearest one.
    """
    known = set(labels)
    unknown = [(row, name) for row, names in zip(rows, found, strict=True) for name in names if name not in known]
    if unknown:
        shown = ", ".join(list(labels)[:20]) + (", ..." if len(labels) > 20 else "")
        several = len({row.place for row, _ in unknown})
        refuse(
            [f"{row.place}: {what} '{name}' is unknown{nearest(name, labels, count=1)}" for row, name in unknown],
            summary=f"{several} rows have a {what} that the training data does not have. Known {what}s: {shown}.",
        )


def _encode(
    records: Sequence[Labelled] | Sequence[Multilabelled] | Sequence[Measured],
    goals: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str,
    tally: Tally,
) -> list[Example]:
    """Examples of the records' texts, each with its goal, which fields of `Example` hold."""
    if not records:
        return []
    paired = any(record.text2 is not None for record in records)
    examples: list[Example] = []
    for start in range(0, len(records), CHUNK):
        some = records[start : start + CHUNK]
        firsts = [record.text for record in some]
        seconds = [record.text2 or "" for record in some] if paired else None
        whole = tokenizer(firsts, seconds, verbose=False)
        ids = cast("list[list[int]]", whole["input_ids"])
        kinds = cast("list[list[int]] | None", whole.get("token_type_ids"))
        both = [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)] if seconds else firsts
        count_unknown(both, ids, tokenizer, tally)
        tally.tokens -= len(both) * tokenizer.num_special_tokens_to_add(pair=paired)  # they are no part of the text
        tally.lengths += map(len, ids)
        if long := [at for at, one in enumerate(ids) if len(one) > max_length]:
            tally.shortened += [start + at for at in long]
            others = [seconds[at] for at in long] if seconds is not None else None
            with cutting(tokenizer, truncation):
                short = tokenizer(
                    [firsts[at] for at in long], others, truncation=True, max_length=max_length, verbose=False
                )
            for number, at in enumerate(long):
                ids[at] = cast("list[list[int]]", short["input_ids"])[number]
                if kinds is not None:
                    kinds[at] = cast("list[list[int]]", short["token_type_ids"])[number]
        examples += [
            Example(
                input_ids=one,
                token_type_ids=kinds[at] if kinds is not None else None,
                row_id=start + at,
                **goals[start + at],
            )
            for at, one in enumerate(ids)
        ]
    return examples


def label_names(records: Sequence[Record]) -> tuple[str, ...]:
    """The classes of a training set in a stable order: by number when all are numbers, else alphabetically."""
    return in_order({name for record in records if (name := label_of(record)) is not None})


def several_names(records: Sequence[Record]) -> tuple[str, ...]:
    """`label_names` of rows with several labels each."""
    return in_order({name for record in records if isinstance(record, Multilabelled) for name in record.labels})


def in_order(names: set[str]) -> tuple[str, ...]:
    """Names by number when all are numbers, else alphabetically."""
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else (lambda name: (0, name))))


def scale_of(records: Sequence[Record]) -> tuple[float, float]:
    """Mean and standard deviation of the numbers of a training set.

    Raises:
        IngraftError: they are all the same.
    """
    values = [record.value for record in records if isinstance(record, Measured)]
    deviation = statistics.pstdev(values)
    if not deviation > 0:
        raise IngraftError(f"All rows have the one label {values[0]:g}; there is nothing to learn from them.")
    return statistics.fmean(values), deviation


def about_numbers(records: Sequence[Measured]) -> list[str]:
    """What a report says of the numbers of a part."""
    values = [record.value for record in records]
    mean, deviation = statistics.fmean(values), statistics.pstdev(values)
    return [f"labels: from {min(values):g} to {max(values):g}, mean {mean:.4g}, standard deviation {deviation:.4g}"]


def about_several(records: Sequence[Multilabelled]) -> list[str]:
    """What a report says of how many labels the rows of a part have."""
    counts = Counter(len(record.labels) for record in records)
    return ["labels a row: " + ", ".join(f"{many} in {counts[many]} rows" for many in sorted(counts))]
