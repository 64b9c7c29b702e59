"""What a head puts out for rows, and what scorers of whole rows have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from ingraft.data.dataset import Part
from ingraft.data.examples import Example
from ingraft.data.records import Labelled, Measured, Multilabelled
from ingraft.evaluate.loss import Poll, by_length, device_of
from ingraft.evaluate.modes import scoring


def outputs(
    model: nn.Module, examples: Sequence[Example], pad_id: int, batch_size: int, poll: Poll | None = None
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Batch by batch: the positions of its rows, the head's outputs in float32, and the labels as `collate` makes them."""
    with scoring(model):
        for positions, batch in by_length(examples, pad_id, batch_size, device_of(model), poll):
            labels = batch.pop("labels")
            yield positions, model(**batch).logits.float(), labels


def texts(part: Part, examples: Sequence[Example]) -> list[str]:
    """What the rows of these examples ask: a text, or two."""
    found: list[str] = []
    for example in examples:
        record = part.records[example.row_id]
        assert isinstance(record, Labelled | Measured | Multilabelled), "the task's records"
        found.append(f"{record.text}\n{record.text2 or ''}".strip())
    return found
