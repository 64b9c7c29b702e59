"""Blocks of families that keep the number of heads to their config, or register an attention's output projection first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t

import ingraft
import peft
from ingraft import adapt
from ingraft.adapt.roles import blocks
from ingraft.methods.registry import make_config
from ingraft.testing.cases import randomise

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


def neox() -> Any:
    torch.manual_seed(0)
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**TINY)).eval()


def phi3() -> Any:
    torch.manual_seed(0)
    return t.Phi3ForCausalLM(t.Phi3Config(**TINY)).eval()


def longformer() -> Any:
    torch.manual_seed(0)
    return t.LongformerForMaskedLM(t.LongformerConfig(**TINY, attention_window=4)).eval()


IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("make", "ends"),
    [
        (neox, ("attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        (phi3, ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")),
        (longformer, ("attention.output.dense", "intermediate.dense", "output.dense")),
    ],
)
def test_where_attention_and_mlp_end(make: Any, ends: tuple[str, str, str]) -> None:
    (first, _) = blocks(make())
    assert (
        tuple(
            path.removeprefix(first.path + ".")
            for path in (first.attention_out, first.mlp_in or "", first.mlp_out or "")
        )
        == ends
    )


@pytest.mark.parametrize("method", ["prefix", "houlsby", "pfeiffer", "parallel", "reft", "freeze"])
def test_gpt_neox_has_what_needs_blocks(method: str) -> None:
    model = neox()
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        adapt.attach(model, make_config(method, {}))
        randomise(model, "default")
        assert not torch.equal(model(input_ids=IDS).logits, base)
        with adapt.disabled(model):
            assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gpt_neox_prefix_files_go_both_ways(tmp_path: Path) -> None:
    model = neox()
    adapt.attach(model, make_config("prefix", {"num_virtual_tokens": 3}))
    randomise(model, "default")
    ingraft.save(model, tmp_path / "x")
    there = peft.PeftModel.from_pretrained(neox(), str(tmp_path / "x")).eval()
    again = neox()
    ingraft.load(again, tmp_path / "x")
    with torch.no_grad():
        found = model(input_ids=IDS).logits
        torch.testing.assert_close(there(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits, found)
        assert torch.equal(again(input_ids=IDS).logits, found)


def test_learned_tokens_go_through_phi3s_fused_projection() -> None:
    model = phi3()
    adapt.attach(model, make_config("llama-adapter", {"adapter_len": 3}))
    randomise(model, "default")
    attention = model.model.layers[0].self_attn
    with torch.no_grad(), adapt.disabled(model):
        base = model(input_ids=IDS).logits
    with torch.no_grad():
        assert not torch.equal(model(input_ids=IDS).logits, base)
    assert attention.qkv_proj.weight.shape[0] == 48


def test_projections_that_run_only_with_global_attention_are_no_bypass() -> None:
    """Longformer calls them where there is global attention; the ones beside them ran."""
    model = longformer()
    adapt.attach(model, make_config("lora", {"r": 2}))
    randomise(model, "default")
    with torch.no_grad():
        local = model(input_ids=IDS).logits
        everywhere = model(input_ids=IDS, global_attention_mask=torch.ones_like(IDS)).logits
        with adapt.disabled(model):
            assert not torch.equal(model(input_ids=IDS).logits, local)
            assert not torch.equal(model(input_ids=IDS, global_attention_mask=torch.ones_like(IDS)).logits, everywhere)
