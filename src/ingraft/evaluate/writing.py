"""Models that write, judged: the loss of the text they should write, label words as choices, answers to prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
from numpy.typing import NDArray
from torch import nn

from ingraft.data.chat import begins_with_bos, encode_prompt, has_template, prompt_messages
from ingraft.data.examples import IGNORED, Example, as_chat
from ingraft.data.formats import read_records
from ingraft.data.records import Chat, Document, Record
from ingraft.data.rows import refuse
from ingraft.data.tasks import task_of
from ingraft.errors import IngraftError
from ingraft.evaluate import weighted
from ingraft.evaluate.choices import ChoiceRow, ChoiceScores, choices_of, score_along
from ingraft.evaluate.classes import macro_f1
from ingraft.evaluate.generation import generate
from ingraft.evaluate.loss import LossOutcomes, LossScores, Poll, score_loss
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats
from ingraft.evaluate.room import room
from ingraft.evaluate.scorer import Asked, Done, Scorer
from ingraft.evaluate.weighted import one_hot

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.rows import Row

LONGEST_ANSWER = 96
NO_ROOM = "(no answer: the prompt takes all places of the base)"


class SftScorer(Scorer):
    """Loss and perplexity of the answers; with rows of text and label also accuracy and macro F1, each label being an answer to choose."""

    task: ClassVar[str] = "sft"
    cheap: ClassVar[tuple[str, ...]] = ("loss", "perplexity")
    writes: ClassVar[bool] = True
    prompted: ClassVar[str | None] = "sft"

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> Outcomes:
        choices = self.choices(data, part) if whole else ()
        return outcomes_of_text(self.model, data.parts[part].examples, self.pad_id, batch_size, choices, poll)

    def choices(self, data: DataSet, part: str) -> Sequence[ChoiceRow]:
        """The rows as choices between label words, where they are that."""
        return choices_of(data, part, self.tokenizer)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        found: list[dict[str, str]] = []
        for example in examples:
            chat = as_chat(part.records[example.row_id])
            if chat is None:
                found.append(_continuation(example, self.tokenizer))
                continue
            asked = prompt_messages(chat.messages)
            prompt = "\n".join(message["content"] for message in asked if message["role"] != "system")
            expected = chat.messages[len(asked)]["content"] if len(asked) < len(chat.messages) else ""
            found.append({"prompt": prompt, "expected": expected})
        return found

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        prompts = [_parts(example)[0] for example in examples]
        longest = max(len(_parts(example)[1]) for example in examples)
        most = room(self.model)
        fitting = [prompt for prompt in prompts if len(prompt) < most]
        limit = min(LONGEST_ANSWER, max(16, 2 * longest))
        said = iter(generate(self.model, self.tokenizer, fitting, max_new_tokens=limit, poll=poll))
        return [next(said) if len(prompt) < most else NO_ROOM for prompt in prompts]

    def predict(self, rows: Sequence[Row], asked: Asked, done: Done) -> None:
        records = read_records(task_of(self.task).filled(rows), asked.form)[1]
        prompts = [self.prompt(record) for record in records]
        most = room(self.model)
        full = [
            f"{row.place}: its prompt takes {len(prompt)} tokens"
            for row, prompt in zip(rows, prompts, strict=True)
            if len(prompt) >= most
        ]
        if full:
            refuse(
                full,
                summary=f"{len(full)} of {len(rows)} rows leave no room for an answer: the base has places for {most} tokens. Shorten them, or "
                "leave them out.",
            )
        wanted = asked.max_new_tokens
        if short := sum(most - len(prompt) < wanted for prompt in prompts):
            asked.say(
                f"note: {short} rows have room for fewer than {wanted} new tokens, because the base has places for {most}"
            )

        def told(position: int, answer: str) -> None:
            done(position, {"prediction": answer})

        generate(self.model, self.tokenizer, prompts, max_new_tokens=wanted, batch_size=asked.batch_size, done=told)

    def prompt(self, record: Record) -> list[int]:
        """The tokens after which the model answers this row; a lone text is a question."""
        chat = as_chat(record)
        if isinstance(record, Document):
            chat = Chat(messages=({"role": "user", "content": record.text},))
        if chat is not None and (has_template(self.tokenizer) or not chat.plain):
            return encode_prompt(prompt_messages(chat.messages), self.tokenizer)
        return _plain_prompt(chat.messages[0]["content"] if chat is not None else "", self.tokenizer)


class LmScorer(SftScorer):
    """Loss and perplexity of running text, which is continued from where it ends."""

    task: ClassVar[str] = "lm"
    prompted: ClassVar[str | None] = None

    def choices(self, data: DataSet, part: str) -> Sequence[ChoiceRow]:
        return ()

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        return [_continuation(example, self.tokenizer) for example in examples]

    def prompt(self, record: Record) -> list[int]:
        return _plain_prompt(record.text, self.tokenizer) if isinstance(record, Document) else super().prompt(record)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenOutcomes(LossOutcomes):
    """With the answer that is likeliest and the right one, by their numbers; -1 for a row whose answers could not be compared."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"accuracy"})

    chosen: NDArray[np.int64] = column()
    right: NDArray[np.int64] = column()

    def metrics(self) -> dict[str, float]:
        said, right = (x[self.right >= 0].tolist() for x in (self.chosen, self.right))
        hits = sum(p == y for p, y in zip(said, right, strict=True))
        accuracy = hits / max(1, len(right))
        return super().metrics() | {"accuracy": accuracy, "macro_f1": macro_f1(said, right)}

    def ratios(self) -> dict[str, Ratio]:
        there = self.right >= 0
        return super().ratios() | {"accuracy": (floats(there & (self.chosen == self.right)), floats(there))}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        kinds = 1 + int(max(self.chosen.max(), self.right.max(), 0))
        said, right = one_hot(self.chosen, kinds), one_hot(self.right, kinds)
        return super().others(times_RN) | {"macro_f1": weighted.macro_f1(right, said, right * said, times_RN)}


