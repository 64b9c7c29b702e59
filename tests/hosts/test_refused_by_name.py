"""What a model has no place for is refused when it is attached or loaded, by name; batches of no rows and rows without a batch are served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import nn

import ingraft
import peft
from ingraft import adapt
from ingraft.errors import IngraftError
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
IDS = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))


def swin() -> Any:
    config = t.SwinConfig(embed_dim=16, depths=[1, 1], num_heads=[2, 4], image_size=32, patch_size=4, window_size=4)
    return t.SwinForImageClassification(config)


def deepseek() -> Any:
    config = t.DeepseekV3Config(
        **TINY,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    )
    return t.DeepseekV3ForCausalLM(config)


def detr() -> Any:
    backbone = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = t.DetrConfig(
        backbone_config=backbone,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    return t.DetrModel(config)


def bloom() -> Any:
    torch.manual_seed(0)
    return t.BloomForCausalLM(t.BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=2)).eval()


@pytest.mark.parametrize(
    ("make", "method", "said"),
    [
        (swin, "reft", "works at a width of 16, not at the model's 32"),
        (deepseek, "prefix", "not as wide as its values"),
        (detr, "prompt", "DetrModel embeds no tokens"),
    ],
)
def test_refused_when_attached(make: Any, method: str, said: str) -> None:
    with pytest.raises(IngraftError, match=said):
        adapt.attach(make(), make_config(method, {}))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_prefix_file_for_an_attention_outside_the_registry(tmp_path: Path) -> None:
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(bloom(), config).save_pretrained(tmp_path)
    with pytest.raises(IngraftError, match=r"BloomAttention.* registry"):
        ingraft.load(bloom(), tmp_path)


def test_prompts_where_the_models_prefix_names_something_else() -> None:
    """Llama 4's language model has its inner model under another name than its class says."""
    torch.manual_seed(0)
    config = t.Llama4TextConfig(
        **TINY, num_key_value_heads=1, head_dim=8, num_local_experts=2, intermediate_size_mlp=24
    )
    model = t.Llama4ForCausalLM(config).eval()
    with torch.no_grad():
        base = model(input_ids=IDS).logits
        adapt.attach(model, make_config("prompt", {"num_virtual_tokens": 3}))
        randomise(model, "default")
        found = model(input_ids=IDS).logits
        assert found.shape == base.shape
        virtual_PD = next(iter(ingraft.parameters(model, "default").values()))
        whole = torch.cat([virtual_PD.expand(2, -1, -1), model.get_input_embeddings()(IDS)], 1)
        with adapt.disabled(model):
            torch.testing.assert_close(model(inputs_embeds=whole).logits[:, 3:], found)
            assert torch.equal(model(input_ids=IDS).logits, base)


@pytest.mark.parametrize(
    ("method", "options"),
    [("fourierft", {"n_frequency": 8}), ("c3a", {"block_size": 4}), ("road", {"group_size": 4})],
)
@pytest.mark.parametrize("shape", [(8,), (0, 8), (0, 3, 8)])
def test_no_batch_and_a_batch_of_nothing(method: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    adapt.attach(model, make_config(method, {**options, "target_modules": ["0"]}))
    randomise(model, "default")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = model(x)
    y.sum().backward()
    assert all(p.grad is not None for p in ingraft.parameters(model, "default").values())
    if x.numel():
        torch.testing.assert_close(y, model(x[None])[0])
