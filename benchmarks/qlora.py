"""What a packed base costs and gives: SmolLM2 dense, in nf4, in int8 and in its GGUF's own blocks, next to PEFT over bitsandbytes' nf4.

Every side runs in processes of its own, interleaved. The rows are the demo's reviews (`make demo` fetches them); all sides are trained on the same
ones and scored by the same code on the same held-out rows, each repeat with another seed. PEFT's side takes them in the order in which ours
does, so that the losses differ by what the sides compute and by what they draw at the start. Bytes are those of the weights; a step's and a
token's time are set against the dense base's.

    python benchmarks/qlora.py [--steps 30] [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sft
import sides

SIDES = ("none", "nf4", "int8", "keep", "peft-nf4")
TOKENS = 20
"""Decoded for the time of one."""


def main() -> int:
    asked = sides.options("Packed bases: bytes, time of a step and of a token, loss.", SIDES)
    runs = sides.measure(asked, run_side, __file__, sft.SETTINGS)
    medians = sides.medians_of(runs)
    dense = medians.get("none", next(iter(medians.values())))
    lines = [
        "| base | linear layers, MB | all weights, MB | step, s | token, ms | loss (mean ± SE over seeds) |",
        "|---|---|---|---|---|---|",
    ]
    for side, one in medians.items():
        ratio = {key: one[key] / dense[key] for key in one}
        loss, error = sides.spread(runs, side, "loss")
        lines.append(
            f"| {side} | {one['linear_bytes'] / 1e6:.1f} ({ratio['linear_bytes']:.2f}x) | {one['all_bytes'] / 1e6:.1f} ({ratio['all_bytes']:.2f}x) | "
            f"{one['step_seconds']:.2f} ({ratio['step_seconds']:.2f}x) | {1e3 * one['decode_seconds']:.1f} ({ratio['decode_seconds']:.2f}x) | {loss:.4f} ± {error:.4f} |"
        )
    sides.write("qlora", asked, sft.SETTINGS, runs, lines)
    return 0


def run_side(side: str, rows: Path, steps: int) -> dict[str, float]:
    """One run in this process."""
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.data.batching import batches
    from ingraft.evaluate.loss import score_loss

    files: dict[str, Any] = {"eval": str(rows / "heldout.jsonl"), "max_length": sft.SETTINGS["max_length"]}
    if side == "peft-nf4":
        model, tokenizer = _bitsandbytes()
        found = {"decode_seconds": decode(model), **bytes_of(model)}
        _in_order_made(model)
        data = load(str(rows / "train.jsonl"), tokenizer, **files)
        order = batches(data.train, sft.SETTINGS["batch"], sft.SETTINGS["seed"], 0)
        rows_in_order = [data.train[i] for batch in order for i in batch]
        model, seconds, _ = sft._peft(model, tokenizer, rows_in_order, steps, in_order=True)
    else:
        base = load_base("smollm2", "bfloat16", quantization=side)
        found = {"decode_seconds": decode(base.model), **bytes_of(base.model)}
        del base
        model, tokenizer, seconds = _ingraft(side, rows, steps)
        data = load(str(rows / "train.jsonl"), tokenizer, **files)
    loss = score_loss(model, data.eval[:200], pad_id(tokenizer), 16).loss
    return {**found, "step_seconds": seconds / steps, "loss": loss}


def _ingraft(quantization: str, rows: Path, steps: int) -> tuple[Any, Any, float]:
    from ingraft.train.run import train

    with tempfile.TemporaryDirectory() as folder:
        settings = sft.SETTINGS
        run = train(
            {
                "model": "smollm2",
                "quantization": quantization,
                "dtype": "bfloat16",
                "data": {"train": str(rows / "train.jsonl"), "eval": 0, "max_length": settings["max_length"]},
                "method": "lora",
                "method_config": {"r": settings["r"], "lora_alpha": settings["lora_alpha"]},
                "learning_rate": settings["learning_rate"],
                "lr_scheduler_type": "linear",
                "warmup_ratio": 0.0,
                "max_steps": steps,
                "per_device_train_batch_size": settings["batch"],
                "logging_steps": 1,
                "eval_steps": 0,
                "save_steps": 0,
                "seed": settings["seed"],
                "output_dir": f"{folder}/run",
            },
            quiet=True,
        )
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    return run.model, run.tokenizer, sum(line.get("step_seconds", 0.0) for line in lines)


def _bitsandbytes() -> tuple[Any, Any]:
    """SmolLM2 as a user of PEFT loads it for QLoRA."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ingraft.bases import load_base

    dense = load_base("smollm2", "bfloat16")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(dense.source, quantization_config=config, dtype=torch.bfloat16)
    return model, dense.tokenizer


def _in_order_made(model: Any) -> None:
    """Undo what bitsandbytes does to its weights on this processor in evaluation: their product has no gradient then."""
    from ingraft.adapt.weights import kind_of

    for module in model.modules():
        if (kind := kind_of(module)) is not None:
            kind.settle(module)


def decode(model: Any) -> float:
    """Seconds for one token of one row, the median."""
    import torch
    from transformers import DynamicCache

    seconds: list[float] = []
    with torch.no_grad():
        cache = DynamicCache()
        ids = torch.arange(5, 37)[None]
        for _ in range(TOKENS):
            began = time.perf_counter()
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def bytes_of(model: Any) -> dict[str, float]:
    """What the weights take: the blocks' linear layers, and all, tied ones once. Scales that a library keeps beside a weight count."""
    import torch
    from torch import nn

    def size(module: nn.Module) -> int:
        own = [*module.parameters(), *module.buffers()]
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        beside = [t for t in (state.as_dict(packed=True).values() if state is not None else ()) if torch.is_tensor(t)]
        return sum(t.numel() * t.element_size() for t in (*own, *beside))

    layers = [m for n, m in model.named_modules() if n.endswith("_proj")]
    linear = sum(size(layer) for layer in layers)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    rest = sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in inside)
    return {"linear_bytes": linear, "all_bytes": linear + rest}


if __name__ == "__main__":
    sys.exit(main())