def outcomes_of_text(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 8,
    choices: Sequence[ChoiceRow] = (),
    poll: Poll | None = None,
) -> LossOutcomes:
    """For `loss` (nats) and `perplexity`; with the same rows as choices between label words, for `accuracy` and `macro_f1` too.

    Raises:
        IngraftError: no rows.
    """
    if not examples:
        raise IngraftError("There are no rows to evaluate on.")
    if not choices:
        losses = score_loss(model, examples, pad_id, batch_size, poll)
        return LossOutcomes(sums=losses.sums, counts=losses.counts)
    losses, scores = score_along(model, examples, choices, pad_id, batch_size, poll)
    return outcomes_of(examples, losses, choices, scores)


def outcomes_of(
    examples: Sequence[Example], losses: LossScores, choices: Sequence[ChoiceRow], scores: ChoiceScores
) -> ChosenOutcomes:
    """Losses of rows and scores of the same rows as choices, each choice beside the example of its row."""
    said, right = (np.full(len(examples), -1, dtype=np.int64) for _ in range(2))
    place = {example.row_id: position for position, example in enumerate(examples)}
    for row, prediction in zip(choices, scores.predictions, strict=True):
        said[place[row.row_id]], right[place[row.row_id]] = prediction, row.answer
    return ChosenOutcomes(sums=losses.sums, counts=losses.counts, chosen=said, right=right)


def _plain_prompt(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    begin = str(tokenizer.bos_token) if begins_with_bos(tokenizer) else ""
    return cast("list[int]", tokenizer.encode(begin + text, add_special_tokens=False, verbose=False))


def _continuation(example: Example, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    start, rest = _parts(example)
    return {"prompt": _text(start, tokenizer), "expected": _text(rest, tokenizer)}


def _parts(example: Example) -> tuple[list[int], list[int]]:
    """The tokens before the last learned stretch, and that stretch. Plain text is continued from its first third."""
    labels = example.labels
    if labels is None:
        return example.input_ids, []
    end = max((i for i, label in enumerate(labels) if label != IGNORED), default=len(labels) - 1) + 1
    start = end
    while start > 0 and labels[start - 1] != IGNORED:
        start -= 1
    start = start or max(1, len(labels) // 3)
    return example.input_ids[:start], example.input_ids[start:end]


def _text(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip() if isinstance(text, str) else ""
