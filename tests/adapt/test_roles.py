"""Roles: where a transformer's attention, MLP and blocks are, found by structure in families that write them differently."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import transformers as t
from torch import nn

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.adapt.roles import blocks, sites_of_role
from ingraft.errors import IngraftError
from ingraft.methods.houlsby import HoulsbyConfig
from ingraft.methods.ia3 import IA3Config
from ingraft.methods.parallel import ParallelConfig
from ingraft.methods.pfeiffer import PfeifferConfig
from ingraft.testing.cases import differs, randomise, run
from ingraft.testing.subjects import SUBJECTS, redrawn

TINY = {"vocab_size": 48, "max_position_embeddings": 64}


def opt() -> nn.Module:
    return t.OPTForCausalLM(
        t.OPTConfig(
            **TINY,
            hidden_size=16,
            ffn_dim=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            word_embed_proj_dim=16,
            dropout=0.0,
        )
    )


def distilbert() -> nn.Module:
    return t.DistilBertForMaskedLM(t.DistilBertConfig(**TINY, dim=16, hidden_dim=24, n_layers=2, n_heads=2))


def bart() -> nn.Module:
    config = t.BartConfig(
        **TINY,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        forced_eos_token_id=2,
        decoder_start_token_id=2,
    )
    return t.BartForConditionalGeneration(config)


def gemma3() -> nn.Module:
    config = t.Gemma3TextConfig(
        **TINY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return t.Gemma3ForCausalLM(config)


MAKE: dict[str, Callable[[], nn.Module]] = {
    **{name: SUBJECTS[name].make_redrawn for name in ("llama", "gpt2", "bert", "t5", "vit")},
    **{make.__name__: lambda make=make: redrawn(make()) for make in (opt, distilbert, bart, gemma3)},
}

# family: first block, attention, keys and values, attention's end, MLP's begin, MLP's end, closing norm; the last four relative to the block
EXPECTED: dict[str, tuple[str, str, tuple[str, ...], str, str, str, str | None]] = {
    "llama": (
        "model.layers.0",
        "self_attn",
        ("self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        None,
    ),
    "gemma3": (
        "model.layers.0",
        "self_attn",
        ("self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.down_proj",
        None,
    ),
    "gpt2": ("transformer.h.0", "attn", ("attn.c_attn",), "attn.c_proj", "mlp.c_fc", "mlp.c_proj", None),
    "bert": (
        "bert.encoder.layer.0",
        "attention.self",
        ("attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "output.LayerNorm",
    ),
    "t5": (
        "encoder.block.0",
        "layer.0.SelfAttention",
        ("layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
        "layer.0.SelfAttention.o",
        "layer.1.DenseReluDense.wi",
        "layer.1.DenseReluDense.wo",
        None,
    ),
    "vit": (
        "vit.layers.0",
        "attention",
        ("attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        "mlp.fc1",
        "mlp.fc2",
        None,
    ),
    "opt": (
        "model.decoder.layers.0",
        "self_attn",
        ("self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "fc1",
        "fc2",
        None,
    ),
    "distilbert": (
        "distilbert.transformer.layer.0",
        "attention",
        ("attention.k_lin", "attention.v_lin"),
        "attention.out_lin",
        "ffn.lin1",
        "ffn.lin2",
        "output_layer_norm",
    ),
    "bart": (
        "model.encoder.layers.0",
        "self_attn",
        ("self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "fc1",
        "fc2",
        "final_layer_norm",
    ),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_places_of_a_block(name: str) -> None:
    found = blocks(MAKE[name]())
    assert len(found) == (4 if name in ("t5", "bart") else 2)
    path, attention, keys_values, attention_out, mlp_in, mlp_out, norm = EXPECTED[name]
    first = found[0]
    assert first.path == path
    assert first.attention == f"{path}.{attention}"
    assert set(first.attention_kv) == {f"{path}.{each}" for each in keys_values}
    assert first.attention_out == f"{path}.{attention_out}"
    assert (first.mlp_in, first.mlp_out) == (f"{path}.{mlp_in}", f"{path}.{mlp_out}")
    assert first.norm == (f"{path}.{norm}" if norm else None)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_decoders_cross_attention_is_left_alone(name: str) -> None:
    for block in blocks(MAKE[name]())[2:]:
        for place in (block.attention, *block.attention_kv, block.attention_out):
            assert "EncDec" not in place and "encoder_attn" not in place
        assert block.mlp_out is not None and ("DenseReluDense.wo" in block.mlp_out or "fc2" in block.mlp_out)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_bottleneck_and_ia3_acts_in_every_family(name: str) -> None:
    batch = {**SUBJECTS["bert"].batch(2)} if name != "vit" else SUBJECTS["vit"].batch(2)
    if name in ("t5", "bart"):
        batch = SUBJECTS["t5"].batch(2)
    for config, sites in ((HoulsbyConfig(), 2), (PfeifferConfig(), 1), (ParallelConfig(), 1), (IA3Config(), 3)):
        model = MAKE[name]()
        expected = run(model, batch)
        adapt.attach(model, config)
        fused = name == "gpt2" and isinstance(config, IA3Config)
        assert len(require_control(model).adapters["default"].sites) == len(blocks(model)) * (2 if fused else sites)
        randomise(model, "default")
        differs(run(model, batch), expected, f"{config.method} on {name}", least=1e-3)


def test_roles_may_stand_beside_names() -> None:
    model = MAKE["llama"]()
    adapt.attach(model, IA3Config(target_modules=["attention-kv", "mlp-out"]))
    assert len(require_control(model).adapters["default"].sites) == 6
    adapt.detach(model)
    adapt.attach(model, HoulsbyConfig(target_modules=["model.layers.1.mlp"]))
    assert list(require_control(model).adapters["default"].sites) == ["model.layers.1.mlp"]


def test_a_model_without_blocks_is_told_so() -> None:
    with pytest.raises(IngraftError, match="no transformer blocks were found"):
        blocks(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(IngraftError, match="no transformer blocks were found"):
        sites_of_role(nn.Linear(4, 4), "mlp")
