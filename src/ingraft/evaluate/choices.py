"""A chat model as a classifier: which of the given answers does it find likeliest?

The score of an answer is the log-likelihood of its tokens after the prompt, exactly as training would show them. What follows every answer
alike (the end of the turn) is left out: then answers of one token each, such as label words, need one forward pass for all of them.

Summed by default, which is the model's own probability of the answer. Answers of very different length can be compared per token instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ingraft.data.cutting import middle_out
from ingraft.data.examples import IGNORED, Example, as_chat, encode_chats
from ingraft.data.records import Chat, Labelled
from ingraft.data.rows import Row
from ingraft.evaluate.classes import macro_f1
from ingraft.evaluate.head import CausalHead, Seen
from ingraft.evaluate.loss import LossScores, Poll, by_length, device_of, score_loss
from ingraft.evaluate.modes import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.data import DataSet

Normalise = Literal["sum", "tokens"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceRow:
    """A prompt and the answers to choose from, as tokens.

    Attributes:
        prompt: the tokens before the answer.
        choices: one sequence of tokens for each answer, none empty.
        answer: the position of the right one.
        row_id: the row it came from.
    """

    prompt: list[int]
    choices: tuple[tuple[int, ...], ...]
    answer: int
    row_id: int

    def __len__(self) -> int:
        return len(self.prompt)


@dataclass(frozen=True, kw_only=True)
class ChoiceScores:
    """Scores of some rows' answers.

    Attributes:
        scores: per row and answer, the log-likelihood in nats (per token if normalised so).
        answers: per row, the right one.
    """

    scores: tuple[tuple[float, ...], ...]
    answers: tuple[int, ...]

    @property
    def predictions(self) -> tuple[int, ...]:
        """Per row, the likeliest answer; the first of equals."""
        return tuple(max(range(len(row)), key=row.__getitem__) for row in self.scores)

    @property
    def accuracy(self) -> float:
        """The share of rows whose likeliest answer is the right one."""
        return sum(p == y for p, y in zip(self.predictions, self.answers, strict=True)) / max(1, len(self.answers))

    @property
    def macro_f1(self) -> float:
        """F1 averaged over the answers."""
        return macro_f1(self.predictions, self.answers)


def choice_rows(
    records: Sequence[Labelled],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    labels: Sequence[str],
    max_length: int = 512,
) -> list[ChoiceRow]:
    """Rows of text and label as prompts with one answer a label, encoded as training encodes them.

    A long prompt loses its middle, so that every label stays whole within `max_length`. A row that is longer than what the base reads is left out.
    """
    options = [[as_chat(replace(record, label=label)) for record in records] for label in labels]
    right = [labels.index(record.label) for record in records]
    return choices_between(options, right, rows, tokenizer, min(max_length, tokenizer.model_max_length))


def choices_between(
    options: Sequence[Sequence[Chat | None]],
    right: Sequence[int],
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> list[ChoiceRow]:
    """Conversations that differ in their last answer, as choices between that.

    Args:
        options: by answer, each row's conversation that ends in it. right: by row, the position of its answer. rows: where they come from.
    """
    most = max(max_length, tokenizer.model_max_length)
    encoded = [{e.row_id: e for e in encode_chats(chats, rows, tokenizer, most)} for chats in options]
    found: list[ChoiceRow] = []
    for number, answer in enumerate(right):
        examples = [option.get(number) for option in encoded]
        whole = [e for e in examples if e is not None and len(e) < most]
        answers = [tuple(e.input_ids[_start(e) : _end(e)]) for e in whole]
        room = max_length - max(map(len, answers), default=0)
        if len(whole) == len(options) and room > 0:
            prompt = middle_out(whole[0].input_ids[: _start(whole[0])], room)  # one for all answers, the longest too
            found.append(ChoiceRow(prompt=prompt, choices=_without_tail(answers), answer=answer, row_id=number))
    return found


MOST_LABELS = 20
"""Above so many labels, scoring each of them as an answer takes too long to do by the way."""


def choices_of(data: DataSet, part: str, tokenizer: PreTrainedTokenizerBase) -> list[ChoiceRow]:
    """The rows of a part as choices between label words; none where they are no rows of text and label, or there is no such part."""
    if part not in data.parts:
        return []
    rows, records = data.parts[part].rows, data.parts[part].records
    labelled = [record for record in records if isinstance(record, Labelled)]
    known = sorted({r.label for each in data.parts.values() for r in each.records if isinstance(r, Labelled)})
    if len(labelled) != len(records) or not 2 <= len(known) <= MOST_LABELS:
        return []
    return choice_rows(labelled, rows, tokenizer, known, data.report.max_length)


def score_choices(
    model: nn.Module,
    rows: Sequence[ChoiceRow],
    pad_id: int,
    batch_size: int = 8,
    normalise: Normalise = "sum",
    poll: Poll | None = None,
) -> ChoiceScores:
    """The log-likelihood of every answer of every row. Equal calls give equal bits.

    Args:
        model: a causal language model, with whatever adapters act.
        normalise: "sum", or "tokens" to divide by the answer's tokens.
        poll: called between batches; may raise to stop.
    """
    scores = (
        _of_single_tokens(model, rows, pad_id, batch_size, poll)
        if all(map(_single, rows))
        else _of_sequences(model, rows, pad_id, batch_size, poll)
    )
    if normalise == "tokens":
        scores = [
            [s / len(c) for s, c in zip(line, row.choices, strict=True)] for line, row in zip(scores, rows, strict=True)
        ]
    return ChoiceScores(scores=tuple(map(tuple, scores)), answers=tuple(row.answer for row in rows))


def score_along(
    model: nn.Module,
    examples: Sequence[Example],
    rows: Sequence[ChoiceRow],
    pad_id: int,
    batch_size: int = 8,
    poll: Poll | None = None,
) -> tuple[LossScores, ChoiceScores]:
    """The losses of examples and the scores of the same rows as choices, from one forward a row where that is possible: where every answer is
    one token and the example is the row's prompt with an answer behind it. Elsewhere, one after the other.
    """
    place = {example.row_id: index for index, example in enumerate(examples)}
    if not all(_single(row) and _continues(examples, place.get(row.row_id), row) for row in rows):
        losses = score_loss(model, examples, pad_id, batch_size, poll)
        return losses, score_choices(model, rows, pad_id, batch_size, poll=poll)
    row_at = {place[row.row_id]: number for number, row in enumerate(rows)}
    scores: list[list[float]] = [[] for _ in rows]

    def visit(positions: Sequence[int], seen: Seen) -> None:
        asked = [(line, row_at[position]) for line, position in enumerate(positions) if position in row_at]
        if asked:
            lines, numbers = zip(*asked, strict=True)
            last_N = torch.tensor([len(rows[number].prompt) - 1 for number in numbers])
            for number, likelihoods in zip(numbers, _likelihoods(seen, torch.tensor(lines), last_N), strict=True):
                scores[number] = _chosen(likelihoods, rows[number])

    losses = score_loss(model, examples, pad_id, batch_size, poll, visit)
    return losses, ChoiceScores(scores=tuple(map(tuple, scores)), answers=tuple(row.answer for row in rows))


def _single(row: ChoiceRow) -> bool:
    return all(len(choice) == 1 for choice in row.choices)


def _continues(examples: Sequence[Example], index: int | None, row: ChoiceRow) -> bool:
    """Whether an example is the row's prompt, of which nothing is learned, with more behind it."""
    if index is None:
        return False
    example, length = examples[index], len(row.prompt)
    labels = example.labels or []
    return (
        len(example) > length
        and example.input_ids[:length] == row.prompt
        and all(label == IGNORED for label in labels[:length])
        and labels[length] != IGNORED
    )


