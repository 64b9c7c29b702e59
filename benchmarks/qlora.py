"""What a packed base costs and gives: SmolLM2 dense, in nf4, in int8 and in its GGUF's own blocks, next to PEFT over bitsandbytes' nf4.

Every side runs in processes of its own, interleaved. The rows are the demo's reviews (`make demo` fetches them); all sides are trained on the same
ones and scored by the same code on the same held-out rows, each repeat with another seed. PEFT's side starts from the adapter that ours
draws and takes the rows in the order in which ours does, so that the losses differ by what the sides compute and by nothing else. Bytes are
those of the weights, those of linear layers set against the same numbers in bfloat16; a step's and a token's time are set against the dense base's in the same dtype.

    python benchmarks/qlora.py [--steps 30] [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ours
import reference
import sides

SIDES = ("none", "nf4", "int8", "keep", "peft-nf4")
SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "learning_rate": 5e-4, "batch": 8, "max_length": 160, "seed": 42}
TOKENS = 20
"""Decoded for the time of one."""


def main() -> int:
    from ingraft.bases.dtypes import as_dtype

    asked = sides.options("Packed bases: bytes, time of a step and of a token, loss.", SIDES)
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    dense = medians.get("none", next(iter(medians.values())))
    half = 2 / as_dtype(asked.dtype).itemsize
    lines = [
        "| base | linear layers, MB | all weights, MB | step, s | token, ms | loss (mean ± SE over seeds) |",
        "|---|---|---|---|---|---|",
    ]
    for side, one in medians.items():
        ratio = {key: one[key] / (dense[key] * (half if key == "linear_bytes" else 1)) for key in one}
        loss, error = sides.spread(runs, side, "loss")
        lines.append(
            f"| {side} | {one['linear_bytes'] / 1e6:.1f} ({ratio['linear_bytes']:.2f}x) | {one['all_bytes'] / 1e6:.1f} ({ratio['all_bytes']:.2f}x) | "
            f"{one['step_seconds']:.2f} ({ratio['step_seconds']:.2f}x) | {1e3 * one['decode_seconds']:.1f} ({ratio['decode_seconds']:.2f}x) | {loss:.4f} ± {error:.4f} |"
        )
    sides.write("qlora", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, rows: Path, steps: int) -> dict[str, float]:
    """One run in this process."""
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.data.batching import batches
    from ingraft.evaluate.loss import score_loss

    files: dict[str, Any] = {"eval": str(rows / "heldout.jsonl"), "max_length": SETTINGS["max_length"]}
    if side == "peft-nf4":
        model, tokenizer = _bitsandbytes()
        found = {"decode_seconds": decode(model), **bytes_of(model)}
        _in_order_made(model)
        data = load(str(rows / "train.jsonl"), tokenizer, **files)
        order = batches(data.train, SETTINGS["batch"], SETTINGS["seed"], 0)
        rows_in_order = [data.train[i] for batch in order for i in batch]
        with tempfile.TemporaryDirectory() as folder:
            start = _our_start(Path(folder) / "start")
            model, done = reference.tune(model, tokenizer, rows_in_order, SETTINGS, steps, start=start)
    else:
        base = load_base("smollm2", SETTINGS["dtype"], quantization=side)
        found = {"decode_seconds": decode(base.model), **bytes_of(base.model)}
        del base
        run, done = ours.tune(rows / "train.jsonl", SETTINGS, steps, quantization=side)
        model, tokenizer = run.model, run.tokenizer
        data = load(str(rows / "train.jsonl"), tokenizer, **files)
    loss = score_loss(model, data.eval[:200], pad_id(tokenizer), 16).loss
    return {**found, "step_seconds": done["seconds"] / steps, "loss": loss}


def _our_start(folder: Path) -> Path:
    """Write the adapter that our side's run starts from."""
    from ingraft import adapt
    from ingraft.bases import load_base
    from ingraft.methods import registry

    base = load_base("smollm2", SETTINGS["dtype"])
    settings = {"r": SETTINGS["r"], "lora_alpha": SETTINGS["lora_alpha"]}
    adapt.attach(base.model, registry.make_config("lora", settings), name="default", seed=SETTINGS["seed"])
    return adapt.save(base.model, folder)


def _bitsandbytes() -> tuple[Any, Any]:
    """SmolLM2 as a user of PEFT loads it for QLoRA."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from ingraft.bases import load_base
    from ingraft.bases.dtypes import as_dtype

    dense = load_base("smollm2", SETTINGS["dtype"])
    dtype = as_dtype(SETTINGS["dtype"])
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(dense.source, quantization_config=config, dtype=dtype)
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
