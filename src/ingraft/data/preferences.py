"""Rows with several answers to one prompt, or with a judgement of one, as token sequences.

A row goes through the model as one sequence an answer, and stays one row for everything else: it is shuffled, counted and dropped as a whole. The
prompt is rendered once and is the same tokens before each of its answers, those that `encode_prompt` gives to whoever generates; only the
last turn is learned.

*Cutting.* The prompt of a row is cut once, to what its longest answer leaves (`cutting`), so the prompt of two answers is never cut differently. `keep_start`, and
what an encoder reads as a pair of texts, cut the end of each answer instead and never a token of the prompt; a row whose prompt leaves room for no answer is then dropped. Answers that are the same afterwards (or were written the same)
have nothing to tell apart: all but the first of them go, and a row that is left without two answers of different places is dropped.
Both are counted, with file and line.

*Judged answers* (KTO) need to know how far the policy has moved from the reference on answers that nobody judged. Each gets the answer of another
row as its second sequence: one of another prompt, drawn once for the whole data set, so that the same rows are the same numbers in any batch.

*Encoders* read prompt and answer as their pair of texts, with the tokenizer's own special tokens between, where a tokenizer has no chat template
and puts such tokens round what it reads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from ingraft.data.chat import Segment, has_template, name_of, segments
from ingraft.data.cutting import fitted, learned, length
from ingraft.data.examples import IGNORED, Example, Tally, count_unknown, encode_pieces
from ingraft.data.records import Chat, Judged, Message, Preference, Ranking, given
from ingraft.data.rows import Row, RowProblem, refuse
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.data.records import Record


UNJUDGED = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared(Example):
    """One row of several sequences: itself and those beside it.

    A sequence's `label` is the place of its answer, 1 the best. Of a judged answer it is 1 where that was found good and 0 where not, and `UNJUDGED`
    for the one beside it.

    Attributes:
        beside: the further sequences.
    """

    beside: tuple[Example, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids) + sum(map(len, self.beside))

    @property
    def own(self) -> Example:
        """The first sequence alone: the best answer, or the judged one."""
        return Example(
            input_ids=self.input_ids,
            labels=self.labels,
            label=self.label,
            token_type_ids=self.token_type_ids,
            row_id=self.row_id,
        )

    def moved(self, by: int) -> Compared:
        return replace(self, row_id=self.row_id + by, beside=tuple(one.moved(by) for one in self.beside))

    @property
    def sequences(self) -> tuple[Example, ...]:
        return (self.own, *self.beside)

    @property
    def places(self) -> tuple[int, ...]:
        """The label of each sequence."""
        return tuple(-1 if one.label is None else one.label for one in self.sequences)

    @property
    def learned(self) -> int:
        return sum(one.learned for one in self.sequences)


def encode_preferences(
    records: Sequence[Record],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    whole: bool = False,
    truncation: str = "keep_answer",
    tally: Tally | None = None,
) -> list[Compared]:
    """Pairs and rankings, the best answer first.

    Args:
        records: `Preference` or `Ranking`; `rows` are their places, in the same order.
        whole: for a model that reads the whole and says one number (a reward model): no token is learned.

    Raises:
        IngraftError: a template refuses rows or shows a prompt differently before its answers; no row is left.
    """
    tally = Tally() if tally is None else tally
    answers = [answers_of(record) for record in records]
    prompts = [cast("Preference | Ranking", record).messages for record in records]
    encoded = _encode(
        prompts, [[text for text, _ in row] for row in answers], rows, tokenizer, max_length, truncation, tally
    )
    examples: list[Compared] = []
    for number, (row, ranked, found) in enumerate(zip(rows, answers, encoded, strict=True)):
        if found is None:
            continue
        kept: dict[tuple[int, ...], Example] = {}
        for one, (_, place) in zip(found, ranked, strict=True):
            kept.setdefault(tuple(one.input_ids), _named(one, number, place, whole=whole))
        if len({one.label for one in kept.values()}) > 1:
            examples.append(_joined(list(kept.values())))
        else:
            tally.same.append(row.place)
    _require(examples, rows, max_length, tokenizer, tally)
    return examples


def encode_judged(
    records: Sequence[Record],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    truncation: str = "keep_answer",
    tally: Tally | None = None,
) -> list[Compared]:
    """Judged answers, each beside the answer of another row.

    Raises:
        IngraftError: as `encode_preferences`.
    """
    tally = Tally() if tally is None else tally
    judged = [cast("Judged", record) for record in records]
    others = _others([given(record) for record in judged])
    pairs = [[record.completion, judged[other].completion] for record, other in zip(judged, others, strict=True)]
    encoded = _encode([r.messages for r in judged], pairs, rows, tokenizer, max_length, truncation, tally)
    examples: list[Compared] = []
    for number, (record, other, found) in enumerate(zip(judged, others, encoded, strict=True)):
        if found is not None:
            own, beside = _named(found[0], number, int(record.good)), _named(found[1], number, UNJUDGED)
            examples.append(_joined([own] if other == number else [own, beside]))
    _require(examples, rows, max_length, tokenizer, tally)
    return examples


def encode_answers(
    records: Sequence[Record],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    *,
    tally: Tally | None = None,
) -> list[list[Example]]:
    """Every answer of every row, in the row's own order, for a model that reads the whole; of a conversation its last turn is the answer.

    Raises:
        IngraftError: a row without an answer, or whose prompt leaves it no room.
    """
    tally = Tally() if tally is None else tally
    prompts: list[tuple[Message, ...]] = []
    answers: list[list[str]] = []
    problems: list[str] = []
    for row, record in zip(rows, records, strict=True):
        if isinstance(record, Chat) and record.messages[-1]["role"] == "assistant":
            prompts.append(record.messages[:-1])
            answers.append([record.messages[-1]["content"]])
        elif isinstance(record, Preference | Ranking | Judged):
            prompts.append(record.messages)
            in_order = list(record.answers) if isinstance(record, Ranking) else [text for text, _ in answers_of(record)]
            answers.append(in_order)
        else:
            problems.append(f"{row.place}: it has no answer")
    if problems:
        refuse(problems, summary=f"{len(problems)} of {len(rows)} rows have no answer to judge:")
    encoded = _encode(prompts, answers, rows, tokenizer, max_length, "keep_answer", tally)
    if tally.dropped:
        refuse(
            tally.dropped,
            summary=f"The prompts of {len(tally.dropped)} rows leave no room for an answer within {max_length} tokens:",
        )
    return [[_named(one, number, 0, whole=True) for one in found or []] for number, found in enumerate(encoded)]


def answers_of(record: Record) -> list[tuple[str, int]]:
    """The answers with their places, the best first."""
    if isinstance(record, Preference):
        return [(record.chosen, 1), (record.rejected, 2)]
    if isinstance(record, Judged):
        return [(record.completion, 1)]
    assert isinstance(record, Ranking)
    return sorted(zip(record.answers, record.places, strict=True), key=lambda answer: answer[1])


def _others(prompts: Sequence[str]) -> list[int]:
    """For each row another one, of another prompt where there is one; each row is given about once."""
    order = list(range(len(prompts)))
    random.Random(f"ingraft judged {len(prompts)}").shuffle(order)
    found = list(order)
    for at, own in enumerate(order):
        ahead = (order[(at + step) % len(order)] for step in range(1, len(order)))
        found[own] = next((other for other in ahead if prompts[other] != prompts[own]), order[(at + 1) % len(order)])
    return found


def _encode(
    prompts: Sequence[tuple[Message, ...]],
    answers: Sequence[Sequence[str]],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str,
    tally: Tally,
) -> list[list[Example] | None]:
    """The sequences of each row, cut; None where the prompt leaves an answer no room."""
    if _reads_pairs(tokenizer):
        sequences = _pairs_of_texts(prompts, answers, tokenizer, max_length, tally)
    else:
        sequences = _conversations(prompts, answers, rows, tokenizer, max_length, truncation, tally)
    found: list[list[Example] | None] = []
    for number, (row, (longest, lost, examples)) in enumerate(zip(rows, sequences, strict=True)):
        tally.lengths.append(longest)
        if longest > max_length:
            tally.shortened.append(number)
        fits = all(example.learned for example in examples)
        if not fits:
            tally.dropped.append(row.place)
        elif lost:
            tally.lost.append(row.place)
        found.append(examples if fits else None)
    return found


def _conversations(
    prompts: Sequence[tuple[Message, ...]],
    answers: Sequence[Sequence[str]],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    truncation: str,
    tally: Tally,
) -> list[tuple[int, bool, list[Example]]]:
    """Of each row its longest sequence before cutting, whether an answer was cut, and its sequences."""
    parts: list[tuple[Segment, Segment]] = []
    problems: list[str] = []
    for row, prompt, texts in zip(rows, prompts, answers, strict=True):
        try:
            parts += _one_prompt([_rendered(prompt, text, tokenizer) for text in texts], tokenizer)
        except RowProblem as problem:
            problems.append(f"{row.place}: {problem}")
    if problems:
        refuse(problems, summary=f"{len(problems)} of {len(rows)} rows cannot be rendered:")
    pieces = iter(encode_pieces(parts, tokenizer, tally))
    found: list[tuple[int, bool, list[Example]]] = []
    begin = cast("int | None", tokenizer.bos_token_id)
    for texts in answers:
        whole = [[(asked, False), (said, True)] for (asked, _), (said, _) in (next(pieces) for _ in texts)]
        longest = max(whole, key=length)
        kept = fitted(longest, max_length, truncation, begin)
        prompt = [piece for piece in kept if not piece[1]]
        examples: list[Example] = []
        lost = False
        for _, (said, _) in whole:
            row = fitted([*prompt, (said, True)], max_length, "keep_start")
            lost |= learned(row) < len(said)
            ids = [token for tokens, _ in row for token in tokens]
            labels = [token if counts else IGNORED for tokens, counts in row for token in tokens]
            examples.append(Example(input_ids=ids, labels=labels, row_id=0))
        found.append((length(longest), lost, examples))
    return found


def _rendered(prompt: Sequence[Message], answer: str, tokenizer: PreTrainedTokenizerBase) -> tuple[Segment, Segment]:
    """The text before the last turn, and that turn with the token that ends it; what a template puts behind it is left out."""
    turns = Chat(messages=(*prompt, {"role": "assistant", "content": answer}))
    parts = segments(turns, tokenizer)
    last = max(i for i, part in enumerate(parts) if part.learned)
    return Segment(text="".join(part.text for part in parts[:last]), learned=False), parts[last]


def _one_prompt(
    rendered: Sequence[tuple[Segment, Segment]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[Segment, Segment]]:
    """The same with one prompt before all answers. Blanks that stand before some only belong to the answer."""
    prompt = min((asked.text for asked, _ in rendered), key=len)
    if any(asked.text.rstrip() != prompt.rstrip() or not asked.text.startswith(prompt) for asked, _ in rendered):
        raise RowProblem(f"the chat template of {name_of(tokenizer)} shows the prompt differently before each answer")
    return [
        (Segment(text=prompt, learned=False), Segment(text=asked.text[len(prompt) :] + said.text, learned=True))
        for asked, said in rendered
    ]


def _reads_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    return not has_template(tokenizer) and tokenizer.num_special_tokens_to_add(pair=True) > 1


def _pairs_of_texts(
    prompts: Sequence[tuple[Message, ...]],
    answers: Sequence[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    tally: Tally,
) -> list[tuple[int, bool, list[Example]]]:
    firsts = [_plain(prompt) for prompt, texts in zip(prompts, answers, strict=True) for _ in texts]
    seconds = [text for texts in answers for text in texts]
    whole = cast("list[list[int]]", tokenizer(firsts, seconds, verbose=False)["input_ids"])
    alone = cast("list[list[int]]", tokenizer(firsts, verbose=False, add_special_tokens=False)["input_ids"])
    count_unknown([f"{a} {b}" for a, b in zip(firsts, seconds, strict=True)], whole, tokenizer, tally)
    added = tokenizer.num_special_tokens_to_add(pair=True)
    tally.tokens -= added * len(whole)
    fits = [len(ids) + added < max_length for ids in alone]
    short = tokenizer(
        [text if fit else "" for text, fit in zip(firsts, fits, strict=True)],
        seconds,
        truncation="only_second",
        max_length=max_length,
        verbose=False,
    )
    ids, kinds = (
        cast("list[list[int]]", short["input_ids"]),
        cast("list[list[int]] | None", short.get("token_type_ids")),
    )
    made = iter(
        # Nothing learned is how a sequence says that its prompt left no room.
        Example(
            input_ids=ids[i],
            labels=None if fits[i] else [IGNORED] * len(ids[i]),
            token_type_ids=kinds[i] if kinds else None,
            row_id=0,
        )
        for i in range(len(ids))
    )
    lengths = iter(map(len, whole))
    most = [max(next(lengths) for _ in texts) for texts in answers]
    return [(size, size > max_length, [next(made) for _ in texts]) for size, texts in zip(most, answers, strict=True)]


def _plain(messages: Sequence[Message]) -> str:
    """A conversation for a base without a template: the words of a single turn, else each turn behind its role."""
    if len(messages) == 1:
        return messages[0]["content"]
    return "\n".join(f"{message['role']}: {message['content']}" for message in messages)


def _named(example: Example, row_id: int, label: int, *, whole: bool = False) -> Example:
    """The sequence as one of a row. whole: without learned tokens."""
    return replace(example, row_id=row_id, label=label, labels=None if whole else example.labels)


def _joined(sequences: Sequence[Example]) -> Compared:
    own, *beside = sequences
    return Compared(
        input_ids=own.input_ids,
        labels=own.labels,
        label=own.label,
        token_type_ids=own.token_type_ids,
        row_id=own.row_id,
        beside=tuple(beside),
    )


def _require(
    examples: Sequence[Compared], rows: Sequence[Row], max_length: int, tokenizer: PreTrainedTokenizerBase, tally: Tally
) -> None:
    if not rows or examples:
        return
    longer = "Raise --data.max-length, or shorten" if max_length < tokenizer.model_max_length else "Shorten"
    raise IngraftError(
        f"{rows[0].file}: none of the {len(rows)} rows is of use: in {len(tally.dropped)} the prompt leaves an answer no room within max_length "
        f"{max_length}, and in {len(tally.same)} the answers are the same. {longer} the prompts, and look at the answers."
    )
