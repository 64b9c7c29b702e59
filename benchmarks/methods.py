"""Every method with its default settings on one data set: the paired fall of the evaluation loss, row by row, with its standard error.

    python benchmarks/methods.py --data train.jsonl --eval heldout.jsonl [--steps 60] [--rows 100] [--runs runs/methods]

A run folder that is there already is scored, not trained again.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ingraft import adapt
from ingraft.adapt.files import load as load_adapter
from ingraft.bases import load_base
from ingraft.data import load, pad_id
from ingraft.evaluate.loss import paired_difference, score_loss
from ingraft.methods.registry import records

BASE = "smollm2"


def main() -> int:
    parser = argparse.ArgumentParser(description="Every method with its defaults on one data set.")
    parser.add_argument("--data", required=True, help="training rows")
    parser.add_argument("--eval", required=True, help="evaluation rows")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 8 rows (default: 60)")
    parser.add_argument("--rows", type=int, default=100, help="evaluation rows that are scored (default: 100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the run folders lie")
    options = parser.parse_args()
    for name in records():
        if not (options.runs / name / "ingraft.json").exists():
            train_one(name, options)
    base = load_base(BASE, "bfloat16")
    data = load(options.data, base.tokenizer, eval=options.eval)
    rows = data.eval[: options.rows]
    before = score_loss(base.model, rows, pad_id(base.tokenizer), 8)
    print(f"{len(rows)} rows, loss of the base {before.loss:.4f}")
    print("| method | rate | parameters | loss | fall | standard error | ratio |\n|---|---|---|---|---|---|---|")
    for name, record in records().items():
        load_adapter(base.model, options.runs / name, name="a")
        count = sum(p.numel() for p in adapt.parameters(base.model, "a").values())
        after = score_loss(base.model, rows, pad_id(base.tokenizer), 8)
        adapt.detach(base.model)
        mean, error = paired_difference(before, after)
        ratio = abs(mean) / error
        print(
            f"| {name} | {record.learning_rate:g} | {count:,} | {after.loss:.4f} | {abs(mean):.4f} | {error:.4f} | {ratio:.1f} |",
            flush=True,
        )
    return 0


def train_one(name: str, options: argparse.Namespace) -> None:
    """One run with the method's own defaults."""
    from ingraft.train.run import train

    train(
        {
            "model": BASE,
            "dtype": "bfloat16",
            "data": {"train": options.data, "eval": options.eval},
            "method": name,
            "method_config": {"add_bias": True} if name == "bitfit" else {},
            "max_steps": options.steps,
            "eval_steps": 0,
            "save_steps": 0,
            "output_dir": str(options.runs / name),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
