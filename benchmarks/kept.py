"""Bytes that a forward pass keeps for backward, each storage once, weights left out: three adapted linears on one input, and a whole block.

Exact counts, no clock: one run says all. SmolLM2's first block, 4 rows of 256 tokens, bf16, LoRA of rank 8 on all seven projections.

    python benchmarks/kept.py [--output benchmarks/results]
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import sides

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "rows": 4, "tokens": 256, "seed": 42}
THREE = ["q_proj", "k_proj", "v_proj"]
SEVEN = [*THREE, "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> int:
    asked = sides.options("Bytes kept for backward.", ("frozen", "ingraft", "peft"), steps=0)
    runs: sides.Runs = {side: [measured(side)] for side in asked.sides}
    medians = sides.medians_of(runs)
    lines = [
        "| side | three linears on one input, in sizes of the input | with dropout 0.05 | a block, MB | with dropout 0.05 |",
        "|---|---|---|---|---|",
    ]
    for side, one in medians.items():
        shown = [f"{one[key]:.2f}x" if key in one else "–" for key in ("three", "three dropped")]
        lines.append(f"| {side} | {' | '.join(shown)} | {one['block']:.1f} | {one['block dropped']:.1f} |")
    sides.write("kept", asked, SETTINGS, runs, lines)
    return 0


def measured(side: str) -> dict[str, float]:
    """The four counts of a side; a frozen base has no adapted linears."""
    import torch

    found: dict[str, float] = {}
    width = 576
    for suffix, p in (("", 0.0), (" dropped", 0.05)):
        hidden = torch.randn(SETTINGS["rows"], SETTINGS["tokens"], width, dtype=torch.bfloat16, requires_grad=True)
        if side != "frozen":
            attention = _adapted(side, THREE, p).model.layers[0].self_attn
            size = hidden.numel() * hidden.element_size()
            found[f"three{suffix}"] = kept(attention, lambda a, h=hidden: [getattr(a, n)(h) for n in THREE]) / size
        model = _adapted(side, SEVEN, p)
        positions = torch.arange(SETTINGS["tokens"])[None]
        turn = model.model.rotary_emb(hidden, positions)
        found[f"block{suffix}"] = (
            kept(model.model.layers[0], lambda b, h=hidden, t=turn: b(h, position_embeddings=t)) / 1e6
        )
    return found


def _adapted(side: str, targets: list[str], p: float) -> Any:
    """SmolLM2 in training, adapters at its first block."""
    from ingraft.bases import load_base

    model = cast(Any, load_base("smollm2", "bfloat16").model)
    options: dict[str, Any] = {
        "r": SETTINGS["r"],
        "lora_alpha": SETTINGS["lora_alpha"],
        "lora_dropout": p,
        "target_modules": targets,
    }
    if side == "ingraft":
        from ingraft import adapt
        from ingraft.methods import registry

        adapt.attach(model, registry.make_config("lora", options), seed=SETTINGS["seed"])
    elif side == "peft":
        from peft import LoraConfig, get_peft_model

        model = cast(Any, get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM"))).base_model.model
    else:
        model.requires_grad_(False)
    return model.train()


def kept(module: Any, run: Callable[[Any], Any]) -> int:
    """Bytes kept by what `run` does with a module."""
    import torch

    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    sizes: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = run(module)
    del alive
    return sum(sizes.values())


if __name__ == "__main__":
    sys.exit(main())
