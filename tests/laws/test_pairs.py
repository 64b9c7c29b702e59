"""Two adapters of different methods acting together mean what their composition says, however they are computed, merged, mixed and saved.

The composition: first all that add, each on the original W, `W + (W_a - W) + (W_b - W)`; then those that chain; then what acts on outputs,
attention and input, on the model that has those weights.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

import ingraft.adapt as adapt
from ingraft.methods import registry
from ingraft.methods.contract import WeightPart
from ingraft.testing.cases import close, differs, force_general_path, merge, randomise, run
from ingraft.testing.subjects import SUBJECTS

OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12},
    "dora": {"r": 4, "lora_alpha": 12},
    "loha": {"r": 2, "alpha": 12},
    "ia3": {},
    "bitfit": {"add_bias": True},
    "full": {"target_modules": ["q_proj", "norm"]},
    "houlsby": {"reduction_factor": 4.0},
    "parallel": {"reduction_factor": 4.0},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 2},
}
"""Two that add by a shortcut, one that has none beside another, one that chains, biases, whole parameters; outputs, attention, input."""

PAIRS = list(itertools.combinations(OPTIONS, 2))


def chains(name: str) -> bool:
    part = registry.load(name).part
    return issubclass(part, WeightPart) and part.composition == "chain"


def mergeable(name: str) -> bool:
    return registry.load(name).mergeable


def grafted(*names: str) -> Any:
    """A Llama with adapters named after their methods; all act, in this order."""
    model = SUBJECTS["llama"].make_redrawn()
    for name in names:
        graft(model, name)
    adapt.activate(model, *names)
    return model


def graft(model: Any, name: str) -> None:
    adapt.attach(model, registry.make_config(name, OPTIONS[name]), name, seed=3)
    randomise(model, name, scale=0.5)


def composed(first: str, second: str) -> Any:
    """The composition without the code that composes: weights written in one by one, the rest attached behind."""
    base = SUBJECTS["llama"].make_redrawn()
    on_weights = [name for name in (first, second) if mergeable(name)]
    adds = [name for name in on_weights if not chains(name)]
    start = {key: p.detach().clone() for key, p in base.named_parameters()}
    changes: list[dict[str, torch.Tensor]] = []
    for name in adds:
        alone = grafted(name)
        merge(alone)
        adapt.detach(alone, keep_merged=True)
        changes.append({key: p.detach() - start.get(key, torch.zeros(())) for key, p in alone.named_parameters()})
    for key in {key for one in changes for key in one}:
        owner, _, leaf = key.rpartition(".")
        value = start.get(key, torch.zeros(())) + sum(one[key] for one in changes if key in one)
        base.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    rest = [name for name in on_weights if chains(name)] + [n for n in (first, second) if n not in on_weights]
    values = grafted(*rest) if rest else None
    for name in rest:
        adapt.attach(base, registry.make_config(name, OPTIONS[name]), name, seed=3)
        with torch.no_grad():  # the values it has on the base as it was
            for key, parameter in adapt.parameters(base, name).items():
                parameter.copy_(adapt.parameters(values, name)[key])
    if rest:
        adapt.activate(base, *rest)
    return base


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_a_pair_is_its_composition(first: str, second: str) -> None:
    batch = SUBJECTS["llama"].batch(3)
    model = grafted(first, second)
    both = run(model, batch)
    close(both, run(composed(first, second), batch), "acting and composed", times=3.0)
    if mergeable(first) or mergeable(second):  # two on outputs act one behind the other
        adapt.activate(model, second, first)
        close(run(model, batch), both, "in the other order", times=3.0)
        adapt.activate(model, first, second)
    force_general_path(model)
    close(run(model, batch), both, "shortcut and general path", times=3.0)
    for name in (first, second):
        adapt.activate(model, name)
        differs(run(model, batch), both, f"{name} and both")


@pytest.mark.parametrize(("first", "second"), [pair for pair in PAIRS if any(map(mergeable, pair))], ids=lambda n: n)
def test_a_pair_merges_as_far_as_it_can(first: str, second: str) -> None:
    """What is a change of weights is written in; what is not goes on acting on the merged weights; unmerging gives the bits back."""
    batch = SUBJECTS["llama"].batch(3)
    model = grafted(first, second)
    both = run(model, batch)
    adapt.merge(model, *(name for name in (first, second) if mergeable(name)))
    close(run(model, batch), both, "merged and acting", times=3.0)
    adapt.unmerge(model)
    assert torch.equal(run(model, batch), both)


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=lambda name: name)
def test_a_pair_in_one_batch_and_in_files(first: str, second: str, tmp_path: Path) -> None:
    """Rows with one, the other, both and none are each what they are alone; saved alone and loaded together they act as before."""
    batch = SUBJECTS["llama"].batch(4)
    model = grafted(first, second)
    both = run(model, batch)
    entries: list[Any] = [first, (first, second), None, second]
    with adapt.rows(model, entries):
        mixed = run(model, batch)
    for row, entry in enumerate(entries):
        adapt.activate(model, *((entry,) if isinstance(entry, str) else entry or ()))
        alone = run(model, {key: value[row : row + 1] for key, value in batch.items()})
        close(mixed[row : row + 1], alone, f"row {row} ({entry})", times=3.0)
    for name in (first, second):
        adapt.save(model, tmp_path / name, name)
    other = SUBJECTS["llama"].make_redrawn()
    for name in (second, first):
        assert adapt.load(other, tmp_path / name) == name
    adapt.activate(other, first, second)
    assert torch.equal(run(other, batch), both)
