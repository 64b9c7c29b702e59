"""Adapters written here load in Hugging Face PEFT, and the other way round; both then compute the same."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import ingraft
import peft
from ingraft.methods.registry import make_config

TOLERANCE = 1e-5

Case = tuple[str, str, dict[str, Any], Any]

CASES: dict[str, Case] = {
    "lora-llama": ("llama", "lora", {"r": 4}, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])),
    "lora-gpt2": (
        "gpt2",
        "lora",
        {"r": 4, "target_modules": ["c_attn", "c_proj"]},
        peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "lora-bert": (
        "bert",
        "lora",
        {"target_modules": ["query"], "modules_to_save": ["classifier"]},
        peft.LoraConfig(target_modules=["query", "value"], task_type="SEQ_CLS"),
    ),
    "lora-mt5": (
        "mt5",
        "lora",
        {"target_modules": ["q", "v"]},
        peft.LoraConfig(target_modules=["q", "v"], task_type="SEQ_2_SEQ_LM"),
    ),
    "lora-embedding": (
        "llama",
        "lora",
        {"target_modules": ["embed_tokens", "q_proj"]},
        peft.LoraConfig(target_modules=["embed_tokens"]),
    ),
    "lora-conv2d": (
        "picture",
        "lora",
        {"r": 4, "target_modules": ["first", "second", "head"]},
        peft.LoraConfig(r=4, target_modules=["first", "second"], modules_to_save=["head"]),
    ),
    "lora-pattern": (
        "llama",
        "lora",
        {"target_modules": r".*\.1\..*_proj"},
        peft.LoraConfig(target_modules=r".*\.(q|k)_proj"),
    ),
    "lora-layers": (
        "llama",
        "lora",
        {"layers_to_transform": [1]},
        peft.LoraConfig(target_modules=["q_proj", "o_proj"], layers_to_transform=[0], layers_pattern="layers"),
    ),
    "lora-exclude": (
        "llama",
        "lora",
        {"exclude_modules": ["mlp.down_proj"]},
        peft.LoraConfig(target_modules="all-linear", exclude_modules=["k_proj"]),
    ),
    "lora-patterns": (
        "llama",
        "lora",
        {"rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2}, "alpha_pattern": {".*_proj": 7}},
        peft.LoraConfig(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"^model.layers.0.*q_proj": 3, "v_proj": 2},
            alpha_pattern={"v_proj": 5},
        ),
    ),
    "lora-bias": (
        "bert",
        "lora",
        {"target_modules": ["query"], "lora_bias": True, "modules_to_save": ["classifier"]},
        peft.LoraConfig(target_modules=["query", "value"], lora_bias=True, task_type="SEQ_CLS"),
    ),
    "lora-bias-conv2d": (
        "picture",
        "lora",
        {"r": 4, "target_modules": ["first", "second", "head"], "lora_bias": True},
        peft.LoraConfig(r=4, target_modules=["first", "head"], lora_bias=True),
    ),
    "rslora-llama": (
        "llama",
        "rslora",
        {"r": 4, "rank_pattern": {"down_proj": 9}},
        peft.LoraConfig(r=9, use_rslora=True, target_modules=["q_proj", "v_proj"], alpha_pattern={"v_proj": 3}),
    ),
    "rslora-conv2d": (
        "picture",
        "rslora",
        {"r": 4, "target_modules": ["first", "second", "head"]},
        peft.LoraConfig(r=4, use_rslora=True, target_modules=["first", "second"], modules_to_save=["head"]),
    ),
    "pissa-llama": (
        "llama",
        "pissa",
        {"r": 4, "rank_pattern": {"down_proj": 6}},
        peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"], lora_alpha=6),
    ),
    "olora-llama": (
        "llama",
        "olora",
        {"r": 4, "lora_alpha": 3},
        peft.LoraConfig(r=4, init_lora_weights="olora", target_modules=["q_proj", "v_proj"], lora_alpha=6),
    ),
    "pissa-rslora-llama": (
        "llama",
        "pissa",
        {"r": 4, "use_rslora": True, "rank_pattern": {"down_proj": 6}, "alpha_pattern": {"v_proj": 3}},
        peft.LoraConfig(r=4, use_rslora=True, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]),
    ),
    "olora-rslora-llama": (
        "llama",
        "olora",
        {"r": 4, "use_rslora": True, "lora_alpha": 3},
        peft.LoraConfig(r=4, use_rslora=True, init_lora_weights="olora", target_modules=["q_proj", "v_proj"]),
    ),
    "dora-llama": (
        "llama",
        "dora",
        {"r": 4},
        peft.LoraConfig(r=4, use_dora=True, target_modules=["q_proj", "up_proj"]),
    ),
    "dora-gpt2": (
        "gpt2",
        "dora",
        {"r": 4},
        peft.LoraConfig(r=4, use_dora=True, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    ),
    "dora-conv2d": (
        "picture",
        "dora",
        {"target_modules": ["first", "second"]},
        peft.LoraConfig(use_dora=True, target_modules=["first", "second"]),
    ),
    "dora-embedding": (
        "llama",
        "dora",
        {"target_modules": ["embed_tokens"]},
        peft.LoraConfig(use_dora=True, target_modules=["embed_tokens"]),
    ),
    "ia3-llama": (
        "llama",
        "ia3",
        {},
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    ),
    "ia3-gpt2": (
        "gpt2",
        "ia3",
        {},
        peft.IA3Config(
            target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True
        ),
    ),
    "ia3-bert": (
        "bert",
        "ia3",
        {"modules_to_save": ["classifier"]},
        peft.IA3Config(
            target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "ia3-conv2d": (
        "picture",
        "ia3",
        {"target_modules": ["first", "second"]},
        peft.IA3Config(target_modules=["first", "second"], feedforward_modules=[]),
    ),
    "prefix-llama": (
        "llama",
        "prefix",
        {"num_virtual_tokens": 5},
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "prefix-gpt2": (
        "gpt2",
        "prefix",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 24},
        peft.PrefixTuningConfig(
            num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=24
        ),
    ),
    "prefix-bert": (
        "bert",
        "prefix",
        {"num_virtual_tokens": 5, "prefix_projection": True, "modules_to_save": ["classifier"]},
        peft.PrefixTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    ),
    "prompt-llama": (
        "llama",
        "prompt",
        {"num_virtual_tokens": 5},
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "prompt-gpt2": (
        "gpt2",
        "prompt",
        {"num_virtual_tokens": 5},
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="CAUSAL_LM"),
    ),
    "prompt-bert": (
        "bert",
        "prompt",
        {"num_virtual_tokens": 5, "modules_to_save": ["classifier"]},
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_CLS"),
    ),
    "prompt-mt5": (
        "mt5",
        "prompt",
        {"num_virtual_tokens": 5},
        peft.PromptTuningConfig(num_virtual_tokens=5, task_type="SEQ_2_SEQ_LM"),
    ),
    "p-tuning-mt5": (
        "mt5",
        "p-tuning",
        {"num_virtual_tokens": 5},
        peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=12, task_type="SEQ_2_SEQ_LM"),
    ),
    "p-tuning-llama": (
        "llama",
        "p-tuning",
        {"num_virtual_tokens": 5},
        peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=12, task_type="CAUSAL_LM"),
    ),
    "p-tuning-gpt2": (
        "gpt2",
        "p-tuning",
        {"num_virtual_tokens": 5, "encoder_reparameterization_type": "LSTM"},
        peft.PromptEncoderConfig(
            num_virtual_tokens=5,
            encoder_hidden_size=12,
            encoder_reparameterization_type="LSTM",
            encoder_num_layers=3,
            task_type="CAUSAL_LM",
        ),
    ),
    "p-tuning-bert": (
        "bert",
        "p-tuning",
        {"num_virtual_tokens": 5, "modules_to_save": ["classifier"]},
        peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=12, task_type="SEQ_CLS"),
    ),
}
"""Name -> kind of model, our method and options, their config. The two sides of a case need not adapt the same modules."""


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@pytest.mark.filterwarnings(
    "ignore:.*have invalid shape", "ignore:.*has no bias"
)  # PEFT, of every lora_B.bias, its own too
@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    kind, method, options, _ = CASES[case]
    model, batch = tiny.make(kind), tiny.example(kind)
    base = tiny.output(model, batch)
    ingraft.attach(model, make_config(method, options), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ours = tiny.output(model, batch)
    assert difference(ours, base) > 100 * TOLERANCE
    ingraft.save(model, tmp_path / "adapter")
    theirs = tiny.output(peft.PeftModel.from_pretrained(tiny.make(kind), tmp_path / "adapter").eval(), batch)
    assert difference(ours, theirs) < TOLERANCE
    written = set(json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()))
    assert written <= set(type(CASES[case][3]).__dataclass_fields__)


@pytest.mark.filterwarnings(
    "ignore:.*have invalid shape", "ignore:.*has no bias"
)  # PEFT, of every lora_B.bias, its own too
@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    kind, method, _, config = CASES[case]
    batch = tiny.example(kind)
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny.make(kind), config).eval()
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    theirs = tiny.output(model, batch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        model.save_pretrained(str(tmp_path))
    here = tiny.make(kind)
    base = tiny.output(here, batch)
    assert ingraft.load(here, tmp_path) == "default"
    ours = tiny.output(here, batch)
    assert difference(theirs, base) > 100 * TOLERANCE
    assert difference(ours, theirs) < TOLERANCE
    assert ingraft.status(here).adapters[0].method == method


@pytest.mark.parametrize("case", ["lora-llama", "ia3-bert", "prefix-llama", "prefix-gpt2"])
def test_there_and_back_changes_no_tensor(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    kind, _, _, config = CASES[case]
    model = peft.get_peft_model(tiny.make(kind), config).eval()
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path / "theirs"))
    here = tiny.make(kind)
    ingraft.load(here, tmp_path / "theirs")
    ingraft.save(here, tmp_path / "ours", dtype=torch.float32)
    theirs = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
