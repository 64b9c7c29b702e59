"""Options that change what a method is made of, held to the same laws: a shared prefix encoder, other activations and scales, extra heads."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from ingraft.methods import registry
from ingraft.methods.contract import WeightPart
from ingraft.testing import SUBJECTS, Row, check_method

NUMBERS = [1, 2, 3, 4, 5, 6, 7, 13, 21, 22, 23]

CALLS = [8, 9, 10, 12, 18, 19]
"""Laws of who acts when, which know nothing of how a weight changes: for options of that, `pytest -m study` tries them."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefix-projection-llama": (
        "prefix",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prefix-projection-t5": ("prefix", {"num_virtual_tokens": 3, "prefix_projection": True}),
    "p-tuning-lstm-llama": (
        "p-tuning",
        {"num_virtual_tokens": 3, "encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 6},
    ),
    "p-tuning-without-encoder-gpt2": ("p-tuning", {"num_virtual_tokens": 3, "encoder_reparameterization_type": None}),
    "prompt-before-the-answer-llama": ("prompt", {"num_virtual_tokens": 3, "position": "answer"}),
    "prompt-before-the-answer-t5": ("prompt", {"num_virtual_tokens": 3, "position": "answer"}),
    "prompt-on-both-sides-bert": ("prompt", {"num_virtual_tokens": 3, "position": "split"}),
    "p-tuning-on-both-sides-gpt2": (
        "p-tuning",
        {"num_virtual_tokens": 3, "position": "split", "encoder_hidden_size": 6},
    ),
    "pfeiffer-gelu-bert": ("pfeiffer", {"reduction_factor": 2.0, "non_linearity": "gelu", "scaling": 0.5}),
    "lora-gaussian-and-a-head-vit": (
        "lora",
        {"r": 3, "init_lora_weights": "gaussian", "modules_to_save": ["classifier"]},
    ),
    "lora-ranks-and-bias-llama": (
        "lora",
        {
            "r": 3,
            "rank_pattern": {"down_proj": 5, "layers.1.self_attn.q_proj": 2},
            "alpha_pattern": {".*_proj": 7},
            "lora_bias": True,
        },
    ),
    "lora-ranks-and-bias-conv2d": ("lora", {"r": 4, "rank_pattern": {"first": 2}, "lora_bias": True}),
    "dora-and-embeddings-llama": ("dora", {"r": 2, "target_modules": ["embed_tokens", "q_proj", "down_proj"]}),
    "oft-exact-and-shared-bert": (
        "oft",
        {"oft_block_size": 0, "r": 4, "use_cayley_neumann": False, "block_share": True},
    ),
    "oft-two-terms-linear": ("oft", {"oft_block_size": 4, "num_cayley_neumann_terms": 2, "target_modules": ["first"]}),
    "coft-llama": ("oft", {"oft_block_size": 4, "coft": True, "eps": 0.5}),
    # Where PEFT has no BOFT: on a CPU it has no second factor.
    "boft-two-factors-gpt2": ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 2}),
    "boft-two-factors-embedding": (
        "boft",
        {"boft_block_size": 4, "boft_n_butterfly_factor": 2, "target_modules": ["plain", "rescaled"]},
    ),
    "road-2-bert": ("road", {"variant": "road_2", "group_size": 2}),
    "road-4-conv1d-transposed": (
        "road",
        {"variant": "road_4", "group_size": 8, "target_modules": ["first", "second"]},
    ),
    "lora-and-tokens-llama": ("lora", {"r": 4, "lora_alpha": 12, "trainable_token_indices": [3, 16, 20, 45]}),
    "dora-and-tokens-gpt2": ("dora", {"r": 2, "trainable_token_indices": {"wte": [3, 16, 20, 45]}}),
    "prompt-and-tokens-gpt2": ("prompt", {"num_virtual_tokens": 3, "trainable_token_indices": [3, 16, 20, 45]}),
    "ia3-by-names-gpt2": ("ia3", {"target_modules": ["c_attn", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}),
    # PEFT's file is asked about one of the layers.
    **{
        f"ia3-by-names-{kind}": ("ia3", {"target_modules": ["first", "second"], "feedforward_modules": [name]})
        for kind, name in {"conv1d": "first", "conv2d": "first", "conv2d-groups": "second", "conv3d": "second"}.items()
    },
}


def unpadded(n: int) -> dict[str, Tensor]:
    """The Llama's rows without their padding."""
    ids = SUBJECTS["llama"].batch(n)["input_ids"].clamp(min=3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_keeps_every_law(name: str) -> None:
    weights = issubclass(registry.load(VARIANTS[name][0]).part, WeightPart)
    assert _held(name, NUMBERS if weights else NUMBERS + CALLS) > 9


@pytest.mark.study
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_keeps_the_laws_of_calls(name: str) -> None:
    assert _held(name, CALLS) > 2


def _held(name: str, numbers: list[int]) -> int:
    """Try laws on a variant; returns how many checks held."""
    method, options = VARIANTS[name]
    subject = SUBJECTS[max((subject for subject in SUBJECTS if name.endswith(f"-{subject}")), key=len)]
    if "embed_tokens" in options.get("target_modules", ()):
        # Unpadded: at padding tokens the shortcut trains B, as PEFT does, and the general path nothing, as torch's padding_idx does.
        subject = dataclasses.replace(subject, batch=unpadded)
    inexact = "its norm is held constant" if method == "dora" or name.startswith("coft") else None
    row = Row(config=registry.make_config(method, options), inexact=inexact)
    # PEFT has tokens beside LoRA alone.
    numbers = [n for n in numbers if n != 22] if name.startswith("prompt-and-tokens") else numbers
    return check_method(row, subjects=[subject], numbers=numbers)
