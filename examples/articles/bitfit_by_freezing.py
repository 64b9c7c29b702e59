"""BitFit the way articles show it: freeze everything but the biases by name; and by one line of Ingraft's."""

from __future__ import annotations

from typing import Any

import tiny
import torch

import ingraft
from ingraft import BitFitConfig


def train(model: Any) -> tuple[float, float]:
    """Loss before and after."""
    tokenizer = tiny.tokenizer()
    texts, labels = zip(*tiny.reviews(), strict=True)
    batch = {**tokenizer(list(texts), return_tensors="pt", padding=True), "labels": torch.tensor(labels)}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    losses: list[float] = []
    model.eval()
    for _ in range(40):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses[0], losses[-1]


def main() -> dict[str, tuple[float, float, int]]:
    """Loss before, after, and the number of trained parameters, both ways."""
    by_hand = tiny.bert()
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad = "bias" in name or name.startswith("classifier")
    trained = sum(parameter.numel() for parameter in by_hand.parameters() if parameter.requires_grad)

    grafted = ingraft.attach(tiny.bert(), BitFitConfig(modules_to_save=("classifier",)))
    return {
        "by hand": (*train(by_hand), trained),
        "ingraft": (*train(grafted), ingraft.status(grafted).trainable),
    }


if __name__ == "__main__":
    print(main())
