"""Batches: a pure function, a permutation, and less padding."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingraft.data.batching import batches, padding_share
from ingraft.data.examples import IGNORED, Example
from ingraft.data.tensors import collate, row_ids
from ingraft.errors import IngraftError

LENGTHS = st.lists(st.integers(1, 300), max_size=400)


def texts(lengths: list[int]) -> list[str]:
    return ["x" * length for length in lengths]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=LENGTHS, size=st.integers(1, 9), seed=st.integers(), epoch=st.integers(0, 5), bucket=st.booleans())
def test_every_example_once_and_nothing_else_enters(
    lengths: list[int], size: int, seed: int, epoch: int, bucket: bool
) -> None:
    made = batches(texts(lengths), size, seed, epoch, bucket)
    assert sorted(i for batch in made for i in batch) == list(range(len(lengths)))
    assert sorted(map(len, made), reverse=True)[: len(lengths) // size] == [size] * (len(lengths) // size), (
        "one partial batch at most"
    )
    assert made == batches(texts(lengths), size, seed, epoch, bucket)
    whole = batches(texts(lengths), size, seed, epoch, bucket, drop_last=True)
    assert whole == [batch for batch in made if len(batch) == size] or len(lengths) % size


def test_the_order_is_the_same_on_every_machine_and_version() -> None:
    assert batches(texts([3, 1, 2, 5, 4, 6, 7]), 2, seed=3, epoch=1) == [[6], [3, 5], [1, 2], [0, 4]]


def test_epochs_and_seeds_differ() -> None:
    lengths = texts([n % 37 + 1 for n in range(500)])
    orders = [batches(lengths, 8, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(one != other for i, one in enumerate(orders) for other in orders[:i])
    sets = [{frozenset(batch) for batch in order} for order in orders]
    assert all(len(one & other) < 3 for i, one in enumerate(sets) for other in sets[:i]), (
        "batches are made anew, not only reordered"
    )


def test_buckets_save_padding_and_do_not_sort_the_epoch() -> None:
    lengths = texts([(n * 7919) % 400 + 1 for n in range(4000)])
    random, bucketed = (padding_share(lengths, batches(lengths, 8, 0, 0, bucket)) for bucket in (False, True))
    assert random > 0.35
    assert bucketed < 0.03
    means = [sum(len(lengths[i]) for i in batch) / len(batch) for batch in batches(lengths, 8, 0, 0)]
    for window in range(0, 500, 50):
        part = means[window : window + 50]
        assert part != sorted(part)
        assert abs(sum(part[:25]) - sum(part[25:])) / 25 < 120, "long and short batches are mixed"


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(IngraftError, match="at least 1"):
        batches(["a"], 0, 0, 0)


def test_collate_pads_right_and_masks_the_padding() -> None:
    rows = [
        Example(input_ids=[5, 6, 7], labels=[IGNORED, 6, 7], row_id=4),
        Example(input_ids=[8], labels=[8], row_id=9),
    ]
    batch = collate(rows, pad_id=1)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert collate(rows, pad_id=1, multiple=8)["labels"].shape == (2, 8)
    assert row_ids(rows).tolist() == [4, 9]


def test_collate_classes_and_refusals() -> None:
    rows = [
        Example(input_ids=[5, 6], label=2, token_type_ids=[0, 1], row_id=0),
        Example(input_ids=[7], label=0, token_type_ids=[1], row_id=1),
    ]
    batch = collate(rows, pad_id=0)
    assert batch["labels"].tolist() == [2, 0]
    assert batch["token_type_ids"].tolist() == [[0, 1], [1, 0]]
    with pytest.raises(IngraftError, match="one kind"):
        collate([rows[0], Example(input_ids=[1], labels=[1], row_id=2)], pad_id=0)
    with pytest.raises(IngraftError, match="empty batch"):
        collate([], pad_id=0)
