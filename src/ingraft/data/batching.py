"""Which rows form which batch: a pure function of lengths, batch size, seed and epoch.

Because nothing else enters, a resumed run recomputes the order instead of storing a generator's state, and two
machines agree without talking.

Rows of similar length share a batch, because padding is work thrown away. Measured at 8 rows a batch: 54 % of the
positions of random batches are padding on Dolly, 46 % on Alpaca, 19 % on very uniform instructions; in buckets it is
3 %, 3 % and 1 %. Sorting the whole set would be cheaper still, but then every epoch would present the same batches;
so rows are shuffled, cut into windows of fifty batches, sorted inside a window, and the batches shuffled again.
(Windows of 10 leave 11 % on Dolly, of 200 under 1 %.) The price: rows of one batch are alike in length, so its
gradient is a little more correlated than that of a random batch.

The effective batch is the unit here. Who splits it into micro-batches for accumulation should ask for the effective
size and split each batch, so that 8 x 1 and 4 x 2 see the same rows in every step.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence, Sized
from typing import TYPE_CHECKING

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.data.examples import Example

WINDOW = 50
"""Batches per window: the knee of the measurement above."""


def batches(
    examples: Sequence[Sized], batch_size: int, seed: int, epoch: int, bucket: bool = True, *, drop_last: bool = False
) -> list[list[int]]:
    """The batches of one epoch, as positions in `examples`; every example exactly once.

    Args:
        examples: anything with a length; only the lengths are looked at.
        batch_size: rows per batch; the one partial batch is kept.
        seed: the run's seed.
        epoch: 0, 1, 2, ...; another epoch, another order.
        bucket: put rows of similar length together.
        drop_last: leave the partial batch out (its rows are then not seen in this epoch).

    Raises:
        IngraftError: a batch size below 1.
    """
    if batch_size < 1:
        raise IngraftError(f"The batch size must be at least 1, not {batch_size}.")
    source = random.Random(
        f"ingraft batches {seed} {epoch}"
    )  # seeded by a text: the same stream on every platform and version
    order = list(range(len(examples)))
    source.shuffle(order)
    window = batch_size * WINDOW
    if bucket:
        order = [
            i
            for at in range(0, len(order), window)
            for i in sorted(order[at : at + window], key=lambda i: len(examples[i]))
        ]
    made = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
    if drop_last and made and len(made[-1]) < batch_size:
        made.pop()
    source.shuffle(made)
    return made


def longest_first(rows: Iterable[Example]) -> list[Example]:
    """The rows of a step in the order in which they go through, so that those of one micro-batch are alike."""
    return sorted(rows, key=lambda row: (-len(row), row.row_id))


def padding_share(examples: Sequence[Sized], made: Sequence[Sequence[int]]) -> float:
    """The share of positions in these batches that is padding, 0 to 1."""
    real = sum(len(examples[i]) for batch in made for i in batch)
    padded = sum(max(len(examples[i]) for i in batch) * len(batch) for batch in made)
    return 1 - real / padded if padded else 0.0
