"""Records as token sequences, each token marked as learned or not.

Prompt and answer are tokenised apart and joined. That makes an example token-exact: the model has to continue the
very tokens it will be given when it is asked, also where a tokenizer would have merged the last character of the
prompt with the first of the answer. What it costs: around such a seam the sequence is not the one that a single pass
over the text would give.

A row longer than `max_length` is cut at its end. Cutting the front would take away the question and the template's
opening; a row whose whole answer is cut away is dropped, and both are counted, because a silent loss of data looks
like a bad model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import Segment, begins_with_bos, has_template, segments
from ingraft.data.formats import read_records
from ingraft.data.records import Chat, Document, Labelled, Record
from ingraft.data.rows import Row, RowProblem, refuse
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
"""The label of a token that is read but not learned, as torch's cross entropy understands it."""

LEARN = ("answer", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One sequence ready for a batch.

    Its length is the number of tokens that the row puts through the model.

    Attributes:
        input_ids: the tokens.
        row_id: the row's position among the rows that were encoded (for `lm` the block's number). It names the row in
            logs and seeds its dropout.
        labels: per token its id where it is learned and -100 elsewhere; None for classification.
        label: the class, or among several answers the place; None for language models.
        token_type_ids: 0/1 for the first and second text, for encoders that want it.
    """

    input_ids: list[int]
    row_id: int
    labels: list[int] | None = None
    label: int | None = None
    token_type_ids: list[int] | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def sequences(self) -> tuple[Example, ...]:
        """What goes through the model for this row, each a row of the batch."""
        return (self,)

    @property
    def learned(self) -> int:
        """How many tokens the loss counts; 1 for a classified row. The first token of a sequence is never predicted."""
        return 1 if self.labels is None else sum(label != IGNORED for label in self.labels[1:])

    @property
    def answer(self) -> tuple[int, ...]:
        """What it teaches last: its class, or the last stretch of learned tokens. Rows with equal ones are of one kind."""
        if self.label is not None or self.labels is None:
            return () if self.label is None else (self.label,)
        end = max((i for i, label in enumerate(self.labels) if label != IGNORED), default=len(self.labels) - 1) + 1
        start = end
        while start > 0 and self.labels[start - 1] != IGNORED:
            start -= 1
        return tuple(self.input_ids[start:end])


@dataclass(kw_only=True, slots=True)
class Tally:
    """What encoding did to the rows; filled by the `encode_*` functions, read by the report. Lengths are those
    before cutting.
    """

    lengths: list[int] = field(default_factory=list[int])
    cut: int = 0
    dropped: list[str] = field(default_factory=list[str])
    same: list[str] = field(default_factory=list[str])
    unknown: int = 0
    tokens: int = 0


def encode_sft(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    form: str = "auto",
    learn: str = "answer",
    chat: bool | None = None,
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
        tally: counts rows cut and dropped.

    Raises:
        IngraftError: rows that cannot be used; a template that refuses them; no learned token in any row.
    """
    records = [as_chat(record) for record in read_records(rows, form)[1]]
    return encode_chats(records, rows, tokenizer, max_length, learn=learn, chat=chat, tally=tally)


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
    tally: Tally | None = None,
) -> list[Example]:
    """`encode_sft` for records that were read already; `rows` are their places, in the same order."""
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
    examples: list[Example] = []
    for number, (row, sequence) in enumerate(zip(rows, pieces, strict=True)):
        ids = [token for tokens, _ in sequence for token in tokens]
        labels = [token if learned else IGNORED for tokens, learned in sequence for token in tokens]
        tally.lengths.append(len(ids))
        tally.cut += len(ids) > max_length
        example = Example(input_ids=ids[:max_length], labels=labels[:max_length], row_id=number)
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
    """The tokens of each text, without added special tokens and without the warning about long sequences."""
    if not texts:
        return []
    return cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])


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
    *,
    tally: Tally | None = None,
) -> list[Example]:
    """`encode_classify` for records that were read already."""
    tally = Tally() if tally is None else tally
    numbers = {name: number for number, name in enumerate(labels)}
    unknown = [(row, record) for row, record in zip(rows, records, strict=True) if record.label not in numbers]
    if unknown:
        known = ", ".join(list(numbers)[:20]) + (", ..." if len(numbers) > 20 else "")
        refuse(
            [
                f"{row.place}: label '{record.label}' is unknown{nearest(record.label, numbers, count=1)}"
                for row, record in unknown
            ],
            summary=f"{len(unknown)} rows have a label that the training data does not have. Known labels: {known}.",
        )
    firsts = [record.text for record in records]
    seconds = (
        [record.text2 or "" for record in records] if any(record.text2 is not None for record in records) else None
    )
    examples: list[Example] = []
    if not firsts:
        return examples
    whole = tokenizer(firsts, seconds, verbose=False)
    both = [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)] if seconds else firsts
    count_unknown(both, cast("list[list[int]]", whole["input_ids"]), tokenizer, tally)
    tally.tokens -= len(both) * tokenizer.num_special_tokens_to_add(
        pair=seconds is not None
    )  # they are no part of the text
    short = tokenizer(firsts, seconds, truncation=True, max_length=max_length, verbose=False)
    types = cast("list[list[int]] | None", short.get("token_type_ids"))
    sequences = zip(
        cast("list[list[int]]", short["input_ids"]), cast("list[list[int]]", whole["input_ids"]), records, strict=True
    )
    for number, (ids, full, record) in enumerate(sequences):
        tally.lengths.append(len(full))
        tally.cut += len(ids) < len(full)
        kinds = types[number] if types is not None else None
        examples.append(Example(input_ids=ids, label=numbers[record.label], token_type_ids=kinds, row_id=number))
    return examples


def label_names(records: Sequence[Record]) -> tuple[str, ...]:
    """The classes of a training set in a stable order: by number when all are numbers, else alphabetically."""
    names = {record.label for record in records if isinstance(record, Labelled)}
    numeric = all(name.lstrip("-").isdecimal() for name in names)
    return tuple(sorted(names, key=(lambda name: (int(name), name)) if numeric else (lambda name: (0, name))))
