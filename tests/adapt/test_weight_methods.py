"""Methods on weights: rows, shared banks, sums of adapters, refusals with what would work, and what a layer keeps for backward."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ingraft
from ingraft import C3AConfig, RandLoraConfig, VeraConfig
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.lokr import factors
from ingraft.testing.cases import Case, close, differs, randomise, run
from ingraft.testing.subjects import SUBJECTS
from ingraft.testing.table import row

METHODS = ("loha", "lokr", "vera", "randlora", "fourierft", "c3a", "shira", "miss", "hira", "vblora", "gralora")


@pytest.mark.parametrize("name", METHODS)
def test_regression_6_rows_of_the_base_are_the_bases(name: str) -> None:
    """Rows meant for the base, or for another adapter, get exactly that."""
    case = Case(row=row(name), subject=SUBJECTS["llama"])
    model, batch = case.adapted("a", "b"), case.batch(4)
    alone: dict[str | None, Tensor] = {}
    for adapter in ("a", "b"):
        ingraft.activate(model, adapter)
        alone[adapter] = run(model, batch)
    with ingraft.disabled(model):
        alone[None] = run(model, batch)
    wanted = ["b", None, "a", None]
    with ingraft.rows(model, wanted):
        mixed = run(model, batch)
    for index, adapter in enumerate(wanted):
        close(mixed[index], alone[adapter][index], f"row {index}, meant for {adapter or 'the base'}")
        for other in {"a", "b", None} - {adapter}:
            differs(mixed[index], alone[other][index], f"row {index} and {other or 'the base'}")


@pytest.mark.parametrize(
    ("config", "banks"),
    [
        (RandLoraConfig(r=4), ("base_model.randlora_A", "base_model.randlora_B")),
        (VeraConfig(r=8), ("base_model.vera_A", "base_model.vera_B")),
    ],
)
def test_regression_10_a_shared_bank_is_written_once(config: Any, banks: tuple[str, ...], tmp_path: Path) -> None:
    """The file holds each shared matrix once, or not at all where it is drawn again; both give the same adapter."""
    options = {key: value for key, value in config.options().items() if value is not None}
    subject = SUBJECTS["llama"]
    outputs: list[Tensor] = []
    for saved in (True, False):
        model = subject.make_redrawn()
        ingraft.attach(
            model, registry.make_config(config.method, {**options, "save_projection": saved}), "default", seed=2
        )
        randomise(model, "default", scale=0.3)
        folder = ingraft.save(model, tmp_path / str(saved), dtype=torch.float32)
        tensors = load_file(folder / "adapter_model.safetensors")
        large = [key for key in tensors if key.endswith(("_A", "_B"))]
        assert large == (sorted(banks) if saved else [])
        own = sum(parameter.numel() for parameter in ingraft.parameters(model, "default").values())
        assert sum(tensor.numel() for key, tensor in tensors.items() if key not in banks) == own
        fresh = subject.make_redrawn()
        ingraft.load(fresh, folder)
        outputs.append(run(fresh, subject.batch(3)))
        assert torch.equal(outputs[-1], run(model, subject.batch(3)))
    assert torch.equal(outputs[0], outputs[1])


def test_regression_10_a_file_with_other_copies_is_refused(tmp_path: Path) -> None:
    """PEFT's copies for every layer are read over if they are copies, and refused by name if they are not."""
    from safetensors.torch import save_file

    subject = SUBJECTS["llama"]
    model = subject.make_redrawn()
    ingraft.attach(model, RandLoraConfig(r=4))
    ingraft.save(model, tmp_path)
    (tmp_path / "ingraft.json").unlink()  # as PEFT's folders are
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    copy = "base_model.model.model.layers.0.self_attn.q_proj.randlora_A"
    save_file({**tensors, copy: tensors["base_model.randlora_A"].clone()}, file)
    ingraft.load(subject.make_redrawn(), tmp_path)
    save_file({**tensors, copy: tensors["base_model.randlora_A"] + 1}, file)
    with pytest.raises(IngraftError, match=r"q_proj\.randlora_A is not the base_model\.randlora_A"):
        ingraft.load(subject.make_redrawn(), tmp_path)


def test_regression_21_two_c3a_adapters_are_the_sum_of_both() -> None:
    """The second sees the layer's input, not the first one's output; merged, active and written out by hand agree."""
    layer = nn.Sequential(nn.Linear(12, 8))
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    base = layer(x).detach()
    changes: list[Tensor] = []
    for name in ("a", "b"):
        ingraft.attach(layer, C3AConfig(block_size=4, target_modules=("0",)), name)
        randomise(layer, name, scale=3.0)
        changes.append(run(layer, {"input": x}) - base)
        differs(changes[-1], torch.zeros_like(base) + 1e-9, name)
    ingraft.activate(layer, "a", "b")
    both = run(layer, {"input": x})
    close(both, base + changes[0] + changes[1], "two C3A adapters and the sum of their changes")
    ingraft.merge(layer)
    close(run(layer, {"input": x}), both, "merged and active")


