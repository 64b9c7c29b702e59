"""Words with a tag each, as tokens.

Words are cut into tokens one by one, so that no token belongs to two words. The first token of a word carries its tag and the others are not learned,
as is usual: a tag is decided once a word, and long words do not count more than short ones. A word gets the space that stands before it in running
text, because byte-level tokenizers know most words with it; between characters of scripts without spaces there is none.

A word that `max_length` cuts away, or of which the tokenizer makes nothing, has no tag to be learned. Both are counted, and when a model is judged they
count as untagged.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import name_of
from ingraft.data.examples import IGNORED, Example, Tally, count_unknown
from ingraft.data.labelled import check_labels, in_order
from ingraft.data.records import Record, Tagged
from ingraft.data.rows import Row
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OUTSIDE = "O"
"""The tag of a word that is part of nothing."""

UNSPACED = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\ufe30-\ufe4f\uff00-\uffef\U00020000-\U0003ffff]")
"""Characters between which no space stands: Chinese and Japanese, their punctuation and full-width forms. (Korean has spaces, and its words come
apart at them; characters of one word do not.)"""

_ENTITY = re.compile(r"[BIESLU]-.+")


def encode_tagged(
    records: Sequence[Tagged],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int,
    *,
    tally: Tally,
) -> list[Example]:
    """Each row as one example, the first token of each word with the number of its tag.

    Raises:
        IngraftError: a tag that is not among `labels`, by file and line; a tokenizer that cannot tell which token is of which word.
    """
    check_labels([record.tags for record in records], rows, labels, "tag")
    if not records:
        return []
    if not tokenizer.is_fast:
        raise IngraftError(
            f"{name_of(tokenizer)}: its tokenizer does not say which token is of which word; use another base."
        )
    numbers = {name: number for number, name in enumerate(labels)}
    words = [spaced(record.tokens) for record in records]
    try:
        whole = tokenizer(words, is_split_into_words=True, verbose=False)
        short = tokenizer(words, is_split_into_words=True, truncation=True, max_length=max_length, verbose=False)
    except AssertionError as error:  # GPT-2's own class wants to be told that words come with a space
        raise IngraftError(f"{name_of(tokenizer)}: its tokenizer refuses words: {error}") from error
    ids = cast("list[list[int]]", short["input_ids"])
    full = cast("list[list[int]]", whole["input_ids"])
    types = cast("list[list[int]] | None", short.get("token_type_ids"))
    count_unknown([" ".join(record.tokens) for record in records], full, tokenizer, tally)
    tally.tokens -= len(records) * tokenizer.num_special_tokens_to_add(pair=False)
    examples: list[Example] = []
    for number, record in enumerate(records):
        begins, there = _first(short.word_ids(number)), {word for word in whole.word_ids(number) if word is not None}
        tally.lengths.append(len(full[number]))
        if len(ids[number]) < len(full[number]):
            tally.shortened.append(number)
            tally.lost.append(rows[number].place)
        tally.more["words cut away at max_length"] += len(there) - sum(word >= 0 for word in begins)
        tally.more["words that the tokenizer makes nothing of"] += len(record.tokens) - len(there)
        tags = [numbers[record.tags[word]] if word >= 0 else IGNORED for word in begins]
        kinds = types[number] if types is not None else None
        examples.append(Example(input_ids=ids[number], labels=tags, words=begins, token_type_ids=kinds, row_id=number))
    return examples


def _first(words: Sequence[int | None]) -> list[int]:
    """Per token the word that it begins, else -1."""
    before = [None, *words[:-1]]
    return [-1 if word is None or word == last else word for word, last in zip(words, before, strict=True)]


def spaced(words: Sequence[str]) -> list[str]:
    """The words, each with the space that stands before it in running text, if one does."""
    found: list[str] = []
    for word in words:
        close = found and UNSPACED.match(word) and UNSPACED.match(found[-1][-1])
        found.append(word if close or not found else f" {word}")
    return found


def sentence(words: Sequence[str]) -> str:
    """The words as running text."""
    return "".join(spaced(words))


def tag_names(records: Sequence[Record]) -> tuple[str, ...]:
    """The tags of a training set, the one for nothing first."""
    names = {tag for record in records if isinstance(record, Tagged) for tag in record.tags}
    return tuple(sorted(in_order(names), key=lambda name: name != OUTSIDE))


def names_entities(tags: Iterable[str]) -> bool:
    """Whether tags mark stretches of words (B-, I- and their like), and not each word for itself, as parts of speech do."""
    found = set(tags) - {OUTSIDE}
    return bool(found) and all(_ENTITY.fullmatch(tag) for tag in found)


def about_tags(records: Sequence[Tagged]) -> list[str]:
    """What a report says of the tags of a part: how many entities of each kind begin in it, or how often each tag stands there."""
    tags = Counter(tag for record in records for tag in record.tags)
    total = sum(tags.values())
    if not names_entities(tags):
        shown = [f"{tag} {count} ({count / total:.0%})" for tag, count in tags.most_common(20)]
        return [f"tags of {total:,} words: " + ", ".join(shown)]
    begun = Counter({tag[2:]: 0 for tag in tags if tag != OUTSIDE})
    begun.update({tag[2:]: count for tag, count in tags.items() if tag[0] in "BSU" and tag != OUTSIDE})
    shown = [f"{kind} {count}" for kind, count in begun.most_common()]
    return [f"entities among {total:,} words: " + (", ".join(shown) or "none")]
