"""Two well-known shapes without weights, so that methods can be compared by what they train: a small base and a large one.

On the meta device a 7B model takes no memory and is made in a second; the methods' formulas need nothing but sizes.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

SHAPES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
    },
    "Llama-7B": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
        "tie_word_embeddings": False,
    },
}
"""Published configurations: SmolLM2 (Allal et al. 2025), LLaMA 7B (Touvron et al. 2023)."""

NEEDED: dict[str, dict[str, Any]] = {"bitfit": {"add_bias": True}}
"""Options without which a method has nothing to train in a Llama."""


@functools.cache
def shape(name: str) -> nn.Module:
    """One of `SHAPES` as a causal language model on the meta device."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**SHAPES[name]))


def counts(method: str) -> dict[str, int | None]:
    """Trained parameters of a method with its default options on each shape; None where it cannot be attached there."""
    from ingraft.adapt import expected_count
    from ingraft.errors import IngraftError
    from ingraft.methods.registry import make_config

    found: dict[str, int | None] = {}
    for name in SHAPES:
        try:
            found[name] = expected_count(shape(name), make_config(method, NEEDED.get(method, {})))
        except IngraftError:
            found[name] = None
    return found
