"""LoRA's variants train as Hugging Face PEFT trains them: the gradient of every tensor, and ten optimiser steps; and what each does to a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ingraft
import peft
from ingraft.adapt.files import CONFIG
from ingraft.methods.registry import make_config
from ingraft.testing.cases import loss_of

TARGETS = ["q_proj", "v_proj", "down_proj"]

CASES: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"v_proj": 2}),
    "lora-bias": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, alpha_pattern={"q_proj": 3}),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def trained(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> list[float]:
    """Ten steps of AdamW; the losses on the way."""
    optimiser = torch.optim.AdamW(list(parameters), lr=1e-2)
    losses: list[float] = []
    for _ in range(10):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    return losses


@pytest.mark.filterwarnings("ignore:.*have invalid shape", "ignore:.*has no bias")
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_ten_steps_are_theirs(name: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    torch.manual_seed(2)
    theirs = peft.get_peft_model(tiny.make("llama"), CASES[name]()).eval()
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = tiny.make("llama")
    ingraft.load(ours, tmp_path / "start", trainable=True)
    assert ingraft.status(ours).adapters[0].method == name.removesuffix("-bias")

    own = ingraft.parameters(ours, "default")
    loss_of(forward(theirs, batch)).backward()
    loss_of(forward(ours, batch)).backward()
    others = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    assert len(own) == len(others)
    size = max(float(p.grad.abs().max()) for p in others.values())
    for key, p in own.items():
        path, _, tensor = key.rpartition(".")
        suffix = {"lora_bias": "lora_B.default.bias", "magnitude": "lora_magnitude_vector.default.weight"}
        other = others[f"base_model.model.{path}.{suffix.get(tensor, f'{tensor}.default.weight')}"]
        assert p.grad is not None and float((p.grad - other.grad).abs().max()) < 1e-5 * size, key

    losses = trained(own.values(), lambda: loss_of(forward(ours, batch)))
    expected = trained(others.values(), lambda: loss_of(forward(theirs, batch)))
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert float((forward(ours, batch) - forward(theirs, batch)).detach().abs().max()) < 1e-3


@pytest.mark.parametrize("method", ["pissa", "olora", "lora-plus"])
def test_a_file_is_a_lora_to_others_and_goes_on_as_what_it_is_here(
    method: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    batch = tiny.example("llama")
    model = tiny.make("llama")
    ingraft.attach(model, make_config(method, {"r": 3, "rank_pattern": {"down_proj": 5}}), seed=1)
    tiny.perturb(ingraft.parameters(model, "default").values())
    expected = tiny.output(model, batch)
    ingraft.save(model, tmp_path / "a")
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "a", trainable=True)
    assert ingraft.status(again).adapters[0].method == method
    assert torch.equal(tiny.output(again, batch), expected)
    for key, p in ingraft.parameters(model, "default").items():
        assert torch.equal(p, ingraft.parameters(again, "default")[key]), key

    (tmp_path / "a" / "ingraft.json").unlink()  # without our manifest it is what everyone sees
    plain = tiny.make("llama")
    ingraft.load(plain, tmp_path / "a")
    assert ingraft.status(plain).adapters[0].method == "lora"
    assert float((tiny.output(plain, batch) - expected).abs().max()) < 1e-5


def test_options_in_a_manifest_that_do_not_fit_the_file_are_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    from ingraft import durable
    from ingraft.adapt import files

    model = tiny.make("llama")
    ingraft.attach(model, make_config("pissa", {"r": 4}), seed=1)
    config, weights, facts = files.serialised(model, "default")
    for wrong in ({"r": 3}, {"lora_alpha": 1}, {"r": "x"}, {"rank_pattern": {"q_proj": 2}}):
        facts["options"] = {"r": 4} | wrong
        with durable.folder(tmp_path / "a", True, facts) as staging:
            durable.write_file(staging / CONFIG, config)
            durable.write_file(staging / "adapter_model.safetensors", weights)
        fresh = tiny.make("llama")
        with pytest.raises(ingraft.IngraftError, match=r"ingraft\.json"):
            ingraft.load(fresh, tmp_path / "a")
        assert not hasattr(fresh, "ingraft_control")


def test_pissa_and_olora_leave_the_base_alone(tiny: SimpleNamespace) -> None:
    for method in ("pissa", "olora"):
        model = tiny.make("llama")
        before = {key: p.clone() for key, p in model.named_parameters()}
        expected = tiny.output(model, tiny.example("llama"))
        ingraft.attach(model, make_config(method, {}), seed=1)
        assert float((tiny.output(model, tiny.example("llama")) - expected).abs().max()) < 1e-6
        ingraft.detach(model)
        assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_lora_plus_gives_b_its_own_rate(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora-plus", {"loraplus_lr_ratio": 8}), seed=1)
    groups = {group["lr"]: group["params"] for group in ingraft.param_groups(model, 0.01)}
    own = ingraft.parameters(model, "default")
    assert {id(p) for p in groups[0.01]} == {id(p) for key, p in own.items() if key.endswith("lora_A")}
    assert {id(p) for p in groups[0.08]} == {id(p) for key, p in own.items() if key.endswith("lora_B")}


def test_a_saved_lora_plus_has_the_tensors_of_a_lora(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora-plus", {}), seed=1)
    ingraft.save(model, tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
