"""Families of models as hosts: tiny random ones, each adapted, run, trained, merged, saved and loaded by a method of each kind."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig
from ingraft.methods.houlsby import HoulsbyConfig
from ingraft.methods.lora import LoraConfig
from ingraft.methods.prefix import PrefixTuningConfig
from ingraft.methods.prompt import PromptTuningConfig
from ingraft.testing.cases import Snapshot, close, differs, loss_of, output, randomise, run
from ingraft.testing.subjects import redrawn

IDS = torch.randint(5, 40, (3, 7), generator=torch.Generator().manual_seed(3))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
PICTURE = {"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3))}


def _falcon() -> nn.Module:
    from transformers import FalconConfig, FalconForCausalLM

    return FalconForCausalLM(
        FalconConfig(
            vocab_size=48, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, bos_token_id=1, eos_token_id=2
        )
    )


def _bloom() -> nn.Module:
    from transformers import BloomConfig, BloomForCausalLM

    return BloomForCausalLM(BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=4))


def _opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=48,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=4,
            ffn_dim=24,
            max_position_embeddings=64,
            word_embed_proj_dim=16,
            dropout=0.0,
        )
    )


def _gemma3() -> nn.Module:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    return Gemma3ForCausalLM(
        Gemma3TextConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention"],
            max_position_embeddings=64,
        )
    )


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=3,
            max_position_embeddings=64,
        )
    )


def _swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4, drop_path_rate=0.0
    )
    config.num_labels = 5
    return SwinForImageClassification(config)


def _convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 1], num_stages=2, patch_size=4, image_size=32)
    config.num_labels = 5
    return ConvNextForImageClassification(config)


def _unet() -> nn.Module:
    diffusers = pytest.importorskip("diffusers")
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
    )


def _qwen2_vl() -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    text = {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0},
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=45, video_token_id=46, vision_start_token_id=44
    )
    return Qwen2VLForConditionalGeneration(config)


def _llava() -> nn.Module:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    text = LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=45))


def _shown() -> dict[str, Tensor]:
    """A picture of four patches in the middle of a text."""
    ids = torch.tensor([[7, 44, 45, 45, 45, 45, 9, 11, 13]] * 2)
    pixels = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _seen() -> dict[str, Tensor]:
    """A picture of 4 x 4 patches, which become four tokens, and text around them."""
    ids = torch.tensor([[7, 44, 45, 45, 45, 45, 9, 11, 13]] * 2)
    g = torch.Generator().manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == 45).long(),
        "pixel_values": torch.randn(32, 3 * 2 * 4 * 4, generator=g),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
    }


def _noised() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "sample": torch.randn(2, 4, 8, 8, generator=g),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 12, generator=g),
    }


FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]]]] = {
    "falcon": (_falcon, lambda: dict(TEXT)),
    "bloom": (_bloom, lambda: dict(TEXT)),
    "opt": (_opt, lambda: dict(TEXT)),
    "gemma3": (_gemma3, lambda: dict(TEXT)),
    "mixtral": (_mixtral, lambda: dict(TEXT)),
    "swin": (_swin, lambda: dict(PICTURE)),
    "convnext": (_convnext, lambda: dict(PICTURE)),
    "unet": (_unet, _noised),
    "llava": (_llava, _shown),
    "qwen2-vl": (_qwen2_vl, _seen),
}

LORA = {
    "mixtral": LoraConfig(r=2, target_parameters=("experts.gate_up_proj", "experts.down_proj")),
    "convnext": LoraConfig(r=2, target_modules=("dwconv", "pwconv1", "pwconv2")),
    "unet": LoraConfig(r=2, target_modules=("to_q", "to_v", "to_out.0", "conv1", "conv_shortcut", "time_emb_proj")),
}
METHODS: dict[str, Callable[[str], MethodConfig]] = {
    "lora": lambda name: LORA.get(name, LoraConfig(r=2)),
    "houlsby": lambda name: HoulsbyConfig(reduction_factor=4.0),
    "prefix": lambda name: PrefixTuningConfig(num_virtual_tokens=3),
    "prompt": lambda name: PromptTuningConfig(num_virtual_tokens=3),
}

REFUSED = {
    ("falcon", "prefix"): "does not take its attention from transformers' registry",
    ("bloom", "prefix"): "does not take its attention from transformers' registry",
    ("swin", "prefix"): "number of heads differs from stage to stage",
    ("swin", "prompt"): "embeds no tokens",
    ("convnext", "houlsby"): "no transformer blocks were found",
    ("convnext", "prefix"): "no transformer blocks were found",
    ("convnext", "prompt"): "embeds no tokens",
    ("unet", "prefix"): "UNet2DConditionModel is none",
    ("unet", "prompt"): "UNet2DConditionModel is none",
    ("qwen2-vl", "prefix"): "positions along several axes",
    ("qwen2-vl", "prompt"): "positions along several axes",
}
"""What must be refused, and the words that say why."""


def _made(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    make, batch = FAMILIES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # remarks about tiny vocabularies, and of diffusers about itself
        return redrawn(make()), batch()


def _cases() -> list[tuple[str, str]]:
    return [(name, method) for name in FAMILIES for method in METHODS]


@pytest.mark.parametrize(("name", "method"), _cases())
def test_a_family_hosts_a_method_or_refuses_it_by_name(name: str, method: str, tmp_path: Path) -> None:
    """Attach, act, train, merge, save, load and detach in every family; what has no place there is refused and changes nothing."""
    model, batch = _made(name)
    expected = run(model, batch)
    before = Snapshot.of(model)
    config = METHODS[method](name)
    if (name, method) in REFUSED:
        with pytest.raises(IngraftError, match=REFUSED[name, method]):
            adapt.attach(model, config, "a")
        before.assert_restored(model)
        return
    adapt.attach(model, config, "a", seed=1)
    close(run(model, batch), expected, "fresh adapter and base") if method in ("lora", "houlsby") else None
    randomise(model, "a")
    active = run(model, batch)
    differs(active, expected, "active and base")
    loss_of(output(model, batch)).backward()
    gradients = [p.grad for p in adapt.parameters(model, "a").values() if p.grad is not None]
    # A LLaVA leaves the last layer of its vision tower unused.
    assert len(gradients) == len(adapt.parameters(model, "a")) or name == "llava"
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in gradients)
    if method == "lora":
        adapt.merge(model)
        close(run(model, batch), active, "merged and active")
        adapt.unmerge(model)
    adapt.save(model, tmp_path / "a", "a", dtype=torch.float32)
    for p in model.parameters():
        p.grad = None
    adapt.detach(model)
    before.assert_restored(model)
    adapt.load(model, tmp_path / "a")
    close(run(model, batch), active, "loaded and saved")


def test_blocks_are_found_inside_stages() -> None:
    """A Swin's stages and a UNet's transformers hold the blocks; a mixture's experts are one MLP."""
    counts = {"swin": 4, "unet": 4, "mixtral": 2, "llava": 4}
    for name, count in counts.items():
        if name == "unet":
            pytest.importorskip("diffusers")
        model, _ = _made(name)
        adapt.attach(model, HoulsbyConfig())
        sites: Any = require_control(model).adapters["default"].sites
        assert len(sites) == 2 * count, (name, list(sites))
    assert [path for path in sites if path.endswith("mlp.fc2")]
