"""Losses and metrics of vectors against their definitions, written out."""

from __future__ import annotations

import math
import random

import pytest
import torch

from ingraft.data import Example
from ingraft.data.matched import Matched
from ingraft.evaluate import measures
from ingraft.evaluate.embed import places, retrieval
from ingraft.evaluate.similarity import cosent, info_nce, info_nce_of_matches, layout, loss_of
from ingraft.recipe import EmbedRecipe


def row(number: int, *texts: int, value: float | None = None) -> Matched:
    """A row whose texts are one token each."""
    values = None if value is None else (value,)
    own, *beside = (Example(input_ids=[text], row_id=number, values=values) for text in texts)
    return Matched(input_ids=own.input_ids, row_id=number, values=values, beside=tuple(beside))


def vectors(rows: list[Matched]) -> torch.Tensor:
    """One for each text, the same for the same."""
    texts = [one.input_ids[0] for each in rows for one in each.sequences]
    made = torch.nn.functional.normalize(torch.randn(100, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    return made[texts]


ROWS = [
    row(0, 1, 11, 21),
    row(1, 2, 12),
    row(2, 3, 11, 22, 23),  # the match of row 0 belongs to it too
    row(3, 1, 14),  # the query of row 0 again
    row(4, 5, 15, 12),  # what belongs to row 1 does not belong here
]


def test_the_loss_of_pairs_is_its_definition() -> None:
    """The same text is no wrong one, nor what another row says of the query; the other rows' wrong texts are."""
    e_SD, where, t = vectors(ROWS), layout(ROWS), 0.1
    at = {one.input_ids[0]: e for one, e in zip([o for r in ROWS for o in r.sequences], e_SD, strict=True)}
    every = [11, 21, 12, 11, 22, 23, 14, 15, 12]  # as often as they stand there
    right = {1: {11, 14}, 2: {12}, 3: {11}, 5: {15}}

    def surprise(one: int, match: int, wrong: list[int]) -> float:
        z = [float(at[one] @ at[text]) / t for text in [match, *wrong]]
        return -z[0] + math.log(sum(map(math.exp, z)))

    pairs = [(1, 11), (2, 12), (3, 11), (1, 14), (5, 15)]
    wanted = [surprise(q, m, [c for c in every if c not in right[q]]) for q, m in pairs]
    assert info_nce(e_SD, where, t).tolist() == pytest.approx(wanted, rel=1e-5)
    queries = [1, 2, 3, 1, 5]
    back = [surprise(m, q, [c for c in queries if m not in right[c]]) for q, m in pairs]
    assert info_nce_of_matches(e_SD, where, t).tolist() == pytest.approx(back, rel=1e-5)
    both = (sum(wanted) + sum(back)) / 2
    assert float(loss_of(e_SD, where, EmbedRecipe(temperature=t, symmetric=True))) == pytest.approx(both, rel=1e-5)


def test_the_loss_of_numbers_is_its_definition() -> None:
    """Equal numbers have no order to be wrong in; only the order counts."""
    values = [0.5, 3.0, 3.0, -1.0]
    rows = [row(i, 30 + i, 40 + i, value=value) for i, value in enumerate(values)]
    e_SD, t = vectors(rows), 0.05
    s = [float(e_SD[2 * i] @ e_SD[2 * i + 1]) for i in range(4)]
    terms = [math.exp((s[j] - s[i]) / t) for i in range(4) for j in range(4) if values[i] > values[j]]
    assert len(terms) == 5
    assert float(cosent(e_SD, layout(rows), t)) == pytest.approx(math.log(1 + sum(terms)), rel=1e-5)
    stretched = [row(i, 30 + i, 40 + i, value=value**3 * 7 - 1) for i, value in enumerate(values)]
    assert float(cosent(e_SD, layout(stretched), t)) == float(cosent(e_SD, layout(rows), t))
    assert float(loss_of(e_SD, layout(rows), EmbedRecipe())) == pytest.approx(4 * math.log(1 + sum(terms)), rel=1e-5)


def test_matches_are_found_among_all_texts_of_the_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingraft.evaluate.embed.SEARCHED", 2)
    e = list(vectors(ROWS).split([len(each.sequences) for each in ROWS]))
    at = {
        one.input_ids[0]: v
        for each, some in zip(ROWS, e, strict=True)
        for one, v in zip(each.sequences, some, strict=True)
    }
    right = {1: {11, 14}, 2: {12}, 3: {11}, 5: {15}}
    wanted: list[int] = []
    for query, match in [(1, 11), (2, 12), (3, 11), (1, 14), (5, 15)]:
        wrong = {11, 21, 12, 22, 23, 14, 15} - right[query]
        wanted.append(1 + sum(float(at[query] @ at[text]) > float(at[query] @ at[match]) for text in wrong))
    found = retrieval(places(ROWS, e))
    assert found["recall@1"] == pytest.approx(sum(place == 1 for place in wanted) / 5)
    assert found["mrr"] == pytest.approx(sum(1 / place for place in wanted) / 5)


def test_vectors_that_are_all_the_same_find_nothing() -> None:
    """A model that tells nothing apart is not right by being first among equals."""
    rows = [row(i, i, 50 + i) for i in range(5)]
    found = retrieval(places(rows, [torch.ones(2, 3) for _ in rows]))
    assert found == {"recall@1": 0.0, "mrr": pytest.approx(1 / 3)}


def test_similarities() -> None:
    """The best threshold by trying all; equal similarities are on one side of it."""
    found = measures.of_similarities([1, 0, 1, 0], [0.9, 0.9, 0.8, 0.1])
    assert found["best_accuracy"] == 0.75
    assert set(measures.of_similarities([1, 2, 3], [0.1, 0.2, 0.3])) == {"spearman"}
    rng = random.Random(0)
    labels = [float(rng.random() < 0.6) for _ in range(60)]
    said = [round(rng.random() + label / 2, 1) for label in labels]
    cuts = [-1.0, *said, 9.0]
    best = max(sum((x >= cut) == bool(y) for x, y in zip(said, labels, strict=True)) for cut in cuts) / 60
    found = measures.of_similarities(labels, said)
    assert found["best_accuracy"] == pytest.approx(best)
    assert 0.5 < found["average_precision"] <= 1
