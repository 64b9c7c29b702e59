"""What a file leaves out means the default of the library that wrote it."""

from __future__ import annotations

import dataclasses
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import ingraft
import peft
from ingraft.methods import registry

NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 1, "target_modules": None},
    "IA3": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 2]},
    **{
        kind: {"num_virtual_tokens": 3}
        for kind in ("P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING")
    },
}
"""What PEFT has no default for, or none that means anything here."""


def llama() -> Any:
    """Wide enough for every default size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def output(model: Any, **more: Any) -> Tensor:
    return model(input_ids=torch.tensor([[1, 2, 3, 4]]), **more).logits[:, -4:]


@pytest.mark.parametrize("kind", registry.incumbents())
def test_a_field_left_out_is_theirs(kind: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Each by itself, null, and all at once."""
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    soft = issubclass(cls, peft.PromptLearningConfig)
    options = NEEDED.get(kind, {"target_modules": ["q_proj"]})
    tasks = {"task_ids": torch.zeros(1, dtype=torch.long)} if kind == "MULTITASK_PROMPT_TUNING" else {}
    torch.manual_seed(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(llama(), cls(**options, task_type="CAUSAL_LM" if soft else None)).eval()
        tiny.perturb(p for p in model.parameters() if p.requires_grad)
        theirs = output(model, **tasks)
        model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    optional = [name for name in registry.incumbents()[kind].defaults if name in written and name not in options]
    variants = [({name}, {}) for name in optional] + [(set[str](), {name: None}) for name in optional]
    for without, nulls in [*variants, (set(optional), {})]:
        kept = {name: value for name, value in written.items() if name not in without}
        file.write_text(json.dumps(kept | nulls))
        here = llama()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ingraft.load(here, tmp_path)
        assert (output(here) - theirs).abs().max() < 1e-5, without or nulls


@pytest.mark.parametrize("kind", registry.incumbents())
def test_the_table_is_the_incumbents(kind: str) -> None:
    cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    own = registry.incumbents()[kind]
    everywhere = {field.name for field in dataclasses.fields(peft.PeftConfig)} | {"runtime_config"}
    fields = {field.name: field for field in dataclasses.fields(cls) if field.name not in everywhere}
    assert own.name == cls.__name__
    assert list(own.fields) == list(fields)
    for name, field in fields.items():
        made = field.default_factory() if callable(field.default_factory) else field.default
        assert own.defaults.get(name) == getattr(made, "value", made), name


def test_every_layout_has_its_row() -> None:
    layouts = (registry.load(name).peft for name in registry.records())
    assert {layout.peft_type for layout in layouts if layout is not None} == set(registry.incumbents())
