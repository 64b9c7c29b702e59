"""Loss and perplexity of a language model, row by row, so that two models can be compared on the same rows with an error bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ingraft.data import collate
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.evaluate.head import Seen, head_of
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.outcomes import Floats, Outcomes, Ratio, column, floats, quotient

Poll = Callable[[], None]
"""Called between batches; it stops the evaluation by raising."""


@dataclass(frozen=True, kw_only=True)
class LossScores:
    """Losses of some rows.

    Attributes:
        sums: per row, the summed negative log-likelihood of its learned tokens, in nats.
        counts: per row, how many tokens that were.
    """

    sums: tuple[float, ...]
    counts: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The mean over learned tokens, in nats."""
        return math.fsum(self.sums) / max(1, sum(self.counts))

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(min(self.loss, 700.0))


@dataclass(frozen=True, kw_only=True, eq=False)
class LossOutcomes(Outcomes):
    """Of a model that writes: by row as in `LossScores`."""

    sums: Sequence[float] = column()
    counts: Sequence[int] = column()

    def metrics(self) -> dict[str, float]:
        scores = LossScores(sums=tuple(self.sums), counts=tuple(self.counts))
        return {"loss": scores.loss, "perplexity": scores.perplexity}

    def ratios(self) -> dict[str, Ratio]:
        return {"loss": (floats(self.sums), floats(self.counts))}

    def others(self, times_RN: Floats) -> dict[str, Floats]:
        loss_R = quotient(times_RN @ floats(self.sums), times_RN @ floats(self.counts))
        return {"perplexity": np.exp(np.minimum(loss_R, 700.0))}


Visit = Callable[[Sequence[int], Seen], None]
"""Called with the positions of a batch's rows and what its forward left to be read."""


def score_loss(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 8,
    poll: Poll | None = None,
    visit: Visit | None = None,
) -> LossScores:
    """Score every example. The order and the batches depend on lengths and `batch_size` alone, so equal calls give equal bits.

    Args:
        model: a model that writes, with whatever adapters act.
        pad_id: what to fill short rows with.
        poll: called between batches; may raise to stop.
        visit: reads more from the forwards that are made anyway.
    """
    sums, counts = [0.0] * len(examples), [0] * len(examples)
    with scoring(model):
        head = head_of(model)
        for positions, batch in by_length(examples, pad_id, batch_size, device_of(model), poll):
            seen = head.see(batch)
            if visit is not None:
                visit(positions, seen)
            losses_N, rows_N = seen.losses(batch["labels"])
            sums_B = torch.zeros(len(positions), dtype=torch.float64).index_add_(
                0, rows_N.cpu(), losses_N.double().cpu()
            )
            for position, value in zip(positions, sums_B.tolist(), strict=True):
                sums[position], counts[position] = value, examples[position].learned
    return LossScores(sums=tuple(sums), counts=tuple(counts))


def paired_difference(a: LossScores, b: LossScores) -> tuple[float, float]:
    """The difference of two losses on the same rows, `b.loss - a.loss`, and its standard error.

    Rows are the independent units. The difference is a ratio (summed differences over tokens), whose standard error is the usual linearised
    one: the spread of `d_i - difference * n_i` over the rows, d_i being a row's summed difference and n_i its tokens.

    Raises:
        IngraftError: the rows are not the same, or fewer than two.
    """
    if a.counts != b.counts:
        raise IngraftError("Two losses can be compared only on the same rows; these have other numbers of tokens.")
    n, tokens = len(a.counts), sum(a.counts)
    if n < 2 or not tokens:
        raise IngraftError("A standard error needs at least two rows with learned tokens.")
    each = [y - x for x, y in zip(a.sums, b.sums, strict=True)]
    difference = math.fsum(each) / tokens
    spread = math.fsum((d - difference * count) ** 2 for d, count in zip(each, a.counts, strict=True))
    return difference, math.sqrt(spread * n / (n - 1)) / tokens


def by_length(
    examples: Sequence[Example], pad_id: int, batch_size: int, device: torch.device, poll: Poll | None = None
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """Batches of rows of similar length, longest first (so that memory runs out at once or never), with their positions."""
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i]), i))
    for start in range(0, len(order), batch_size):
        if poll is not None:
            poll()
        positions = order[start : start + batch_size]
        batch = collate([examples[i] for i in positions], pad_id)
        yield positions, {name: value.to(device) for name, value in batch.items()}


def as_computed(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A model's inputs with what is no whole number in the dtype that its base computes in: a convolution takes no other."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs belong."""
    return next(model.parameters()).device
