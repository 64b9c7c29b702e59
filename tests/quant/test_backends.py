"""Bases that a user had another library pack: hosts like any other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ingraft import adapt
from ingraft.adapt.weights import kind_of
from ingraft.methods.registry import make_config

METHODS = {"lora": {"r": 4}, "dora": {"r": 4}, "ia3": {}, "oft": {"oft_block_size": 4}}
X = torch.tensor([[1, 3, 4, 5, 2]])
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*cast from .* to float16.*"),
]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def by_bitsandbytes(tmp_path: Any, **options: Any) -> nn.Module:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    llama().save_pretrained(tmp_path / "base")
    config = BitsAndBytesConfig(**options)
    return LlamaForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config, dtype=torch.float32)


def four_bits(tmp_path: Any) -> nn.Module:
    return by_bitsandbytes(
        tmp_path,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )


def eight_bits(tmp_path: Any) -> nn.Module:
    return by_bitsandbytes(tmp_path, load_in_8bit=True)


def torchao_int8(tmp_path: Any) -> nn.Module:
    # Not among the test tools: transformers imports it with every model, and it prints what it lacks. Tried with 0.18.
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    del tmp_path
    model = llama()
    quantize_(model.model.layers, Int8WeightOnlyConfig(version=2))
    return model


@pytest.mark.parametrize("make", [four_bits, eight_bits, torchao_int8])
@pytest.mark.parametrize("method", METHODS)
def test_a_base_packed_elsewhere_is_a_host(make: Any, method: str, tmp_path: Any) -> None:
    """Over bitsandbytes' and torchao's layers a method computes what it computes over the same numbers dense, gets gradients, merges into a
    dense layer and leaves the packed one as it was."""
    model = make(tmp_path).eval()
    layers = {path: layer for path, layer in model.model.layers.named_modules() if path.endswith("_proj")}
    kinds = {path: kind_of(layer) for path, layer in layers.items()}
    assert all(kind is not None and kind.name == "linear" and kind.dense_class is nn.Linear for kind in kinds.values())
    with torch.no_grad():
        bare = model(X).logits  # some layers settle with their first forward
    adapt.attach(model, make_config(method, METHODS[method]), "a", seed=1)
    with torch.no_grad():
        for parameter in adapt.parameters(model, "a").values():
            parameter += 0.1 * torch.randn_like(parameter)
        active = model(X).logits
    assert not torch.allclose(active, bare, rtol=1e-2)
    model(X).logits.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in adapt.parameters(model, "a").values())
    before = {path: layer.weight for path, layer in layers.items()}
    types = {path: type(layer) for path, layer in layers.items()}
    adapt.merge(model)
    with torch.no_grad():
        # bitsandbytes multiplies int8 by int8, so that its own product rounds the activations as well.
        tolerance = 5e-2 if make is eight_bits else 1e-4
        merged = model(X).logits
        assert float((merged - active).norm() / active.norm()) < tolerance
    adapt.unmerge(model)
    assert all(layer.weight is before[path] and type(layer) is types[path] for path, layer in layers.items())
    with torch.no_grad():
        assert torch.equal(model(X).logits, active)
    adapt.merge(model)
    adapt.detach(model, keep_merged=True)
    adapt.make_dense(model)
    assert all(type(layer) is nn.Linear and layer.weight.is_floating_point() for layer in layers.values())
    with torch.no_grad():
        assert float((model(X).logits - merged).norm() / merged.norm()) < tolerance
