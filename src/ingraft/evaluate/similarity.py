"""Texts as vectors, and how near they are to those that they belong to.

A vector is the mean of the last states of a text's tokens, of length one, as sentence encoders are used (Reimers and Gurevych 2019,
https://arxiv.org/abs/1908.10084). Two losses, both of a whole batch at once:

- pairs: cross entropy of finding the match of each query among all matches of the batch, cosines over a temperature (InfoNCE, van den Oord et al. 2018,
  https://arxiv.org/abs/1807.03748). Texts of the rows that do not belong are among the wrong ones. The same text is no wrong one for itself,
  and neither is what another row says of the same query;
- numbers: for every two rows of which one belongs together more, its cosine should be above the other's (CoSENT, Su 2022,
  https://kexue.fm/archives/8847). Cosines then mean an order and not an amount, so labels of any range will do, 0 and 1 among them. Mean squared error against
  the label was not taken: it needs labels on the cosines' own scale.

Legend: S sequences, B rows, C candidates, D width.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.data.examples import Example
from ingraft.data.matched import Matched
from ingraft.evaluate.loss import Poll, by_length, device_of
from ingraft.evaluate.modes import scoring
from ingraft.recipe import EmbedRecipe

Text = tuple[int, ...]
"""A text by its tokens."""


def embeddings(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """(S, D) a float32 vector of length one for each sequence. Differentiable."""
    x_STD = model(**inputs).last_hidden_state.float()
    return F.normalize(pooled(x_STD, inputs["attention_mask"]), dim=-1)


def pooled(x_STD: Tensor, mask_ST: Tensor) -> Tensor:
    """(S, D) the mean over each sequence's own tokens."""
    mask_ST1 = mask_ST[:, :, None].to(x_STD.dtype)
    return (x_STD * mask_ST1).sum(1) / mask_ST1.sum(1)


def embed(
    model: nn.Module, sequences: Sequence[Example], pad_id: int, batch_size: int = 8, poll: Poll | None = None
) -> Tensor:
    """The same for any number of sequences, in their order, on the CPU."""
    found: dict[int, Tensor] = {}
    with scoring(model):
        for positions, batch in by_length(sequences, pad_id, batch_size, device_of(model), poll):
            batch.pop("labels", None)
            found |= dict(zip(positions, embeddings(model, batch).cpu(), strict=True))
    return torch.stack([found[i] for i in range(len(sequences))])


@dataclass(frozen=True, kw_only=True, eq=False)
class Layout:
    """Which sequences of some rows, one behind the other, belong together.

    Attributes:
        query_B, match_B: the place of each row's text, and of the one that belongs to it. candidate_C: places of all that are no queries.
        own_B: where a row's match is among the candidates.
        excused_BC: candidates that are neither a row's match nor wrong. excused_BB: queries that are neither a match's own nor wrong.
        value_B: how much the texts of each row belong together; None where they simply do.
    """

    query_B: Tensor
    match_B: Tensor
    candidate_C: Tensor
    own_B: Tensor
    excused_BC: Tensor
    excused_BB: Tensor
    value_B: Tensor | None


