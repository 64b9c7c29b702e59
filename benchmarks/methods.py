"""Every method of the catalogue with its default settings on one base and one data set, in one table.

A method is trained by `ingraft.train` in a process of its own (so that its peak memory is its own), then its run folder is loaded into a
fresh base and scored: the loss must be the training run's to the last digit, and its fall below the base's is given with the standard
error of the paired difference over the rows. A run that is there already is scored, not trained again, so a study that was stopped goes on.

    python benchmarks/methods.py --data FOLDER [--model smollm2] [--steps 60] [--rows 100] [--runs runs/methods] [--output docs/study-methods.md]

FOLDER holds train.jsonl and dev.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ingraft.errors import IngraftError
from ingraft.methods.registry import load as load_method
from ingraft.methods.registry import records

SPECIAL: dict[str, dict[str, Any]] = {
    "bitfit": {"method_config": {"add_bias": True}},  # these bases have no biases
    "loftq": {"quantization": "nf4"},  # it starts from what quantising lost
}
"""What a method needs beyond its defaults."""

MEMBERS = ("even", "odd")
"""A method over adapters (`Method.over`) gets these: two of MEMBER, each trained on every other row for half as many steps."""

MEMBER = "pfeiffer"


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table; losses in nats, memory in bytes."""

    method: str
    rate: float
    parameters: int
    share: float
    seconds: float
    memory: int
    before: float
    after: float
    fall: float
    error: float
    reloads: bool

    def __str__(self) -> str:
        held = "yes" if self.fall > 2 * self.error and self.reloads else "**no**"
        return (
            f"| {self.method} | {self.rate:g} | {self.parameters:,} | {self.share:.3f} | {self.seconds:.2f} | {self.memory / 2**30:.2f} | "
            f"{self.before:.4f} | {self.after:.4f} | {self.fall:.3f} ± {self.error:.3f} | {'yes' if self.reloads else '**no**'} | {held} |"
        )


HEAD = """| method | rate | parameters | % of base | s a step | peak GiB | loss before | loss after | fall ± SE | reloads to the same loss | fall > 2 SE |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Every method with its defaults on one data set.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--model", default="smollm2", help="the base (default: smollm2)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 8 rows (default: 60)")
    parser.add_argument("--rows", type=int, default=100, help="evaluation rows that are scored (default: 100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the run folders lie")
    parser.add_argument("--methods", help="names with commas between (default: all)")
    parser.add_argument("--output", type=Path, help="page to write the table to")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if missing := [str(f) for name in ("train", "dev") if not (f := options.data / f"{name}.jsonl").is_file()]:
        print(
            f"{', '.join(missing)}: no such file; --data names a folder with train.jsonl and dev.jsonl.",
            file=sys.stderr,
        )
        return 2
    if options.train:
        train_one(options.train, options)
        return 0
    names = options.methods.split(",") if options.methods else list(records())
    evaluation = first_rows(options)
    lines: list[Line] = []
    failed: dict[str, str] = {}
    for name in names:
        folder = options.runs / name
        if not (folder / "ingraft.json").exists():
            command = [sys.executable, __file__, *sys.argv[1:], "--train", name]
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
            if done.returncode:
                failed[name] = (
                    done.stdout.strip().splitlines()[-1] if done.stdout.strip() else f"exit code {done.returncode}"
                )
                print(f"{name}: failed: {failed[name]}", flush=True)
                continue
        try:
            lines.append(score(name, folder, evaluation, options))
        except IngraftError as error:
            failed[name] = str(error)
            print(f"{name}: failed: {failed[name]}", flush=True)
            continue
        print(lines[-1], flush=True)
    text = page(lines, failed, options)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def first_rows(options: argparse.Namespace) -> Path:
    """A file with the rows that are scored, the same for training runs and for the scoring afterwards."""
    options.runs.mkdir(parents=True, exist_ok=True)
    path: Path = options.runs / "dev.jsonl"
    with (options.data / "dev.jsonl").open(encoding="utf-8") as source:
        path.write_text("".join(islice(source, options.rows)), encoding="utf-8")
    return path


def train_one(name: str, options: argparse.Namespace) -> None:
    """One run with the method's own defaults."""
    from ingraft.train.run import train

    recipe: dict[str, Any] = {
        "model": options.model,
        "dtype": "bfloat16",
        "task": "sft",
        "data": {"train": str(options.data / "train.jsonl"), "eval": str(options.runs / "dev.jsonl")},
        "method": name,
        "max_steps": options.steps,
        "eval_steps": 0,
        "save_steps": 0,
        "output_dir": str(options.runs / name),
        **SPECIAL.get(name, {}),
    }
    if load_method(name).over:
        rows = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        recipe["adapters"] = {member: str(options.runs / f"{name}-{member}") for member in MEMBERS}
        for i, (member, folder) in enumerate(recipe["adapters"].items()):
            half = options.runs / f"{member}.jsonl"
            half.write_text("".join(rows[i::2]), encoding="utf-8")
            own = {"method": MEMBER, "max_steps": options.steps // 2, "output_dir": folder, "adapters": {}}
            train(recipe | own | {"data": {"train": str(half), "eval": 0}}, overwrite_output_dir=True)
    train(recipe)


def score(name: str, folder: Path, evaluation: Path, options: argparse.Namespace) -> Line:
    """The run's figures, and the loss of its adapter in a fresh base."""
    from ingraft import adapt
    from ingraft.adapt.files import load as load_adapter
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import paired_difference, score_loss

    quantization = SPECIAL.get(name, {}).get("quantization", "none")
    base = load_base(options.model, "bfloat16", quantization=quantization)
    data = load(str(evaluation), base.tokenizer)
    pad = pad_id(base.tokenizer)
    before = score_loss(base.model, data.train, pad, 8)
    size = sum(p.numel() for p in base.model.parameters())
    load_adapter(base.model, folder, name="a")
    parameters = sum(p.numel() for p in adapt.parameters(base.model, "a").values())
    after = score_loss(base.model, data.train, pad, 8)
    mean, error = paired_difference(before, after)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Line(
        method=name,
        rate=records()[name].learning_rate,
        parameters=parameters,
        share=100 * parameters / size,
        seconds=statistics.median(line["step_seconds"] for line in log if "step_seconds" in line),
        memory=max(line["peak_memory"] for line in log if "peak_memory" in line),
        before=before.loss,
        after=after.loss,
        fall=-mean,
        error=error,
        reloads=after.loss == found["after"]["loss"],
    )


def page(lines: list[Line], failed: dict[str, str], options: argparse.Namespace) -> str:
    """The whole page."""
    import torch
    import transformers

    today = datetime.date.today().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = [
        f"# Every method on {options.model}",
        "",
        f"*Written by `make study-methods` on {today}: {options.steps} steps of 8 rows of `{options.data.name}`, each method with its defaults and its own",
        f"learning rate, bfloat16; losses on the same {options.rows} rows, before and after; {machine}.*",
        "",
        HEAD,
        *map(str, lines),
        "",
        *(f"- `{name}`: failed: {why}" for name, why in failed.items()),
        *(
            f"- `{line.method}` acts over two adapters (`{MEMBER}`), each trained before it on every other row for half as many steps; the loss before is the bare base's."
            for line in lines
            if load_method(line.method).over
        ),
    ]
    return "\n".join(text).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
