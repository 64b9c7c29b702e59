"""A shelf: more adapters than the model has room for, each as good as if it had always been there."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ingraft
from ingraft import IngraftError
from ingraft.adapt import Shelf, shelf
from ingraft.adapt.control import require_control
from ingraft.methods.registry import make_config

METHODS = ("lora", "ia3", "lora", "prefix")


@pytest.fixture
def folders(tmp_path: Path, tiny: SimpleNamespace) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for n, method in enumerate(METHODS):
        model = tiny.make("llama")
        ingraft.attach(model, make_config(method, {}), seed=n)
        tiny.perturb(ingraft.parameters(model, "default").values())
        found[f"a{n}"] = ingraft.save(model, tmp_path / f"a{n}")
    return found


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names that were loaded, in order."""
    names: list[str] = []
    real = shelf.load

    def load(model: Any, folder: Any, name: str) -> str:
        names.append(name)
        return real(model, folder, name)

    monkeypatch.setattr(shelf, "load", load)
    return names


def test_an_adapter_that_went_and_came_back_gives_the_same_bits(
    folders: dict[str, Path], tiny: SimpleNamespace, loaded: list[str]
) -> None:
    model, batch = tiny.make("llama"), tiny.example("llama")
    bare, own = tiny.output(model, batch), Shelf(model, folders, room=1)
    first: dict[str, torch.Tensor] = {}
    for name in (*folders, *folders):
        own.need(name)
        assert torch.equal(tiny.output(model, batch), bare)  # what acts is not its business
        ingraft.activate(model, name)
        assert torch.equal(first.setdefault(name, tiny.output(model, batch)), tiny.output(model, batch))
        ingraft.activate(model)
        assert list(require_control(model).adapters) == [name]
    assert loaded == [*folders, *folders]
    assert not torch.equal(first["a0"], first["a2"])


def test_the_one_needed_longest_ago_goes(folders: dict[str, Path], tiny: SimpleNamespace, loaded: list[str]) -> None:
    own = Shelf(tiny.make("llama"), folders, room=2)
    for name, held in (
        ("a0", "a0"),
        ("a1", "a0 a1"),
        ("a0", "a1 a0"),
        ("a2", "a0 a2"),
        ("a2", "a0 a2"),
        ("a1", "a2 a1"),
    ):
        own.need(name)
        assert own.held == tuple(held.split())
    assert loaded == ["a0", "a1", "a2", "a1"]
    own.need("a1", "a0")
    assert own.held == ("a1", "a0") and loaded[4:] == ["a0"]


@pytest.mark.parametrize("why", ["active", "rows", "trainable", "merged"])
def test_what_is_in_use_stays(why: str, folders: dict[str, Path], tiny: SimpleNamespace) -> None:
    model, batch = tiny.make("llama"), tiny.example("llama")
    own = Shelf(model, folders, room=1)
    own.need("a0")
    rows = ["a0", *[None] * (len(batch["input_ids"]) - 1)]
    if why == "active":
        ingraft.activate(model, "a0")
    elif why == "trainable":
        ingraft.trainable(model, "a0")
    elif why == "merged":
        ingraft.activate(model, "a0")
        ingraft.merge(model)
    with ingraft.rows(model, rows) if why == "rows" else torch.no_grad():
        before, acts = tiny.output(model, batch), require_control(model).call
        with pytest.raises(IngraftError, match="a1 cannot be loaded: there is room for 1"):
            own.need("a1")
        assert torch.equal(tiny.output(model, batch), before)
        assert require_control(model).call.acting == acts.acting
    assert own.held == ("a0",)


def test_adapters_of_others_do_not_count_and_stay(folders: dict[str, Path], tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora", {}), "mine")
    own = Shelf(model, folders, room=1)
    for name in ("a0", "a1"):
        own.need(name)
        assert list(require_control(model).adapters) == ["mine", name]
    ingraft.detach(model, "a1")
    assert own.held == ()
    own.need("a1")
    assert own.held == ("a1",) and require_control(model).call.active == ("mine",)


def test_a_load_that_fails_leaves_what_was_there(folders: dict[str, Path], tiny: SimpleNamespace) -> None:
    model, batch = tiny.make("llama"), tiny.example("llama")
    own = Shelf(model, folders, room=1)
    own.need("a0")
    ingraft.activate(model)
    weights = folders["a2"] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    before = tiny.output(model, batch)
    with pytest.raises(IngraftError, match="damaged or changed"):
        own.need("a2")
    with pytest.raises(IngraftError, match="no adapter 'a9' on it"):
        own.need("a9", "a1")
    assert own.held == ("a0",) and list(require_control(model).adapters) == ["a0"]
    assert torch.equal(tiny.output(model, batch), before)


@pytest.mark.parametrize(("room", "name", "words"), [(0, "a", "room must be"), (1, "a/b", "no name for an adapter")])
def test_a_shelf_that_cannot_be(room: int, name: str, words: str, tiny: SimpleNamespace) -> None:
    with pytest.raises(IngraftError, match=words):
        Shelf(tiny.make("llama"), {name: "nowhere"}, room)
