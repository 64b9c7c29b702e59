"""A Pfeiffer adapter on a BERT classifier, written with AdapterHub's names: `import adapters` became `import ingraft.adapters as adapters`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import ingraft.adapters as adapters
from ingraft.adapters import AdapterConfig


def main() -> dict[str, float]:
    """Train a few steps, save, load into a fresh copy of the base. Returns losses and the difference after loading."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model: Any = BertForSequenceClassification(config).eval()
    copy: Any = BertForSequenceClassification(config).eval()
    copy.load_state_dict(model.state_dict())

    adapters.init(model)
    model.add_adapter("reviews", config=AdapterConfig.load("pfeiffer", reduction_factor=4))
    model.train_adapter("reviews")

    input_ids = torch.randint(5, 100, (16, 12))
    labels = (input_ids[:, 0] > 50).long()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    first = last = 0.0
    for step in range(20):
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        last = loss.item()
        first = first if step else last

    with tempfile.TemporaryDirectory() as folder:
        model.save_adapter(f"{folder}/reviews", "reviews")
        adapters.init(copy)
        copy.load_adapter(f"{folder}/reviews", set_active=True)
    with torch.no_grad():
        difference = (model(input_ids).logits - copy(input_ids).logits).abs().max().item()
    print(f"loss {first:.3f} -> {last:.3f}; largest difference after loading {difference:.1e}")
    return {"first": first, "last": last, "difference": difference}


if __name__ == "__main__":
    main()
