"""Records as token sequences, each token marked as learned or not.

Prompt and answer are tokenised apart and joined. That makes an example token-exact: the model has to continue the
very tokens it will be given when it is asked, also where a tokenizer would have merged the last character of the
prompt with the first of the answer. What it costs: around such a seam the sequence is not the one that a single pass
over the text would give.

What a row longer than `max_length` loses is `cutting`'s to say; a row without anything left to learn is dropped, and both are counted, because a silent loss of data
looks like a bad model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, cast

from ingraft.data.chat import Segment, begins_with_bos, has_template, segments
from ingraft.data.cutting import Piece, fitted, learned, length
from ingraft.data.formats import read_records
from ingraft.data.records import Chat, Document, Labelled, Record
from ingraft.data.rows import Row, RowProblem, refuse
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is read but not learned, as torch's cross entropy understands it."""

LEARN = ("answer", "all")

CHUNK = 2048
"""Texts in one call of a tokenizer."""


class Lazy(Protocol):
    """What a row gives a model beside tokens, too large to be kept: it is made when a batch is."""

    @property
    def content(self) -> str:
        """What decides it: rows with equal ones are the same."""
        ...

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """The model's inputs of this one row, by their names in a batch, which has one dimension more."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence ready for a batch.

    Its length is the number of tokens that the row puts through the model; what is made later counts as one.

    Attributes:
        input_ids: the tokens; none where all that the model is given is made later.
        lazy: what is made when a batch is; None where there is nothing.
        row_id: the row's position among the rows that were encoded (for `lm` the block's number). It names the row in
            logs and seeds its dropout.
        labels: per token what is learned of it (its id, or its tag's number) and -100 where that is nothing; None where no token is learned.
        target: the tokens that a decoder writes where an encoder reads `input_ids`; None where there is no such decoder.
        label: the class of the row, or among several answers the place; None where it has neither.
        values: the numbers that the row should get (0 or 1 for each class of several); None where it gets none.
        span: the first and the last token of the answer, (0, 0) where it is not in the sequence; None where none is looked for.
        words: per token the number of the word that it begins, else -1; None where words have no tags.
        characters: per token its first character in the context and the one behind its last, (-1, -1) for tokens of something else; None where
            there is no context.
        token_type_ids: 0/1 for the first and second text, for encoders that want it.
    """

    input_ids: list[int]
    row_id: int
    labels: list[int] | None = None
    target: list[int] | None = None
    label: int | None = None
    values: tuple[float, ...] | None = None
    span: tuple[int, int] | None = None
    words: list[int] | None = None
    characters: list[tuple[int, int]] | None = None
    token_type_ids: list[int] | None = None
    lazy: Lazy | None = None

    def __len__(self) -> int:
        return len(self.input_ids) + len(self.target or ()) + (self.lazy is not None)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What goes through the model for this row, each a row of the batch."""
        return (self,)

    def moved(self, by: int) -> Example:
        """The same as a row of another number."""
        return replace(self, row_id=self.row_id + by)

    @property
    def kind(self) -> tuple[bool, ...]:
        """What it has; rows of one batch have the same."""
        fields = (self.labels, self.target, self.label, self.values, self.span, self.token_type_ids, self.lazy)
        return tuple(field is None for field in fields)

    @property
    def learned(self) -> int:
        """How many terms the loss has: learned tokens, or 1 for a row. The first token of a text to be written is never predicted."""
        if self.labels is None:
            return 1 if self.target is None else len(self.target)
        return sum(label != IGNORED for label in (self.labels[1:] if self.words is None else self.labels))

    @property
    def answer(self) -> tuple[float, ...]:
        """What it teaches: its class, numbers, place or kinds of tags, or the last stretch of learned tokens. Rows with equal ones are of one kind."""
        if self.target is not None:
            return tuple(self.target)
        if self.label is not None or self.labels is None:
            return (self.label,) if self.label is not None else self.values or self.span or ()
        if self.words is not None:
            return tuple(sorted({label for label in self.labels if label != IGNORED}))
        end = max((i for i, label in enumerate(self.labels) if label != IGNORED), default=len(self.labels) - 1) + 1
        start = end
        while start > 0 and self.labels[start - 1] != IGNORED:
            start -= 1
        return tuple(self.input_ids[start:end])


@dataclass(kw_only=True, slots=True)
class Tally:
    """What encoding did to the rows; filled by the `encode_*` functions, read by the report. Lengths are those
    before cutting. `shortened` are the numbers of rows that were cut, `lost` the places of those that lost something to be learned, `long` of those that were
    left out for their length. `more` are counts that only some tasks have, by what they count.
    """

    lengths: list[int] = field(default_factory=list[int])
    shortened: list[int] = field(default_factory=list[int])
    lost: list[str] = field(default_factory=list[str])
    long: list[str] = field(default_factory=list[str])
    dropped: list[str] = field(default_factory=list[str])
    same: list[str] = field(default_factory=list[str])
    unknown: int = 0
    tokens: int = 0
    more: Counter[str] = field(default_factory=Counter[str])

    @property
    def cut(self) -> int:
        """How many rows were cut."""
        return len(self.shortened)

    def add(self, other: Tally) -> None:
        """Count what was counted there as well."""
        self.lengths += other.lengths
        self.dropped += other.dropped
        self.same += other.same
        self.shortened += other.shortened
        self.lost += other.lost
        self.long += other.long
        self.unknown += other.unknown
        self.tokens += other.tokens
        self.more += other.more


def encode_sft(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    form: str = "auto",
    learn: str = "answer",
    chat: bool | None = None,
    truncation: str = "keep_answer",
    tally: Tally | None = None,
) -> list[Example]:
    """Supervised fine-tuning: the answers of conversations, instructions and completions.

    Args:
        rows: rows as read.
        tokenizer: with its chat template, else the default template is used.
        max_length: longest sequence, in tokens.
        form: a format's name or `auto`.
        learn: `answer` or `all`.
        chat: whether bare prompt and completion rows become a conversation; None does so when the tokenizer has a
            template.
        truncation: what is left of longer rows, see `cutting`.
        tally: counts rows cut and dropped.

    Raises:
        IngraftError: rows that cannot be used; a template that refuses them; no learned token in any row.
    """
    records = [as_chat(record) for record in read_records(rows, form)[1]]
    return encode_chats(
        records, rows, tokenizer, max_length, learn=learn, chat=chat, truncation=truncation, tally=tally
    )


def as_chat(record: Record) -> Chat | None:
    """The record as a conversation, or None where it has none. A label is learned as the answer to its text."""
    if isinstance(record, Chat):
        return record
    if isinstance(record, Labelled):
        question = record.text if record.text2 is None else f"{record.text}\n\n{record.text2}"
        return Chat(messages=({"role": "user", "content": question}, {"role": "assistant", "content": record.label}))
    return None


def encode_chats(
    records: Sequence[Chat | None],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    learn: str = "answer",
    chat: bool | None = None,
    truncation: str = "keep_answer",
    tally: Tally | None = None,
) -> list[Example]:
    """`encode_sft` for records that were read already; `rows` are their places, in the same order. truncation: see `cutting`."""
    if learn not in LEARN:
        raise IngraftError(f"learn must be 'answer' or 'all', not '{learn}'{nearest(learn, LEARN)}.")
    tally = Tally() if tally is None else tally
    with_chat = has_template(tokenizer) if chat is None else chat
    parts: list[list[Segment]] = []
    problems: list[str] = []
    for row, record in zip(rows, records, strict=True):
        try:
            if record is None:
                raise RowProblem("this form of row holds no answer to learn; plain text is for `--task lm`")
            parts.append(segments(record, tokenizer, learn=learn, chat=with_chat))
        except RowProblem as problem:
            problems.append(f"{row.place}: {problem}")
    if problems:
        refuse(problems, summary=f"{len(problems)} of {len(rows)} rows cannot be rendered:")

    pieces = encode_pieces(parts, tokenizer, tally)
    begin = cast("int | None", tokenizer.bos_token_id)
    examples: list[Example] = []
    for number, (row, sequence) in enumerate(zip(rows, pieces, strict=True)):
        kept = cut(sequence, max_length, truncation, begin, tally, number, row)
        ids = [token for tokens, _ in kept for token in tokens]
        labels = [token if counts else IGNORED for tokens, counts in kept for token in tokens]
        example = Example(input_ids=ids, labels=labels, row_id=number)
        if example.learned:
            examples.append(example)
        else:
            tally.dropped.append(row.place)
    if rows and not examples:
        raise IngraftError(
            f"{rows[0].file}: none of the {len(rows)} rows has a learned token within max_length {max_length}, so there is nothing to train on. "
            + ("Raise --data.max-length, shorten" if max_length < tokenizer.model_max_length else "Shorten")
            + " the prompts, or learn every token with --data.learn all."
        )
    return examples


def cut(
    pieces: Sequence[Piece], most: int, truncation: str, begin: int | None, tally: Tally, number: int, row: Row
) -> list[Piece]:
    """A row's pieces, as `cutting.fitted`, and what was done to them counted."""
    kept = fitted(pieces, most, truncation, begin)
    tally.lengths.append(length(pieces))
    if kept != list(pieces):
        tally.shortened.append(number)
        if learned(kept) < learned(pieces):
            tally.lost.append(row.place)
    return kept


