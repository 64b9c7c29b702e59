"""Supervised tuning, Ingraft against Hugging Face PEFT with `transformers.Trainer`: same base, rows, rank, rate and number of steps.

Each side runs in fresh processes, interleaved, so that a busy minute of the machine hits all; the table shows medians, and ratios to our side
in the same setting. PEFT is set up in three ways: as its documentation does, in the dtype that the machine is fast at (`peft`) and, where that is
not float32, in its default float32 (`peft-float32`), and at its best
here (`peft-best`: batches of similar length, freed memory kept by the allocator's settings, which our side then has too: `ingraft-malloc`).
All are scored by the same code on the same rows for evaluation.

    python benchmarks/sft.py [--rows FOLDER] [--steps 50] [--repeats 3] [--sides ...] [--output benchmarks/results]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ours
import reference
import rows
import sides

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "learning_rate": 5e-4, "batch": 8, "max_length": 512, "seed": 42}
MALLOC = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456",
}
"""What keeps freed memory with the process, in glibc's words."""

SIDES: dict[str, dict[str, str]] = {
    "ingraft": {},
    "peft": {},
    "ingraft-malloc": MALLOC,
    "peft-best": MALLOC,
    "peft-float32": {},
}
"""Every side with its environment."""

AGAINST = {"peft": "ingraft", "peft-best": "ingraft-malloc", "peft-float32": "ingraft"}
"""Which side of ours each of theirs is set against."""

SCORED = 100


def main() -> int:
    asked = sides.options("Supervised tuning: Ingraft against PEFT + Trainer.", SIDES, steps=50)
    if asked.dtype == "float32":
        asked.sides = [side for side in asked.sides if side != "peft-float32"]
    runs = sides.measure(asked, run_side, __file__, SETTINGS, SIDES)
    medians = sides.medians_of(runs)
    lines = [
        "| side | learned tokens/s | real tokens/s | roofline | peak above the base, GB | loss before | loss after (mean ± SE over seeds) |",
        "|---|---|---|---|---|---|---|",
    ]
    for side, one in medians.items():
        loss, error = sides.spread(runs, side, "loss")
        lines.append(
            f"| {side} | {one['learned_per_second']:.0f} | {one['tokens_per_second']:.0f} | {_ratio(one)} | "
            f"{one['peak_memory'] / 1e9:.2f} | "
            f"{one['loss_before']:.4f} | {loss:.4f} ± {error:.4f} |"
        )
    lines += ["", "| against | learned tokens/s, ratio (each repeat) | peak memory, ratio |", "|---|---|---|"]
    for theirs, own in AGAINST.items():
        if theirs in medians and own in medians:
            each = [
                mine["learned_per_second"] / other["learned_per_second"]
                for mine, other in zip(runs[own], runs[theirs], strict=True)
            ]
            speed = medians[own]["learned_per_second"] / medians[theirs]["learned_per_second"]
            memory = medians[own]["peak_memory"] / medians[theirs]["peak_memory"]
            lines.append(f"| {theirs} | {speed:.2f}x ({', '.join(f'{ratio:.2f}' for ratio in each)}) | {memory:.2f}x |")
    sides.write("sft", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, folder: Path, steps: int) -> dict[str, float]:
    """One run in this process: tokens a second of training, peak memory above the loaded base, loss on rows for evaluation."""
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import score_loss
    from ingraft.train.machine import peak_memory

    base = load_base("smollm2", "float32" if side == "peft-float32" else SETTINGS["dtype"])
    with tempfile.TemporaryDirectory() as scratch:
        file = rows.first_rows(folder, steps * SETTINGS["batch"], Path(scratch) / "train.jsonl")
        evaluation = str(rows.evaluation_of(folder))
        data = load(str(file), base.tokenizer, eval=evaluation, max_length=SETTINGS["max_length"])
        before = peak_memory()
        if side.startswith("ingraft"):
            del base
            run, done = ours.tune(file, SETTINGS, steps)
            model, tokenizer = run.model, run.tokenizer
        else:
            grouped = side == "peft-best"
            tokenizer = base.tokenizer
            model, done = reference.tune(base.model, tokenizer, data.train, SETTINGS, steps, grouped=grouped)
    peak = peak_memory() - before
    scored = data.eval[:SCORED]
    loss = score_loss(model, scored, pad_id(tokenizer), 8).loss
    return {
        "learned_per_second": done["learned"] / done["seconds"],
        "tokens_per_second": done["tokens"] / done["seconds"],
        "seconds": done["seconds"],
        "tokens": done["tokens"],
        **({"roofline": done["roofline"]} if "roofline" in done else {}),
        "peak_memory": peak,
        "loss_before": _without(model, lambda: score_loss(model, scored, pad_id(tokenizer), 8).loss),
        "loss": loss,
    }


def _ratio(one: Mapping[str, float]) -> str:
    """The seconds of the steps over those of their matrix products alone, which only our side counts."""
    return f"{one['roofline']:.2f}x" if "roofline" in one else "–"


def _without(model: Any, score: Any) -> float:
    """A score of the base alone."""
    from ingraft import adapt

    with model.disable_adapter() if hasattr(model, "disable_adapter") else adapt.disabled(model):
        return score()


if __name__ == "__main__":
    sys.exit(main())