def _likelihoods(seen: Seen, rows_N: Tensor, at_N: Tensor) -> Tensor:
    device = seen.states_BTX.device
    return seen.logits(rows_N.to(device), at_N.to(device)).log_softmax(-1)


def _chosen(likelihoods_V: Tensor, row: ChoiceRow) -> list[float]:
    return likelihoods_V[[choice[0] for choice in row.choices]].tolist()


def _of_single_tokens(
    model: nn.Module, rows: Sequence[ChoiceRow], pad_id: int, batch_size: int, poll: Poll | None
) -> list[list[float]]:
    prompts = [Example(input_ids=row.prompt, row_id=n) for n, row in enumerate(rows)]
    scores: list[list[float]] = [[] for _ in rows]
    with scoring(model):
        head = CausalHead(model)
        for positions, batch in by_length(prompts, pad_id, batch_size, device_of(model), poll):
            last_B = batch["attention_mask"].sum(1) - 1
            likelihoods_BV = _likelihoods(head.see(batch), torch.arange(len(positions)), last_B)
            for likelihoods_V, position in zip(likelihoods_BV, positions, strict=True):
                scores[position] = _chosen(likelihoods_V, rows[position])
    return scores


def _of_sequences(
    model: nn.Module, rows: Sequence[ChoiceRow], pad_id: int, batch_size: int, poll: Poll | None
) -> list[list[float]]:
    sequences = [
        Example(input_ids=[*row.prompt, *choice], labels=[*[IGNORED] * len(row.prompt), *choice], row_id=row.row_id)
        for row in rows
        for choice in row.choices
    ]
    sums = iter(score_loss(model, sequences, pad_id, batch_size, poll).sums)
    return [[-next(sums) for _ in row.choices] for row in rows]


def _start(example: Example) -> int:
    """Where the last learned stretch begins."""
    labels = example.labels or []
    position = _end(example)
    while position > 0 and labels[position - 1] != IGNORED:
        position -= 1
    return position


def _end(example: Example) -> int:
    labels = example.labels or []
    return max(i for i, label in enumerate(labels) if label != IGNORED) + 1


def _without_tail(answers: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The answers without the tokens in which all of them end, but never empty."""
    while len({answer[-1] for answer in answers}) == 1 and min(map(len, answers)) > 1:
        answers = [answer[:-1] for answer in answers]
    return tuple(answers)
