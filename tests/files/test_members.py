"""An adapter over adapters (a fusion) is whole on the disk: its folder holds those it acts over."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ingraft
from ingraft import IngraftError, adapt
from ingraft.adapt.control import control_of
from ingraft.methods.registry import make_config

MEMBERS = ("one", "two")


def fused(tiny: SimpleNamespace) -> Any:
    """A model with two perturbed adapters and a perturbed fusion of them, which acts."""
    model = tiny.make("llama")
    for seed, name in enumerate(MEMBERS):
        ingraft.attach(model, make_config("pfeiffer", {"reduction_factor": 4.0}), name, seed=seed)
        tiny.perturb(ingraft.parameters(model, name).values())
    ingraft.attach(model, make_config("fusion", {"adapters": list(MEMBERS)}), "both", seed=3)
    tiny.perturb(ingraft.parameters(model, "both").values())
    return model


def test_a_saved_fusion_loads_into_a_bare_base(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, batch = fused(tiny), tiny.example("llama")
    expected = model(**batch).logits
    ingraft.save(model, tmp_path / "a", "both", dtype=torch.float32)
    fresh = tiny.make("llama")
    ingraft.load(fresh, tmp_path / "a")
    assert torch.equal(fresh(**batch).logits, expected)
    assert not any(p.requires_grad for p in fresh.parameters())
    ingraft.save(fresh, tmp_path / "a", "both", dtype=torch.float32, overwrite=True)
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "a")
    assert torch.equal(again(**batch).logits, expected)


def test_members_that_are_attached_are_the_ones_it_acts_over(tiny: SimpleNamespace, tmp_path: Path) -> None:
    model, batch = fused(tiny), tiny.example("llama")
    ingraft.save(model, tmp_path / "a", "both")
    expected = model(**batch).logits
    adapt.detach(model, "both")
    ingraft.load(model, tmp_path / "a")
    torch.testing.assert_close(model(**batch).logits, expected)
    assert list(control_of(model).adapters) == [*MEMBERS, "both"]  # type: ignore[union-attr]


def test_a_refused_fusion_leaves_no_member_behind(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """The second member is damaged: the first goes again, and what acted before acts."""
    ingraft.save(fused(tiny), tmp_path / "a", "both")
    (tmp_path / "a" / "adapters" / "two" / "adapter_model.safetensors").write_bytes(b"no tensors")
    model, batch = tiny.make("llama"), tiny.example("llama")
    with pytest.raises(IngraftError, match=r"adapters.two.*damaged"):
        ingraft.load(model, tmp_path / "a")
    assert control_of(model) is None
    ingraft.attach(model, make_config("lora", {"r": 2}), "mine", seed=1)
    tiny.perturb(ingraft.parameters(model, "mine").values())
    expected = model(**batch).logits
    with pytest.raises(IngraftError, match="damaged"):
        ingraft.load(model, tmp_path / "a")
    assert torch.equal(model(**batch).logits, expected)
    assert all(p.requires_grad for p in ingraft.parameters(model, "mine").values())


def test_a_members_name_is_no_path(tiny: SimpleNamespace, tmp_path: Path) -> None:
    ingraft.save(fused(tiny), tmp_path / "a", "both")
    (tmp_path / "a" / "ingraft.json").unlink()
    file = tmp_path / "a" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"adapters": ["one", "../../../a"]}))
    with pytest.raises(IngraftError, match="letters, digits"):
        ingraft.load(tiny.make("llama"), tmp_path / "a")


def test_a_folder_called_adapters_that_is_not_ours_stays(tiny: SimpleNamespace, tmp_path: Path) -> None:
    """Saving over a folder, whoever's: a user's own `adapters/` is neither removed nor mixed with."""
    mine = tmp_path / "a" / "adapters" / "notes.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    model = fused(tiny)
    ingraft.save(model, tmp_path / "a", "one", overwrite=True)
    assert mine.read_text() == "mine"
    with pytest.raises(IngraftError, match="is in the way"):
        ingraft.save(model, tmp_path / "a", "both", overwrite=True)
    assert mine.read_text() == "mine" and ingraft.load(tiny.make("llama"), tmp_path / "a") == "one"
    ingraft.save(model, tmp_path / "b", "both")
    (tmp_path / "b" / "notes.txt").write_text("mine")
    ingraft.save(model, tmp_path / "b", "both", overwrite=True)
    ingraft.save(model, tmp_path / "b", "one", overwrite=True)
    assert not (tmp_path / "b" / "adapters").exists() and (tmp_path / "b" / "notes.txt").exists()
