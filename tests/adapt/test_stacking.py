"""An adapter on top of a merged one: what is merged is part of its base, for training, switching, files, and until the very end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ingraft
from ingraft import DoraConfig, HoulsbyConfig, IA3Config, LoraConfig, PrefixTuningConfig
from ingraft.errors import IngraftError
from ingraft.testing.cases import close, differs, loss_of, output, randomise, run
from ingraft.testing.subjects import SUBJECTS

BATCH = SUBJECTS["llama"].batch(3)
ABOVE = [LoraConfig(r=2), DoraConfig(r=2), IA3Config(), HoulsbyConfig(reduction_factor=4)]


def merged(config: Any = None) -> Any:
    """A Llama with `a` merged into it, and `c`, attached before, that is not."""
    model = SUBJECTS["llama"].make_redrawn()
    for name in ("c", "a"):
        ingraft.attach(model, config or DoraConfig(r=4), name, seed=7)
        randomise(model, name)
    ingraft.merge(model, "a")
    return model


def trained(model: Any, steps: int = 3) -> list[float]:
    """Losses of a few steps of whatever is trainable."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: list[float] = []
    for _ in range(steps):
        loss = loss_of(output(model, BATCH))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(float(loss.detach()))
    return found


@pytest.mark.parametrize("config", ABOVE, ids=lambda config: config.method)
def test_it_is_trained_on_the_base_as_it_is(config: Any) -> None:
    """To the bit what it would be on a model that never was anything else; what lies below does not move."""
    model, plain = merged(), merged()
    ingraft.detach(plain, keep_merged=True)
    before, bits = run(model, BATCH), {k: v.clone() for k, v in model.state_dict().items()}
    for each in (model, plain):
        ingraft.attach(each, config, "b", seed=1)
    close(run(model, BATCH), before, "a fresh one on top changes nothing")
    assert trained(model) == trained(plain)
    assert torch.equal(run(model, BATCH), run(plain, BATCH))
    differs(run(model, BATCH), before, "trained", least=1e-3)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in bits.items())


def test_switching_speaks_of_what_stands_on_top() -> None:
    model = merged()
    below = run(model, BATCH)
    ingraft.attach(model, LoraConfig(r=2), "b")
    randomise(model, "b")
    above = run(model, BATCH)
    with ingraft.disabled(model):
        assert torch.equal(run(model, BATCH), below)
    ingraft.activate(model)
    assert torch.equal(run(model, BATCH), below)
    ingraft.activate(model, "a", "b")
    assert torch.equal(run(model, BATCH), above)
    with ingraft.rows(model, ["b", None, "b"]):
        mixed = run(model, BATCH)
    close(mixed[1], below[1], "a row without b")
    close(mixed[::2], above[::2], "rows with b")
    for action in (lambda: ingraft.activate(model, "c"), lambda: ingraft.rows(model, ["c", None, "b"]).__enter__()):
        with pytest.raises(IngraftError, match="without a, which is merged now"):
            action()
    with pytest.raises(IngraftError, match="does not stand on"):
        ingraft.combine(model, {"b": 1.0, "c": 1.0}, "d")
    with pytest.raises(IngraftError, match="merged already"):
        ingraft.merge(model, "b")
    assert torch.equal(run(model, BATCH), above)


def test_nothing_is_unmerged_from_under_it() -> None:
    """Not before it is gone; then the base has its bits back. Or what is merged stays for good, and the base is what it is."""
    bare = {key: p.detach().clone() for key, p in SUBJECTS["llama"].make_redrawn().named_parameters()}
    model = merged()
    ingraft.attach(model, LoraConfig(r=2), "b")
    for action in (lambda: ingraft.unmerge(model), lambda: ingraft.detach(model, "a"), lambda: ingraft.detach(model)):
        with pytest.raises(IngraftError, match="unmerge"):
            action()
    ingraft.detach(model, "b")
    ingraft.unmerge(model)
    for key, value in ingraft.adapt.base_parameters(model).items():
        assert torch.equal(value, bare[key])
    ingraft.merge(model, "a")
    ingraft.attach(model, LoraConfig(r=2), "b")
    randomise(model, "b")
    above = run(model, BATCH)
    ingraft.detach(model, "c", keep_merged=True)
    assert [adapter.name for adapter in ingraft.status(model).adapters] == ["b"]
    assert torch.equal(run(model, BATCH), above)
    ingraft.merge(model, "b")
    close(run(model, BATCH), above, "merged as well")


@pytest.mark.parametrize("config", [*ABOVE, PrefixTuningConfig(num_virtual_tokens=3)], ids=lambda config: config.method)
def test_its_file_says_what_it_stands_on(config: Any, tmp_path: Path) -> None:
    model = merged()
    ingraft.attach(model, config, "b")
    randomise(model, "b")
    above = run(model, BATCH)
    ingraft.save(model, tmp_path / "a", "a", dtype=torch.float32)
    ingraft.save(model, tmp_path / "c", "c")
    with pytest.warns(UserWarning, match="b acts on the base with a merged into it"):
        ingraft.save(model, tmp_path / "b", "b", dtype=torch.float32)
    other = SUBJECTS["llama"].make_redrawn()
    with pytest.raises(IngraftError, match="Load a and merge it first"):
        ingraft.load(other, tmp_path / "b")
    ingraft.load(other, tmp_path / "a")
    with pytest.raises(IngraftError, match="Load a and merge it first"):
        ingraft.load(other, tmp_path / "b")
    ingraft.merge(other, "a")
    with pytest.raises(IngraftError, match="Call `unmerge` first"):
        ingraft.load(other, tmp_path / "c")
    ingraft.load(other, tmp_path / "b")
    assert torch.equal(run(other, BATCH), above)
    ingraft.load(SUBJECTS["llama"].make_redrawn(), tmp_path / "c")


def test_on_a_base_merged_for_good_it_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    model = merged()
    ingraft.detach(model, keep_merged=True)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    ingraft.attach(model, LoraConfig(r=2), "b")
    randomise(model, "b")
    ingraft.save(model, tmp_path / "b")
    other = SUBJECTS["llama"].make_redrawn()
    with pytest.raises(IngraftError, match="another base"):
        ingraft.load(other, tmp_path / "b")
    other.load_state_dict(weights)
    ingraft.load(other, tmp_path / "b")
    close(run(other, BATCH), run(model, BATCH), "on the merged base")
