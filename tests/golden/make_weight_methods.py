"""Write `weight_methods.json`: LoRA by loralib, and LoHa, LoKr, OFT and BOFT by LyCORIS, each on one layer.

Runs in an environment of its own (`pip install torch loralib lycoris-lora`); the numbers are kept here. Every tensor is a function of its name
and position, `values(name, shape)`, so that the test can rebuild them without a file of weights. Of each case: the outputs, the gradient of
every trained tensor, the loss of ten steps of Adam and the outputs after them.

LyCORIS is asked for its forward: its merge of LoHa is too small by the scale once more (kept as `merged`).

    python make_weight_methods.py weight_methods.json
"""

from __future__ import annotations

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

IN, OUT, ROWS, STEPS, RATE = 12, 16, 5, 10, 0.01

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora-linear": ("loralib", "linear", {"r": 4, "lora_alpha": 6}),
    "lora-embedding": ("loralib", "embedding", {"r": 3, "lora_alpha": 6}),
    "loha-linear": ("lycoris.LohaModule", "linear", {"lora_dim": 4, "alpha": 1}),
    "loha-conv2d": ("lycoris.LohaModule", "conv2d", {"lora_dim": 3, "alpha": 6}),
    "loha-cores-conv2d": ("lycoris.LohaModule", "conv2d", {"lora_dim": 3, "alpha": 3, "use_tucker": True}),
    "lokr-linear": ("lycoris.LokrModule", "linear", {"lora_dim": 1, "alpha": 3}),
    "lokr-factor-linear": ("lycoris.LokrModule", "linear", {"lora_dim": 2, "alpha": 1, "factor": 2}),
    "lokr-both-linear": ("lycoris.LokrModule", "linear", {"lora_dim": 1, "alpha": 2, "decompose_both": True}),
    "lokr-conv2d": ("lycoris.LokrModule", "conv2d", {"lora_dim": 1, "alpha": 2}),
    "oft-4-linear": ("lycoris.DiagOFTModule", "linear", {"lora_dim": 4}),
    "boft-1-linear": ("lycoris.ButterflyOFTModule", "linear", {"lora_dim": 16}),
    "boft-4-linear": ("lycoris.ButterflyOFTModule", "linear", {"lora_dim": 4}),
    "boft-2-linear": ("lycoris.ButterflyOFTModule", "linear", {"lora_dim": 2}),
}
"""Name -> whose, the layer, their options."""


def values(name: str, shape: tuple[int, ...], size: float = 0.3) -> Tensor:
    """The numbers of a tensor of this name, near a normal of this size."""
    start = zlib.crc32(name.encode()) % 1000
    count = math.prod(shape)
    return torch.tensor(
        [size * 1.4 * math.sin(12.9898 * (start + i) + math.cos(0.37 * i)) for i in range(count)]
    ).reshape(shape)


def layer_of(kind: str) -> nn.Module:
    """The layer, its weights given by their names. A turned weight is seen from its other side in the test, where a bias has no place."""
    layer: nn.Module
    if kind == "linear":
        layer = nn.Linear(IN, OUT, bias=False)
    elif kind == "embedding":
        layer = nn.Embedding(IN, OUT)
    else:
        layer = nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.copy_(values(name, tuple(parameter.shape)))
    return layer


def input_of(kind: str) -> Tensor:
    """What goes in: of a linear layer every unit vector, so that what comes out is its weight."""
    if kind == "linear":
        return torch.eye(IN)
    return torch.arange(IN) if kind == "embedding" else values("x", (ROWS, 4, 5, 5), 1.0)


def loss_of(y: Tensor) -> Tensor:
    """A loss without symmetries."""
    return ((y - values("target", tuple(y.shape))) ** 2 * (2 + values("weights", tuple(y.shape), 1.0))).mean()


def theirs(whose: str, kind: str, options: dict[str, Any]) -> tuple[Any, Any]:
    """(what computes, what holds the trained tensors)."""
    layer = layer_of(kind)
    if whose == "loralib":
        import loralib

        lora = (
            loralib.Linear(IN, OUT, bias=False, **options)
            if kind == "linear"
            else loralib.Embedding(IN, OUT, **options)
        )
        lora.weight.data.copy_(layer.weight)
        lora.weight.requires_grad_(False)
        return lora, lora
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    known = {cls.__name__: cls for cls in (LohaModule, LokrModule, DiagOFTModule, ButterflyOFTModule)}
    layer.requires_grad_(False)
    part = known[whose.partition(".")[2]]("part", layer, **options)
    part.apply_to()
    return layer, part


def rounded(value: Tensor) -> Any:
    return json.loads(json.dumps(value.detach().tolist()), parse_float=lambda text: float(f"{float(text):.7g}"))


def main() -> None:
    found: dict[str, Any] = {}
    for name, (whose, kind, options) in CASES.items():
        layer, part = theirs(whose, kind, options)
        trained = {key: p for key, p in part.named_parameters() if p.requires_grad and not key.startswith("org_module")}
        with torch.no_grad():
            for key, parameter in trained.items():
                parameter.copy_(values(key, tuple(parameter.shape)))
        x = input_of(kind)
        y = layer(x)
        loss_of(y).backward()
        case: dict[str, Any] = {
            "output": rounded(y),
            "gradients": {key: rounded(p.grad) for key, p in trained.items()},
        }
        if name.startswith("loha") and kind == "linear":
            case["merged"] = rounded(part.get_merged_weight()[0])
        optimizer = torch.optim.Adam(trained.values(), lr=RATE)
        losses: list[float] = []
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(layer(x))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        case["losses"], case["after"] = losses, rounded(layer(x))
        found[name] = case
    Path(sys.argv[1]).write_text(json.dumps({"cases": found}, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    main()
