"""A base, or an adapter over one, asked in words: zero-shot and few-shot.

Rows are encoded as training encodes a conversation, so a prompt is what the base was tuned to read. Of a labelled row every label's word is scored as the answer
(`choices`). Two things bend such scores: how common a word is, and which labels the demonstrations happen to show; `calibrate` divides by what the model says of each
label where the text says nothing (contextual calibration, Zhao et al. 2021, https://arxiv.org/abs/2102.09690), with the same demonstrations.

Demonstrations that a base has no places for are left out, the first ones first, and counted. Nearness is the cosine of the base's own last states, averaged over the
tokens of what a row gives to read, without adapters.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.chat import has_template
from ingraft.data.demonstrations import NOTHING, Shots, behind, distinct, draw
from ingraft.data.examples import IGNORED, Example, Tally, encode_chats, token_ids
from ingraft.data.records import Chat, Labelled, Record, given
from ingraft.data.rows import Row
from ingraft.errors import IngraftError
from ingraft.evaluate.choices import ChoiceRow, choices_between, score_along, score_choices
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.loss import LossOutcomes, Poll, by_length, device_of, score_loss
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.roles import as_base
from ingraft.evaluate.similarity import pooled
from ingraft.evaluate.writing import SftScorer, outcomes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.data.dataset import DataSet

SEARCHED = 2000
"""Rows of the pool among which the nearest are looked for; each costs a forward pass."""

LONGEST = 512
"""Tokens of a text that nearness looks at."""


class ShotScorer(SftScorer):
    """Loss and perplexity of the answers; of labelled rows accuracy and macro F1 of the label whose word is likeliest."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        shots: Shots,
        pool: Sequence[Record],
        known: Sequence[Record] = (),
    ) -> None:
        """Args:
        pool: rows to show. known: rows whose labels can be chosen beside those of the pool and of the rows that are scored.
        """
        super().__init__(model, tokenizer)
        self.known = known
        self.shots, self.pool = shots, distinct(pool)

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> LossOutcomes:
        del whole
        self.notes = []
        rows, records = data.parts[part].rows, data.parts[part].records
        shown = self.demonstrations(records, batch_size, poll)
        labels = labels_of([*records, *self.pool, *self.known])
        self.shots.check(labels)
        own = [self.shots.chat(record, labels) for record in records]
        examples, shown = self.encoded_behind(own, rows, shown, labels)
        if not labels:
            losses = score_loss(self.model, examples, self.pad_id, batch_size, poll)
            return LossOutcomes(sums=losses.sums, counts=losses.counts)
        choices = self.among(records, rows, shown, labels)
        losses, scores = score_along(self.model, examples, choices, self.pad_id, batch_size, poll)
        if self.shots.calibrate:
            empty = self.priors([shown[row.row_id] for row in choices], records, labels, batch_size, poll)
            scores = replace(scores, scores=tuple(map(calibrated, scores.scores, empty)))
        return outcomes_of(examples, losses, choices, scores)

    def demonstrations(
        self, records: Sequence[Record], batch_size: int = 8, poll: Poll | None = None
    ) -> list[list[int]]:
        """By row the places in the pool of what it is shown."""
        if self.shots.select != "nearest" or not self.shots.count:
            return draw(self.pool, records, self.shots)
        if len(self.pool) > SEARCHED:
            kept = np.random.default_rng(self.shots.seed).permutation(len(self.pool))[:SEARCHED]
            self.notes.append(
                f"the nearest are looked for among {SEARCHED} of {len(self.pool)} rows, drawn by the seed"
            )
            self.pool = [self.pool[place] for place in sorted(kept.tolist())]
        e_PD, e_ND = (self.vectors(some, batch_size, poll) for some in (self.pool, records))
        return draw(self.pool, records, self.shots, (e_ND @ e_PD.T).numpy())

    def vectors(self, records: Sequence[Record], batch_size: int, poll: Poll | None) -> Tensor:
        """(N, D) what the base makes of what rows give to read, of length one."""
        ids = token_ids([given(record) for record in records], self.tokenizer)
        examples = [Example(input_ids=row[:LONGEST] or [self.pad_id], row_id=n) for n, row in enumerate(ids)]
        with as_base(self.model):
            return embedded(self.model, examples, self.pad_id, batch_size, poll)

    def encoded_behind(
        self, own: Sequence[Chat | None], rows: Sequence[Row], shown: Sequence[Sequence[int]], labels: Sequence[str]
    ) -> tuple[list[Example], list[list[int]]]:
        """The rows behind their demonstrations, nothing learned but their own answers, and the demonstrations that there was room for.

        Raises:
            IngraftError: as `encode_chats`.
        """
        longest, shown, fewer = self.tokenizer.model_max_length, [list(places) for places in shown], set[int]()
        while True:
            tally = Tally()
            examples = encode_chats(self.chats(own, shown, labels), rows, self.tokenizer, longest, tally=tally)
            long = [n for n, length in enumerate(tally.lengths) if length > longest and shown[n]]
            if not long:
                break
            for number in long:
                shown[number] = shown[number][1:]
            fewer |= {*long}
        if fewer:
            least = min(len(shown[number]) for number in fewer)
            self.notes.append(
                f"{len(fewer)} rows were shown fewer than {self.shots.count} demonstrations, down to {least}: the base has places for {longest} tokens"
            )
        if tally.shortened:
            self.notes.append(
                f"{len(tally.shortened)} rows are longer than the {longest} tokens that the base has places for, even alone: the middle of their prompts was left out"
            )
        if left := len(rows) - len(examples):
            self.notes.append(f"{left} rows were left out: nothing of their answer is within {longest} tokens")
        turns = [0 if chat is None else sum(turn["role"] == "assistant" for turn in chat.messages) for chat in own]
        return [last_learned(example, turns[example.row_id]) for example in examples], shown

    def chats(
        self, own: Sequence[Chat | None], shown: Sequence[Sequence[int]], labels: Sequence[str]
    ) -> list[Chat | None]:
        """Each row's conversation behind those that it is shown."""
        before = [self.shots.chat(record, labels) for record in self.pool]
        as_text = not has_template(self.tokenizer)
        found: list[Chat | None] = []
        for chat, places in zip(own, shown, strict=True):
            first = [one for place in places if (one := before[place]) is not None]
            found.append(None if chat is None else behind(first, chat, as_text=as_text))
        return found

    def among(
        self, records: Sequence[Record], rows: Sequence[Row], shown: Sequence[Sequence[int]], labels: Sequence[str]
    ) -> list[ChoiceRow]:
        """Labelled rows behind their demonstrations as choices between the labels' words."""
        known = [record for record in records if isinstance(record, Labelled)]
        options = [
            self.chats([self.shots.chat(replace(record, label=label), labels) for record in known], shown, labels)
            for label in labels
        ]
        right = [labels.index(record.label) for record in known]
        return choices_between(options, right, rows, self.tokenizer, self.tokenizer.model_max_length)

    def priors(
        self,
        shown: Sequence[Sequence[int]],
        records: Sequence[Record],
        labels: Sequence[str],
        batch_size: int = 8,
        poll: Poll | None = None,
    ) -> list[tuple[float, ...]]:
        """By row what the model says of each label where the text says nothing, behind the row's demonstrations; each adds up to 1."""
        pair = isinstance(records[0], Labelled) and records[0].text2 is not None
        kinds = list(dict.fromkeys(map(tuple, shown)))
        empty = [Labelled(text=text, text2=text if pair else None, label=labels[0]) for text in NOTHING]
        asked: list[Record] = [record for _ in kinds for record in empty]
        places = [kind for kind in kinds for _ in empty]
        blank = [Row(values={}, file="a text that says nothing", line=1)] * len(asked)
        rows = self.among(asked, blank, places, labels)
        if len(rows) < len(asked):
            raise IngraftError("--calibrate: there is no room for the demonstrations and a text that says nothing.")
        scores = score_choices(self.model, rows, self.pad_id, batch_size, poll=poll).scores
        shares = np.array([calibrated(row) for row in scores]).reshape(len(kinds), len(empty), len(labels)).mean(1)
        by_kind = dict(zip(kinds, map(tuple, shares.tolist()), strict=True))
        return [by_kind[tuple(places)] for places in shown]


