"""Every method of the catalogue with its default settings on one base and one data set, in one table.

A method is trained by `ingraft.train` in a process of its own, then its run folder is loaded into a fresh base and scored: the loss must be
the training run's to six digits, and its fall below the base's is given with the standard error of the paired difference over the rows.
Seconds a step and peak memory come from a few steps of the same recipe, without evaluation, in a process of their own. What is done already
is not done again, so a study that was stopped goes on.

    python benchmarks/methods.py --data FOLDER [--model smollm2] [--steps 60] [--rows 100] [--runs runs/methods] [--output docs/study-methods.md]

FOLDER holds train.jsonl and dev.jsonl.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ingraft.errors import IngraftError
from ingraft.methods.registry import load as load_method
from ingraft.methods.registry import records

SPECIAL: dict[str, dict[str, Any]] = {
    "bitfit": {"method_config": {"add_bias": True}},  # these bases have no biases
    "loftq": {"quantization": "nf4"},  # it starts from what quantising lost
    "trainable-tokens": {
        "method_config": {"token_indices": list(range(1000))}
    },  # marks of the chat, bytes, the commonest pieces
}
"""What a method needs beyond its defaults."""

MEMBERS = ("even", "odd")
"""A method over adapters (`Method.over`) gets these: two of `MEMBER`, each trained on every other row for half as many steps."""

MEMBER = {"fusion": "pfeiffer", "routing": "lora"}


TIMED = 8
"""Steps that are timed; the first three are left out of the median, not of the peak."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds a step (median), and the process's peak memory in bytes."""

    seconds: float
    memory: int


@dataclass(frozen=True, kw_only=True)
class Line:
    """One row of the table; losses in nats."""

    method: str
    rate: float
    parameters: int
    share: float
    before: float
    after: float
    fall: float
    error: float
    reloads: bool

    def told(self, cost: Cost | None) -> str:
        """The row; what it costs where that was measured."""
        held = "yes" if self.fall > 2 * self.error and self.reloads else "**no**"
        costs = "– | –" if cost is None else f"{cost.seconds:.2f} | {cost.memory / 2**30:.2f}"
        return (
            f"| {self.method} | {self.rate:g} | {self.parameters:,} | {self.share:.3f} | {costs} | "
            f"{self.before:.4f} | {self.after:.4f} | {self.fall:.3f} ± {self.error:.3f} | {'yes' if self.reloads else '**no**'} | {held} |"
        )


HEAD = """| method | rate | parameters | % of base | s a step | peak GiB | loss before | loss after | fall ± SE | reloads to the same loss | fall > 2 SE |
|---|---|---|---|---|---|---|---|---|---|---|"""


def main() -> int:
    parser = argparse.ArgumentParser(description="Every method with its defaults on one data set.")
    parser.add_argument("--data", type=Path, required=True, help="folder with train.jsonl and dev.jsonl")
    parser.add_argument("--model", default="smollm2", help="the base (default: smollm2)")
    parser.add_argument("--dtype", default="auto", help="of base and products (default: what this machine is fast at)")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps of 8 rows (default: 60)")
    parser.add_argument("--rows", type=int, default=100, help="evaluation rows that are scored (default: 100)")
    parser.add_argument("--runs", type=Path, default=Path("runs/methods"), help="where the run folders lie")
    parser.add_argument("--methods", help="names with commas between (default: all)")
    parser.add_argument("--output", type=Path, help="page to write the table to")
    parser.add_argument("--no-costs", action="store_true", help="leave seconds and memory for a later call")
    parser.add_argument("--train", help=argparse.SUPPRESS)
    parser.add_argument("--cost", help=argparse.SUPPRESS)
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
    if options.cost:
        print(json.dumps(asdict(cost_of(options.cost, options))))
        return 0
    names = options.methods.split(",") if options.methods else list(records())
    evaluation = first_rows(options)
    lines: dict[str, Line] = {}
    costs: dict[str, Cost] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            if not (options.runs / name / "ingraft.json").exists():
                _in_a_process("--train", name)
            kept = options.runs / f"{name}.line.json"
            if not kept.exists():
                kept.write_text(json.dumps(asdict(score(name, options.runs / name, evaluation, options))))
            lines[name] = Line(**json.loads(kept.read_text()))
            print(lines[name].told(None), flush=True)
        except IngraftError as error:
            failed[name] = str(error)
            print(f"{name}: failed: {failed[name]}", flush=True)
    for name in () if options.no_costs else lines:
        kept = options.runs / f"{name}.cost.json"
        if not kept.exists():
            kept.write_text(_in_a_process("--cost", name))
        costs[name] = Cost(**json.loads(kept.read_text()))
    text = page(lines, costs, failed, options)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def _in_a_process(flag: str, name: str) -> str:
    """This script with one more option; the last line it prints.

    Raises:
        IngraftError: it failed; with that line.
    """
    command = [sys.executable, __file__, *sys.argv[1:], flag, name]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if done.returncode:
        raise IngraftError(last)
    return last