def test_two_vera_adapters_keep_their_own_keys() -> None:
    """A second adapter's pair is drawn from its own key, whatever the first one's is."""
    subject = SUBJECTS["linear"]
    outputs: list[Tensor] = []
    for others in (False, True):
        model = subject.make_redrawn()
        if others:
            ingraft.attach(model, VeraConfig(r=3, target_modules=("first",), projection_prng_key=1), "other")
        ingraft.attach(model, VeraConfig(r=5, target_modules=("first", "second"), projection_prng_key=2), "a")
        randomise(model, "a")
        outputs.append(run(model, subject.batch(3)))
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("c3a", {"block_size": 5}, ["first", "16 x 12", "Sizes that do: 1, 2, 4."]),
        ("shira", {"r": 7}, ["first", "16 x 12", "at most 6"]),
        ("fourierft", {"n_frequency": 200}, ["first", "192 frequencies", "n_frequency_pattern"]),
        ("randlora", {"r": 13}, ["first", "at most 12"]),
        ("loha", {"r": 13}, ["first", "at most 12"]),
        ("miss", {"r": 13}, ["first", "12 inputs"]),
        ("vblora", {"vector_length": 8}, ["first", "Lengths that do: 1, 2, 4."]),
        ("gralora", {"gralora_k": 8}, ["first", "Numbers that do: 1, 2, 4."]),
        ("miss", {"r": 3, "init_weights": "bat"}, ["first", "Sizes that do: 1, 2, 4."]),
        ("miss", {"r": 3, "mini_r": 5, "init_weights": "mini"}, ["first", "Sizes that do: 1, 2, 4, 8, 16."]),
    ],
)
def test_a_size_that_cannot_work_is_refused_with_those_that_do(
    method: str, options: dict[str, Any], words: list[str]
) -> None:
    """At attach, by name, and nothing is changed."""
    model = SUBJECTS["linear"].make_redrawn()
    keys = list(model.state_dict())
    with pytest.raises(IngraftError) as caught:
        ingraft.attach(model, registry.make_config(method, {**options, "target_modules": ["first"]}))
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert list(model.state_dict()) == keys and type(model.first) is nn.Linear  # type: ignore[attr-defined]


@pytest.mark.parametrize("wanted", [-1, 1, 2, 3, 4, 5, 8, 16, 100])
def test_kronecker_factors_are_pefts(wanted: int) -> None:
    """The two sides are cut where Hugging Face PEFT cuts them, for every size up to 200."""
    from peft.tuners.lokr.layer import factorization

    for size in range(1, 200):
        assert factors(size, wanted) == factorization(size, wanted), size


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("shira", "hira")])
def test_training_keeps_nothing_as_large_as_the_weight(name: str) -> None:
    """What a layer holds until backward is its input, small things, and views of frozen tensors: nothing new of the weight's size."""
    side = 128
    layer = nn.Sequential(nn.Linear(side, side, bias=False))
    options = {"c3a": {"block_size": 16}, "loha": {"r": 4}, "miss": {"r": 16}, "vblora": {"num_vectors": 16}}.get(
        name, {}
    )
    ingraft.attach(layer, registry.make_config(name, {**options, "target_modules": ["0"]}))
    randomise(layer, "default")
    x = torch.randn(4, side, requires_grad=True)
    kept: dict[int, int] = {}
    frozen = {tensor.untyped_storage().data_ptr() for tensor in (*layer.parameters(), *layer.buffers())}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in frozen:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert max(kept.values(), default=0) < side * side / 2, sorted(kept.values())[-3:]
    y.square().mean().backward()
    gradients = [parameter.grad for parameter in ingraft.parameters(layer, "default").values()]
    assert all(gradient is not None and math.isfinite(float(gradient.abs().sum())) for gradient in gradients)


def test_shira_trains_only_its_entries() -> None:
    """Merged, exactly the chosen entries of the weight have changed, and a seed chooses the same ones again."""
    made: list[Tensor] = []
    for _ in range(2):
        model = SUBJECTS["linear"].make_redrawn()
        before = model.first.weight.detach().clone()  # type: ignore[attr-defined, union-attr]
        ingraft.attach(model, registry.make_config("shira", {"r": 2, "target_modules": ["first"]}), seed=7)
        randomise(model, "default")
        ingraft.merge(model)
        made.append((model.first.weight != before).detach())  # type: ignore[attr-defined, operator, union-attr]
    assert int(made[0].sum()) == 2 * (12 + 16)
    assert torch.equal(*made)