def layout(rows: Sequence[Matched]) -> Layout:
    """The layout of these rows' sequences."""
    tokens = [tuple(one.input_ids) for row in rows for one in row.sequences]
    ends = list(accumulate(len(row.sequences) for row in rows))
    starts = [0, *ends[:-1]]
    queries = set(starts)
    candidates = [place for place in range(len(tokens)) if place not in queries]
    among = {place: number for number, place in enumerate(candidates)}
    right: dict[Text, set[Text]] = defaultdict(set)  # what belongs to a text, as far as the rows tell
    asked: dict[Text, list[int]] = defaultdict(list)  # the rows of a query
    held: dict[Text, list[int]] = defaultdict(list)  # the candidates of a text
    for number, start in enumerate(starts):
        right[tokens[start]].add(tokens[start + 1])
        asked[tokens[start]].append(number)
    for number, place in enumerate(candidates):
        held[tokens[place]].append(number)
    own = [among[start + 1] for start in starts]
    excused_BC = torch.zeros(len(rows), len(candidates), dtype=torch.bool)
    excused_BB = torch.zeros(len(rows), len(rows), dtype=torch.bool)
    belongs: dict[Text, list[int]] = defaultdict(list)  # the rows whose query a text belongs to
    for query, matches in right.items():
        for match in matches:
            belongs[match] += asked[query]
    for number, start in enumerate(starts):
        excused_BC[number, [place for match in right[tokens[start]] for place in held[match]]] = True
        excused_BB[number, belongs[tokens[start + 1]]] = True
    excused_BC[torch.arange(len(rows)), torch.tensor(own)] = False
    values = [row.values[0] for row in rows if row.values is not None]
    return Layout(
        query_B=torch.tensor(starts),
        match_B=torch.tensor(starts) + 1,
        candidate_C=torch.tensor(candidates),
        own_B=torch.tensor(own),
        excused_BC=excused_BC,
        excused_BB=excused_BB.fill_diagonal_(False),
        value_B=torch.tensor(values, dtype=torch.float64) if values else None,
    )


def loss_of(e_SD: Tensor, where: Layout, how: EmbedRecipe) -> Tensor:
    """The loss of some rows times their number, in nats.

    Args:
        e_SD: vectors of all their sequences.
    """
    if where.value_B is not None:
        return len(where.query_B) * cosent(e_SD, where, how.temperature)
    return losses_of_pairs(e_SD, where, how).sum()


def losses_of_pairs(e_SD: Tensor, where: Layout, how: EmbedRecipe) -> Tensor:
    """(B,) the loss of each row that simply belongs together, in nats."""
    losses_B = info_nce(e_SD, where, how.temperature)
    if how.symmetric:
        losses_B = (losses_B + info_nce_of_matches(e_SD, where, how.temperature)) / 2
    return losses_B


def info_nce(e_SD: Tensor, where: Layout, temperature: float) -> Tensor:
    """(B,) how surprising each query's match is among all candidates, in nats."""
    z_BC = e_SD[where.query_B] @ e_SD[where.candidate_C].T / temperature
    z_BC = z_BC.masked_fill(where.excused_BC.to(z_BC.device), -torch.inf)
    return F.cross_entropy(z_BC, where.own_B.to(z_BC.device), reduction="none")


def info_nce_of_matches(e_SD: Tensor, where: Layout, temperature: float) -> Tensor:
    """(B,) how surprising each match's query is among all queries, in nats."""
    z_BB = e_SD[where.match_B] @ e_SD[where.query_B].T / temperature
    z_BB = z_BB.masked_fill(where.excused_BB.to(z_BB.device), -torch.inf)
    return F.cross_entropy(z_BB, torch.arange(len(z_BB), device=z_BB.device), reduction="none")


def cosent(e_SD: Tensor, where: Layout, temperature: float) -> Tensor:
    """log(1 + the sum over rows i, j with value i > value j of exp((cosine j - cosine i) / temperature)), a scalar."""
    assert where.value_B is not None
    z_B = cosines(e_SD, where) / temperature
    value_B = where.value_B.to(z_B.device)
    wrong_BB = (z_B[None, :] - z_B[:, None])[value_B[:, None] > value_B[None, :]]
    return torch.logsumexp(torch.cat([z_B.new_zeros(1), wrong_BB]), dim=0)


def cosines(e_SD: Tensor, where: Layout) -> Tensor:
    """(B,) of each row's two texts."""
    return (e_SD[where.query_B] * e_SD[where.match_B]).sum(-1)


def matched(examples: Sequence[Example]) -> list[Matched]:
    """The same examples, as what they are."""
    return cast("list[Matched]", list(examples))
