"""QLoRA on shapes that would not fit dense: a 1.1B Llama in 3 GB, a 7B Llama inside this machine's memory.

The weights are random nf4 blocks, made layer by layer on a model without memory, so that nothing dense of the model's size ever exists. What is
shown is memory and time, not learning. Each shape runs in a process of its own, whose peak is then that of the run and nothing else.

    python benchmarks/scale.py [--shape 1.1B] [--steps 20] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {
        "config": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
        "steps": 20,
        "tokens": 256,
        "limit": 3.0,
    },
    "7B": {
        "config": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_key_value_heads": 32},
        "steps": 2,
        "tokens": 256,
        "limit": 24 * 1.073741824,
    },
}
"""TinyLlama's and LLaMA's; `limit` in GB is what the peak must stay below."""


def main() -> int:
    parser = argparse.ArgumentParser(description="QLoRA steps on random nf4 weights: peak memory and time.")
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--steps", type=int, help="optimiser steps (default: 20 on 1.1B, 2 on 7B)")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where to write the result")
    parser.add_argument("--run", choices=SHAPES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.steps or SHAPES[options.run]["steps"])))
        return 0
    results: dict[str, dict[str, Any]] = {}
    for name in [options.shape] if options.shape else SHAPES:
        command = [sys.executable, __file__, "--run", name, *(["--steps", str(options.steps)] if options.steps else [])]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        results[name] = json.loads(done.stdout.strip().splitlines()[-1])
    return report(results, options.output)


def run(name: str, steps: int) -> dict[str, Any]:
    """Train so many steps of one row in this process."""
    import torch

    from ingraft import adapt
    from ingraft.evaluate.head import CausalHead
    from ingraft.methods.lora import LoraConfig
    from ingraft.quant.layers import Packed
    from ingraft.train.machine import keep_freed_memory, peak_memory

    keep_freed_memory()
    torch.manual_seed(0)
    began = time.perf_counter()
    model = packed_llama(SHAPES[name]["config"])
    made = time.perf_counter() - began
    packed = sum(module.weight.numel() for module in model.modules() if isinstance(module, Packed))
    adapt.attach(model, LoraConfig(r=8), "a", seed=0)
    model.train()
    # The second name is the first one's before transformers 5.20 or so, and warns since.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    head = CausalHead(model)
    own = list(adapt.parameters(model, "a").values())
    optimiser = torch.optim.AdamW(own, lr=2e-4, fused=True)
    ids = torch.randint(3, 32000, (1, SHAPES[name]["tokens"]), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    losses: list[float] = []
    seconds: list[float] = []
    for _ in range(steps):
        began = time.perf_counter()
        loss = head.loss(batch) / (ids.numel() - 1)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - began)
        losses.append(float(loss.detach()))
        print(f"{name}: step {len(losses)}, loss {losses[-1]:.4f}, {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    return {
        "parameters": sum(layer[0] * layer[1] for layer in shapes_of(model)),
        "packed_bytes": packed,
        "trained": sum(p.numel() for p in own),
        "steps": steps,
        "tokens": ids.numel(),
        "making_seconds": made,
        "step_seconds": sorted(seconds)[len(seconds) // 2],
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "peak_bytes": peak_memory(),
    }


def shapes_of(model: Any) -> list[tuple[int, int]]:
    """The shapes of the packed weights."""
    from ingraft.quant.layers import Packed

    return [module.shape for module in model.modules() if isinstance(module, Packed)]


def packed_llama(sizes: dict[str, Any]) -> Any:
    """A Llama in bfloat16 whose linear layers are random nf4 blocks."""
    import torch
    from torch import nn
    from transformers import LlamaConfig, LlamaForCausalLM

    from ingraft.quant.formats import QUANTISERS
    from ingraft.quant.layers import QuantizedLinear

    config = LlamaConfig(**sizes, num_attention_heads=32, vocab_size=32000, tie_word_embeddings=False)
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(config)
    form = QUANTISERS["nf4"]
    for path, layer in list(model.model.named_modules()):
        if not isinstance(layer, nn.Linear):
            continue
        shape = (layer.out_features, layer.in_features)
        packed = torch.randint(0, 256, form.packed_shape(shape), dtype=torch.uint8)
        tail = packed[-4 * (-(-shape[0] * shape[1] // (64 * 256)) + 1) :].view(
            torch.float32
        )  # the scales' scales, their mean
        tail.fill_(0.3 / layer.in_features**0.5)
        tail[-1] = 2.0 / layer.in_features**0.5
        model.model.set_submodule(path, QuantizedLinear(form, shape[1], shape[0], dtype=torch.bfloat16, packed=packed))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                value = torch.empty(parameter.shape, dtype=torch.bfloat16)
                value = value.fill_(1.0) if value.dim() == 1 else value.normal_(std=0.02)
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model


def report(results: dict[str, dict[str, Any]], folder: Path) -> int:
    """The table, as JSON and Markdown. Returns 1 where a limit was passed."""
    from ingraft.train.machine import environment

    date = datetime.date.today().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"scale-{date}.json").write_text(
        json.dumps({"date": date, "runs": results, **environment()}, indent=1) + "\n"
    )
    lines = [
        "| shape | packed weights | in bytes | steps of tokens | seconds a step | loss, first to last | peak memory | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in results.items():
        lines.append(
            f"| {name} | {one['parameters'] / 1e9:.2f} billion | {one['packed_bytes'] / 1e9:.2f} GB | {one['steps']} of {one['tokens']} | "
            f"{one['step_seconds']:.1f} | {one['first_loss']:.3f} to {one['last_loss']:.3f} | {one['peak_bytes'] / 1e9:.2f} GB | "
            f"{SHAPES[name]['limit']:.1f} GB |"
        )
    (folder / f"scale-{date}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    return int(any(one["peak_bytes"] / 1e9 > SHAPES[name]["limit"] for name, one in results.items()))


if __name__ == "__main__":
    sys.exit(main())
