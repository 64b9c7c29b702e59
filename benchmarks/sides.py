"""What the side-by-side benchmarks share: sides run in fresh processes, in turn, several times; medians are written with hardware and versions."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

Runs = dict[str, list[dict[str, float]]]
Medians = dict[str, dict[str, float]]


def options(description: str, sides: Iterable[str], *, steps: int = 30) -> argparse.Namespace:
    """The command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--steps", type=int, default=steps, help=f"optimiser steps a run (default: {steps})")
    parser.add_argument("--repeats", type=int, default=3, help="runs a side (default: 3)")
    parser.add_argument(
        "--rows", type=Path, default=Path(".demo"), help="folder with train.jsonl[.gz] and dev.jsonl or heldout.jsonl"
    )
    parser.add_argument("--sides", nargs="+", choices=list(sides), default=list(sides), help="which (default: all)")
    parser.add_argument(
        "--dtype", default="auto", help="of the dense base and of all products (default: what this machine is fast at)"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where to write the result")
    parser.add_argument("--side", choices=list(sides), help=argparse.SUPPRESS)
    parser.add_argument("--repeat", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.dtype == "auto":
        from ingraft.bases.dtypes import as_dtype

        asked.dtype = str(as_dtype("auto")).removeprefix("torch.")
    return asked


def measure(
    asked: argparse.Namespace,
    run_side: Callable[[str, Path, int], dict[str, float]],
    file: str,
    settings: MutableMapping[str, Any],
    environments: Mapping[str, Mapping[str, str]] | None = None,
) -> Runs:
    """The figures of every run by side. In the process of one side: print its figures and end.

    Args:
        run_side: one run of a side in this process, from the rows' folder and the number of steps.
        file: the benchmark's own.
        settings: what `run_side` reads, with the `dtype` that is asked for; every repeat has a `seed` of its own, the same for all sides.
        environments: what the process of a side finds in its environment beside what is there.
    """
    settings["dtype"] = asked.dtype
    if asked.side:
        settings["seed"] += asked.repeat
        print(json.dumps(run_side(asked.side, asked.rows, asked.steps)))
        sys.exit(0)
    runs: Runs = {side: [] for side in asked.sides}
    for repeat in range(asked.repeats):
        for side in asked.sides:
            words = [sys.executable, file, "--side", side, "--steps", str(asked.steps), "--rows", str(asked.rows)]
            words += ["--repeat", str(repeat), "--dtype", asked.dtype]
            environment = {**os.environ, **(environments or {}).get(side, {})}
            done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            runs[side].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"repeat {repeat + 1}: {side:8} {runs[side][-1]}", flush=True)
    return runs


def medians_of(runs: Runs) -> Medians:
    """By side and figure."""
    return {
        side: {key: statistics.median(one[key] for one in found) for key in found[0]} for side, found in runs.items()
    }


def spread(runs: Runs, side: str, key: str) -> tuple[float, float]:
    """Mean over the repeats and its standard error; zero for one repeat."""
    found = [one[key] for one in runs[side]]
    error = statistics.stdev(found) / len(found) ** 0.5 if len(found) > 1 else 0.0
    return statistics.fmean(found), error


def write(name: str, asked: argparse.Namespace, settings: Mapping[str, Any], runs: Runs, table: Sequence[str]) -> None:
    """NAME-DATE.json with everything and NAME-DATE.md with the table, which is printed too."""
    from ingraft.train.machine import environment

    date = datetime.date.today().isoformat()
    asked.output.mkdir(parents=True, exist_ok=True)
    result = {
        "date": date,
        "steps": asked.steps,
        "settings": dict(settings),
        "runs": runs,
        "medians": medians_of(runs),
        **environment(),
    }
    (asked.output / f"{name}-{date}.json").write_text(json.dumps(result, indent=1) + "\n")
    (asked.output / f"{name}-{date}.md").write_text("\n".join(table) + "\n")
    print("\n".join(table))
