"""Rows are served only where a change in a row of the batch changes the entries that would be taken for that row's, and no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ingraft
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config

NAMES = ["a", "b", None, "a"]


def adapted(model: nn.Module, **options: Any) -> nn.Module:
    for seed, name in enumerate("ab"):
        config = ingraft.LoraConfig(r=2, init_lora_weights=False, **options)
        ingraft.attach(model, config, name=name, seed=seed)
    return model.eval()


def xlnet() -> nn.Module:
    return transformers.XLNetModel(transformers.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=64))


def swin() -> nn.Module:
    config = transformers.Swinv2Config(
        image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4, num_labels=3
    )
    return transformers.Swinv2ForImageClassification(config)


def ids() -> torch.Tensor:
    return torch.randint(1, 60, (4, 4))


@pytest.mark.parametrize("case", ["time first", "xlnet", "a table beside the rows"])
def test_rows_are_not_guessed(case: str) -> None:
    """All of these have a dimension 0 that is a multiple of the four rows, and is something else."""
    torch.manual_seed(0)
    if case == "time first":
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0)
        model = adapted(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), target_modules=["linear1"])
        inputs: dict[str, Any] = {"src": torch.randn(4, 4, 16)}
    elif case == "xlnet":
        model, inputs = adapted(xlnet()), {"input_ids": ids()}
    else:
        model = adapted(swin(), target_modules=["continuous_position_bias_mlp.0"])
        inputs = {"pixel_values": torch.randn(4, 3, 32, 32)}
    with (
        torch.no_grad(),
        ingraft.rows(model, NAMES),
        pytest.raises(IngraftError, match=r"does not go with (the )?rows"),
    ):
        model(**inputs)


@pytest.mark.parametrize("training", [True, False])
def test_the_probe_leaves_nothing_behind(training: bool) -> None:
    """A mixed batch equals its rows alone from the first call on; caches, modes, and the stream of random numbers are as without it."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=32, tie_word_embeddings=False
    )
    model = adapted(transformers.GPT2LMHeadModel(config), target_modules=["c_attn", "wpe", "wte"]).train(training)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    batch, cache = ids(), transformers.DynamicCache()
    state = torch.get_rng_state()
    with torch.no_grad(), ingraft.rows(model, NAMES):
        mixed = model(batch, past_key_values=cache).logits
    assert torch.equal(torch.get_rng_state(), state)
    assert cache.get_seq_length() == 4
    assert model.training is training
    for row, name in enumerate(NAMES):
        ingraft.activate(model, *([name] if name else []))
        with torch.no_grad():
            torch.testing.assert_close(model(batch).logits[row], mixed[row])


def test_it_is_asked_again_when_what_is_attached_changes() -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4, n_positions=32)
    model = adapted(transformers.GPT2LMHeadModel(config), target_modules=["c_attn"])
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    model.transformer.h[0].mlp.register_forward_hook(count)
    with torch.no_grad(), ingraft.rows(model, NAMES):
        for expected in (3, 4):
            model(ids())
            assert calls == expected
    ingraft.attach(model, ingraft.LoraConfig(r=2, target_modules=["c_proj"]), name="c")
    with torch.no_grad(), ingraft.rows(model, NAMES):
        model(ids())
    assert calls == 7


def test_a_module_without_inputs_cannot_show_its_rows() -> None:
    config = transformers.SwinConfig(
        image_size=32, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.SwinForImageClassification(config)
    for seed, name in enumerate("ab"):
        ingraft.attach(model, make_config("full", {}), name=name, seed=seed)
    with torch.no_grad(), ingraft.rows(model.eval(), NAMES), pytest.raises(IngraftError, match="without an input"):
        model(pixel_values=torch.randn(4, 3, 32, 32))
