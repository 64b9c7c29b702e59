"""`rows` is held against the batch at the model's root, whatever its entries: rows that agree are no excuse for a wrong number of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.lora import LoraConfig
from ingraft.testing.cases import close, randomise, run, same
from ingraft.testing.subjects import SUBJECTS, redrawn

WRONG: list[list[Any]] = [["a"] * 3, [None] * 3, [("a", "b")] * 3, ["a", None, "b"], ["a"] * 4]


def adapted(model: nn.Module, *targets: str) -> nn.Module:
    for name in ("a", "b"):
        adapt.attach(model, LoraConfig(r=2, target_modules=targets or "all-linear"), name, seed=1)
        randomise(model, name)
    adapt.activate(model, "a")
    return model


@pytest.mark.parametrize("entries", WRONG)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_a_wrong_number_of_rows_is_refused_whatever_they_say(name: str, entries: list[Any]) -> None:
    """Equal or mixed, adapters or none: what cannot be the batch is refused at the root, and the model answers as before."""
    model, batch = adapted(SUBJECTS[name].make_redrawn()), SUBJECTS[name].batch(2)
    expected = run(model, batch)
    with (
        adapt.rows(model, entries),
        pytest.raises(IngraftError, match=rf"{len(entries)} rows.* 2 .*one adapter per row"),
    ):
        run(model, batch)
    same(run(model, batch), expected, "output after the refusal")


@pytest.mark.parametrize("entries", WRONG)
def test_plain_modules_too(entries: list[Any]) -> None:
    """A model that is no transformer's is held to the same, and one row in the batch is not taken for all of them."""
    model = adapted(redrawn(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))), "0")
    for size in (1, 2):
        with adapt.rows(model, entries), pytest.raises(IngraftError, match=rf"{len(entries)} rows.* {size} "):
            model(torch.ones(size, 4))


def test_rows_of_one_adapter_stay_one_pass() -> None:
    """The right number of equal rows is the adapter acting on the batch, in one group, and so is a whole multiple: repeated rows."""
    model, batch = adapted(SUBJECTS["llama"].make_redrawn()), SUBJECTS["llama"].batch(4)
    expected = run(model, batch)
    for entries in (["a"] * 4, ["a"] * 2, ["a"]):
        with adapt.rows(model, entries):
            assert [group.rows for group in require_control(model).call.groups] == [None]
            same(run(model, batch), expected, f"{len(entries)} rows and the adapter")


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("entries", [["a", "a"], ["a", None]])
def test_generate_repeats_rows_and_still_refuses_wrong_ones(name: str, entries: list[Any]) -> None:
    """Beams and return sequences are copies of their rows; with another number of rows `generate` is refused."""
    model: Any = adapted(SUBJECTS[name].make_redrawn())
    ids = SUBJECTS[name].batch(2)["input_ids"]
    told = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    with adapt.rows(model, entries):
        beams = model.generate(ids, num_beams=2, num_return_sequences=2, **told)
    assert beams.shape[0] == 4
    with adapt.rows(model, [*entries, "a"]), pytest.raises(IngraftError, match="3 rows"):
        model.generate(ids, **told)


def test_where_time_comes_first_rows_cannot_be_counted() -> None:
    """Dimension 0 of a model that takes time first says nothing about rows: those that agree act as the adapter does."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
    model = adapted(redrawn(nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False))), "linear1")
    x_TBD = torch.randn(5, 2, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(x_TBD)
        with adapt.rows(model, ["a", "a"]):
            close(model(x_TBD), expected, "rows that agree and the adapter")


class Timed(nn.Module):
    """As models of diffusion: one time for all rows, given by name ahead of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, time: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        return self.inner(sample) * time


def test_a_single_number_among_the_inputs_is_no_batch() -> None:
    """Of inputs given by name, the first with more than one dimension tells the rows."""
    model = adapted(redrawn(Timed()), "inner")
    x = torch.ones(2, 4)
    with adapt.rows(model, ["a", "a"]):
        model(time=torch.ones(1), sample=x)
    with adapt.rows(model, ["a"] * 3), pytest.raises(IngraftError, match="3 rows"):
        model(time=torch.ones(1), sample=x)


@pytest.mark.parametrize("entries", [[1, 2], [["a", 1]], [True], 3, None, "a", [b"a"]])
def test_entries_that_name_no_adapter_are_refused(entries: Any) -> None:
    """Numbers, bytes, a bare name, nothing at all: an IngraftError that says what an entry is, and nothing is changed."""
    model = adapted(nn.Sequential(nn.Linear(4, 4)), "0")
    before = require_control(model).call
    with pytest.raises(IngraftError, match=r"rows: .*(a list|a name, several names or None)"):
        adapt.rows(model, entries).__enter__()
    assert require_control(model).call is before