def first_rows(options: argparse.Namespace) -> Path:
    """A file with the rows that are scored, the same for training runs and for the scoring afterwards."""
    options.runs.mkdir(parents=True, exist_ok=True)
    path: Path = options.runs / "dev.jsonl"
    with (options.data / "dev.jsonl").open(encoding="utf-8") as source:
        path.write_text("".join(islice(source, options.rows)), encoding="utf-8")
    return path


def recipe_of(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """The method's run: its own defaults, but for what it needs."""
    recipe: dict[str, Any] = {
        "model": options.model,
        "dtype": options.dtype,
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
        recipe["adapters"] = {member: str(options.runs / f"{name}-{member}") for member in MEMBERS}
    return recipe


def train_one(name: str, options: argparse.Namespace) -> None:
    """One run, and before it those of its members."""
    from ingraft.train.run import train

    recipe = recipe_of(name, options)
    rows = (options.data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for i, (member, folder) in enumerate(recipe.get("adapters", {}).items()):
        half = options.runs / f"{member}.jsonl"
        half.write_text("".join(rows[i :: len(MEMBERS)]), encoding="utf-8")
        own = {"method": MEMBER[name], "max_steps": options.steps // 2, "output_dir": folder, "adapters": {}}
        train(recipe | own | {"data": {"train": str(half), "eval": 0}}, overwrite_output_dir=True)
    train(recipe, overwrite_output_dir=True)


def cost_of(name: str, options: argparse.Namespace) -> Cost:
    """A few steps of the run and nothing else."""
    from ingraft.train.run import train

    recipe = recipe_of(name, options)
    with tempfile.TemporaryDirectory() as folder:
        data = {"train": recipe["data"]["train"], "eval": 0}
        train(
            recipe | {"data": data, "max_steps": TIMED, "logging_steps": 1, "output_dir": f"{folder}/run"}, quiet=True
        )
        log = [json.loads(line) for line in (Path(folder) / "run/log.jsonl").read_text(encoding="utf-8").splitlines()]
    return Cost(
        seconds=statistics.median(line["step_seconds"] for line in log[3:] if "step_seconds" in line),
        memory=max(line["peak_memory"] for line in log if "peak_memory" in line),
    )


def score(name: str, folder: Path, evaluation: Path, options: argparse.Namespace) -> Line:
    """The run's figures, and the loss of its adapter in a fresh base."""
    from ingraft import adapt
    from ingraft.adapt.files import load as load_adapter
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import paired_difference, score_loss

    quantization = SPECIAL.get(name, {}).get("quantization", "none")
    base = load_base(options.model, options.dtype, quantization=quantization)
    data = load(str(evaluation), base.tokenizer)
    pad = pad_id(base.tokenizer)
    before = score_loss(base.model, data.train, pad, 8)
    size = adapt.base_size(base.model)
    load_adapter(base.model, folder, name="a")
    parameters = sum(p.numel() for p in adapt.parameters(base.model, "a").values())
    after = score_loss(base.model, data.train, pad, 8)
    mean, error = paired_difference(before, after)
    found = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return Line(
        method=name,
        rate=records()[name].learning_rate,
        parameters=parameters,
        share=100 * parameters / size,
        before=before.loss,
        after=after.loss,
        fall=-mean,
        error=error,
        reloads=math.isclose(
            after.loss, found["after"]["loss"], rel_tol=1e-6
        ),  # adalora saves the directions that are left, and shorter sums round otherwise
    )


def page(
    lines: Mapping[str, Line], costs: Mapping[str, Cost], failed: Mapping[str, str], options: argparse.Namespace
) -> str:
    """The whole page."""
    import torch
    import transformers

    from ingraft.bases.dtypes import as_dtype

    today = datetime.date.today().isoformat()
    machine = f"{os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}, transformers {transformers.__version__}"
    text = [
        f"# Every method on {options.model}",
        "",
        f"*Written by `make study-methods` on {today}: {options.steps} steps of 8 rows of `{options.data.name}`, each method with its defaults and its own",
        f"learning rate, {str(as_dtype(options.dtype))[6:]}; losses on the same {options.rows} rows, before and after; {machine}.*",
        "",
        HEAD,
        *(line.told(costs.get(name)) for name, line in lines.items()),
        "",
        *(f"- `{name}`: failed: {why}" for name, why in failed.items()),
        *(
            [f"- Not measured yet: {', '.join(left)}."]
            if (left := [f"`{n}`" for n in records() if n not in {*lines, *failed}])
            else []
        ),
        *(
            f"- `{name}` acts over two adapters (`{MEMBER[name]}`), each trained before it on every other row for half as many steps; the loss before is the bare base's."
            for name in lines
            if load_method(name).over
        ),
    ]
    return "\n".join(text).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