def calibrated(scores: Sequence[float], prior: Sequence[float] | None = None) -> tuple[float, ...]:
    """Shares of the labels that add up to 1.

    Args:
        scores: log-likelihoods, in nats. prior: what each is divided by.
    """
    moved = [score - (0.0 if prior is None else math.log(max(prior[k], 1e-30))) for k, score in enumerate(scores)]
    top = max(moved)
    weights = [math.exp(value - top) for value in moved]
    return tuple(weight / math.fsum(weights) for weight in weights)


def labels_of(records: Sequence[Record]) -> list[str]:
    """The labels of records, in order; none where not all of them are labelled.

    Raises:
        IngraftError: they have but one.
    """
    labels = sorted({record.label for record in records if isinstance(record, Labelled)})
    if not all(isinstance(record, Labelled) for record in records):
        return []
    if len(labels) < 2:
        raise IngraftError(f"All rows have the one label {', '.join(labels)!r}; there is nothing to choose between.")
    return labels


def last_learned(example: Example, stretches: int) -> Example:
    """The example with nothing learned but its last stretches of learned tokens."""
    labels = list(example.labels or [])
    left = stretches
    for at in range(len(labels) - 1, -1, -1):
        if left == 0:
            labels[at] = IGNORED
        elif labels[at] != IGNORED and (at == 0 or labels[at - 1] == IGNORED):
            left -= 1
    return replace(example, labels=labels)


def embedded(
    model: nn.Module, examples: Sequence[Example], pad_id: int, batch_size: int = 8, poll: Poll | None = None
) -> Tensor:
    """(N, D) the mean of a language model's last states over each sequence, of length one, on the CPU."""
    found: dict[int, Tensor] = {}
    with scoring(model):
        head = CausalHead(model)
        for positions, batch in by_length(examples, pad_id, batch_size, device_of(model), poll):
            e_BD = pooled(head.states(batch).float(), batch["attention_mask"])
            found |= dict(zip(positions, F.normalize(e_BD, dim=-1).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(examples))])
