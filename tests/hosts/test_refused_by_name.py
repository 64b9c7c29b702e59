"""What a model has no place for is refused when it is attached or loaded, by name; batches of no rows and rows without a batch are served."""

from __future__ import annotations

from collections.abc import Callable
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


def swin_v2() -> Any:
    sizes: dict[str, Any] = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4}
    config = t.Swinv2Config(**sizes, drop_path_rate=0.0)
    return t.Swinv2ForImageClassification(config)


def llama4() -> Any:
    return t.Llama4ForCausalLM(
        t.Llama4TextConfig(
            hidden_size=32,
            intermediate_size=48,
            intermediate_size_mlp=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=64,
            num_local_experts=2,
            num_experts_per_tok=1,
            pad_token_id=0,
        )
    )


@pytest.mark.parametrize(
    ("make", "method", "options"),
    [
        (swin_v2, "full", {"target_modules": ["attention.self.query", "layernorm"]}),
        (swin_v2, "freeze", {}),
        (llama4, "houlsby", {"reduction_factor": 4}),
        (llama4, "parallel", {"reduction_factor": 4}),
    ],
)
@pytest.mark.parametrize("training", [False, True])  # joined, and group by group
def test_rows_where_a_module_returns_what_others_do_not(
    make: Callable[[], Any], method: str, options: dict[str, Any], training: bool
) -> None:
    """Tuples of one, tokens in one long list: each row is what it is alone, or the refusal names the module."""
    torch.manual_seed(0)
    model = make().eval()
    for name in ("a", "b"):
        ingraft.attach(model, make_config(method, options), name, seed=1)
        with torch.no_grad():
            for parameter in ingraft.parameters(model, name).values():
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.train(training)
    key, value = (
        ("pixel_values", torch.randn(2, 3, 32, 32)) if make is swin_v2 else ("input_ids", torch.randint(3, 60, (2, 7)))
    )
    with torch.no_grad():
        alone = []
        for row, name in enumerate(("a", "b")):
            ingraft.activate(model, name)
            alone.append(model(**{key: value[row : row + 1]}).logits)
        assert float((alone[0] - alone[1]).abs().max()) > 1e-3
        try:
            with ingraft.rows(model, ["a", "b"]):
                together = model(**{key: value}).logits
        except ingraft.IngraftError as error:
            assert method == "freeze" and "Leave this module out" in str(error)
        else:
            assert torch.allclose(together, torch.cat(alone), atol=1e-5)


@pytest.mark.parametrize("target", ["0", "2"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_layers_without_sizes(method: str, target: str) -> None:
    """A lazy layer anywhere: the base must run once first."""
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    config = make_config(method, {"target_modules": [target]})
    with pytest.raises(IngraftError, match=r"0: no weights yet \(a lazy layer\)\. Run the base once"):
        adapt.attach(model, config)
    model(torch.randn(2, 5))
    adapt.attach(model, make_config(method, {"target_modules": [target], **({"r": 2} if method == "lora" else {})}))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("method", ["lora", "bitfit", "full", "freeze", "ln-tuning"])
def test_a_weight_that_is_computed_ahead_of_the_forward(method: str) -> None:
    model = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 4))
    with pytest.raises(IngraftError, match=r"^0.*(computed|no norm)"):
        adapt.attach(model, make_config(method, {"target_modules": ["0"]}))
