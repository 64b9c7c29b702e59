"""What all sites of an adapter share lies at the root, which may host a part of the adapter as well."""

from __future__ import annotations

import torch
import transformers

from ingraft import adapt
from ingraft.methods.registry import make_config


def test_what_sites_share_is_not_taken_for_a_part_of_the_root() -> None:
    """On a base without a head the root itself hosts the virtual tokens, beside the encoder that makes them."""
    config = transformers.LlamaConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.LlamaModel(config).eval()
    adapt.attach(model, make_config("p-tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}), seed=1)
    hidden = model(input_ids=torch.arange(3, 13).view(2, 5)).last_hidden_state
    hidden.square().sum().backward()
    tensors = adapt.parameters(model, "default")
    assert tensors
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in tensors.values())
    adapt.detach(model)
    assert not any("adapter:" in name for name, _ in model.named_modules())