def encode_pieces(
    parts: Sequence[Sequence[Segment]], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> list[list[tuple[list[int], bool]]]:
    """Each segment's tokens; all segments in one call, because a fast tokenizer spreads a large call over the cores."""
    flat = [(segment, position > 0) for sequence in parts for position, segment in enumerate(sequence)]
    encoded = iter(_encode_parts(flat, tokenizer, tally))
    return [[(next(encoded), segment.learned) for segment in sequence] for sequence in parts]


def _encode_parts(
    flat: Sequence[tuple[Segment, bool]], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> list[list[int]]:
    texts = [segment.text for segment, _ in flat]
    ids = token_ids(texts, tokenizer)
    count_unknown(texts, ids, tokenizer, tally)
    if not _adds_a_space(tokenizer):
        return ids
    # SentencePiece tokenizers of the older kind put a space before every text. A continuation must not get one, so it
    # is encoded behind a line break whose tokens are taken off again.
    lead = token_ids(["\n"], tokenizer)[0]
    behind = token_ids([f"\n{segment.text}" if later else segment.text for segment, later in flat], tokenizer)
    joined = zip(behind, ids, flat, strict=True)
    return [seen[len(lead) :] if later and seen[: len(lead)] == lead else alone for seen, alone, (_, later) in joined]


def _adds_a_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    lead, pair = token_ids(["\n", "\na"], tokenizer)
    return pair[: len(lead)] == lead and pair[len(lead) :] != token_ids(["a"], tokenizer)[0]


def token_ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids without the tokenizer's own special tokens."""
    found: list[list[int]] = []
    for some in chunks(texts):
        found += cast("list[list[int]]", tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"])
    return found


def chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    """So many at once as keep all cores busy. What a tokenizer returns beside the ids takes several times their room, and is given back after each chunk."""
    for start in range(0, len(texts), CHUNK):
        yield list(texts[start : start + CHUNK])


def count_unknown(
    texts: Sequence[str], ids: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> None:
    """Add these texts' tokens, and those that stand for something the tokenizer does not know, to the tally.

    Byte-level tokenizers know every text and often name their end token as the unknown one, and a text may spell
    `<unk>` itself (WikiText does): neither counts.
    """
    tally.tokens += sum(map(len, ids))
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return
    for text, tokens in zip(texts, ids, strict=True):
        if count := sum(token == unknown for token in tokens):
            tally.unknown += max(0, count - text.count(str(tokenizer.unk_token)))


def encode_lm(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    form: str = "auto",
    tally: Tally | None = None,
) -> list[Example]:
    """Language modelling: all text of `rows`, one document after another, cut into blocks of `max_length`; every
    token is learned.

    Neighbouring lines of a text file are one document. The end token stands between documents, and the last, shorter
    block is kept.

    Raises:
        IngraftError: rows that hold no plain text, or no text at all.
    """
    chosen, records = read_records(rows, form)
    if chosen.meaning is not Document:
        raise IngraftError(
            f"{rows[0].file}: task lm learns plain text ({{text}} rows or a text file); these are {chosen.name} rows."
        )
    return encode_documents(cast("list[Document]", records), rows, tokenizer, max_length, tally=tally)


def encode_documents(
    records: Sequence[Document],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    tally: Tally | None = None,
) -> list[Example]:
    """`encode_lm` for records that were read already."""
    tally = Tally() if tally is None else tally
    texts = join_lines(records, rows)
    ids = token_ids(texts, tokenizer)
    count_unknown(texts, ids, tokenizer, tally)
    begin = [cast("int", tokenizer.bos_token_id)] if begins_with_bos(tokenizer) else []
    end = [cast("int", tokenizer.eos_token_id)] if tokenizer.eos_token_id is not None else []
    stream = [token for tokens in ids for token in (*begin, *tokens, *end)]
    blocks = [stream[start : start + max_length] for start in range(0, len(stream), max_length)]
    blocks = [block for block in blocks if len(block) > 1]  # a lone token has nothing to predict
    if not blocks:
        raise IngraftError(f"{rows[0].file if rows else 'The data'}: no text to learn from.")
    tally.lengths += map(len, blocks)
    return [Example(input_ids=block, labels=list(block), row_id=n) for n, block in enumerate(blocks)]


def join_lines(records: Sequence[Document], rows: Sequence[Row]) -> list[str]:
    """The documents: each record one, except that lines of one text file are joined, with the blank lines that
    stood between them.
    """
    documents: list[list[str]] = []
    before: Row | None = None
    for row, record in zip(rows, records, strict=True):
        if record.line_of_file and before is not None and before.file == row.file and row.line > before.line:
            documents[-1].append("\n" * (row.line - before.line) + record.text)
        elif record.text.strip():
            documents.append([record.text])
        before = row if record.line_of_file else None
    return ["".join(parts) for parts in documents]
