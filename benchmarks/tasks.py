"""Every kind of task by the commands a user types: `ingraft train`, `ingraft eval`, one table.

For each data set: what the most frequent class would get, what a base gets that is only asked (calibrated, without and with four examples), LoRA with all its
defaults, and full tuning at three rates (its own, a third, three times; the one with the lowest loss on rows held out of training). All are scored on the same
rows, which no training saw, each with its interval; LoRA against full tuning is a paired comparison of those rows. What was done already is not
done again, so a study that was stopped goes on.

    python benchmarks/tasks.py --data FOLDER [--sets sst2,mrpc] [--runs runs/tasks] [--output docs/study-tasks.md]

FOLDER holds a folder for each set, with train.jsonl[.gz] and dev.jsonl (tiny_shakespeare: .txt; mnist: .npz).
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ingraft.methods.registry import records

SHOTS = 4
RATES = (1 / 3, 1.0, 3.0)
"""Full tuning's rates, times its own."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A data set and how it is learned.

    Attributes:
        task, model, metric: of the two trainings.
        asked: the base that is asked in words; None where that has no meaning.
        rows, scored: at most so many training rows, and rows that are scored.
        ending: of its files.
        options: what else both trainings get.
    """

    task: str
    model: str
    metric: str
    asked: str | None = None
    rows: int = 6000
    scored: int = 1000
    ending: str = "jsonl"
    options: tuple[str, ...] = field(default=())


CASES: dict[str, Case] = {
    "sst2": Case(task="classify", model="minilm", metric="accuracy", asked="smollm2"),
    "banking77": Case(task="classify", model="minilm", metric="accuracy", rows=9000),
    "mrpc": Case(task="classify", model="minilm", metric="accuracy", asked="smollm2"),
    "ocnli": Case(task="classify", model="gemma3-270m", metric="accuracy", asked="gemma3-270m"),
    "waimai_10k": Case(task="classify", model="gemma3-270m", metric="accuracy", asked="gemma3-270m"),
    "wnut17_ner": Case(task="tag", model="minilm", metric="f1"),
    "weibo_ner": Case(task="tag", model="gemma3-270m", metric="f1"),
    "xquad_en": Case(task="qa", model="minilm", metric="f1"),
    "cmrc2018_zh": Case(task="qa", model="gemma3-270m", metric="f1"),
    "e2e_nlg": Case(task="sft", model="smollm2", metric="loss", asked="smollm2", rows=2000, scored=200),
    "gsm8k": Case(task="sft", model="smollm2", metric="loss", asked="smollm2", rows=1000, scored=200),
    "alpaca_zh": Case(task="sft", model="gemma3-270m", metric="loss", asked="gemma3-270m", rows=2000, scored=200),
    "tiny_shakespeare": Case(task="lm", model="smollm2", metric="perplexity", ending="txt"),
}
"""`mnist` needs a base of pictures: `--image-model FOLDER`, see examples/vision."""


class Failed(Exception):
    """A command ended badly; with its last line."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Every kind of task by the commands a user types.")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", help="names with commas between (default: all that are there)")
    parser.add_argument("--runs", type=Path, default=Path("runs/tasks"), help="where the run folders lie")
    parser.add_argument("--image-model", help="a base of pictures, for mnist")
    parser.add_argument("--output", type=Path, help="page to write the table to")
    options = parser.parse_args()
    cases = dict(CASES)
    if options.image_model:
        cases["mnist"] = Case(task="image-classify", model=options.image_model, metric="accuracy", ending="npz")
    names = options.sets.split(",") if options.sets else [name for name in cases if (options.data / name).is_dir()]
    if unknown := [name for name in names if name not in cases or not (options.data / name).is_dir()]:
        print(
            f"{', '.join(unknown)}: no such set; known are {', '.join(cases)}, below {options.data}.", file=sys.stderr
        )
        return 2
    lines: list[str] = []
    failed: list[str] = []
    for name in names:
        try:
            lines.append(line_of(name, cases[name], options.data / name, options.runs / name))
            print(lines[-1], flush=True)
        except Failed as error:
            failed.append(f"- {name}: {error}")
            print(failed[-1], flush=True)
    text = page(lines, failed)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed else 0


def line_of(name: str, case: Case, source: Path, runs: Path) -> str:
    """A set's row of the table.

    Raises:
        Failed: a command did.
    """
    runs.mkdir(parents=True, exist_ok=True)
    train, test = rows_of(source, "train", case, runs, case.rows), rows_of(source, "dev", case, runs, case.scored)
    own = records()["full"].learning_rate
    shared = ["--model", case.model, "--task", case.task, "--data.train", str(train), *case.options]
    lora = trained(runs / "lora", shared)
    full = [
        trained(runs / f"full-{times:.2g}", [*shared, "--method", "full", "--learning-rate", f"{own * times:g}"])
        for times in RATES
    ]
    best = min(full, key=lambda folder: held_out(folder))
    scores = {
        "lora": evaluated(runs, "lora", ["--adapter", str(lora), "--data", str(test), "--against", str(best)]),
        "full": evaluated(runs, "full", ["--adapter", str(best), "--data", str(test)]),
    }
    if case.asked is not None:
        for shots in (0, SHOTS):
            words = [
                "--model",
                case.asked,
                "--task",
                case.task,
                "--data",
                str(test),
                "--shots",
                str(shots),
                "--shots-from",
                str(train),
            ]
            calibrated = ["--calibrate"] if case.task == "classify" else []
            scores[f"{shots} shots"] = evaluated(runs, f"shots-{shots}", [*words, *calibrated])
    about = json.loads((lora / "ingraft.json").read_text(encoding="utf-8"))["facts"]
    told = [told_of(scores.get(which), case.metric) for which in ("0 shots", f"{SHOTS} shots", "lora", "full")]
    against = scores["lora"].get("difference", {})
    seconds = json.loads((runs / "lora.seconds.json").read_text(encoding="utf-8"))
    cells = [
        name,
        case.task,
        case.model,
        case.metric,
        majority(test, case),
        *told,
        told_of(against, case.metric),
        f"{about['parameters']:,}",
        f"{seconds:.0f}",
        f"{about['run']['peak_memory'] / 2**30:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def rows_of(source: Path, part: str, case: Case, runs: Path, count: int) -> Path:
    """The file of a part with at most so many rows."""
    plain = source / f"{part}.{case.ending}"
    if case.ending != "jsonl":
        return plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
    target = runs / f"{part}.jsonl"
    if not target.exists():
        file = plain if plain.exists() else plain.with_name(f"{plain.name}.gz")
        with gzip.open(file, "rt", encoding="utf-8") if file.suffix == ".gz" else file.open(encoding="utf-8") as lines:
            target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


def trained(folder: Path, words: list[str]) -> Path:
    """The run's folder; how long the command took lies beside it."""
    if not (folder / "ingraft.json").exists():
        began = datetime.datetime.now()
        command(
            "train", *words, "--output-dir", str(folder), "--resume-from-checkpoint", "last", "--save-total-limit", "1"
        )
        seconds = (datetime.datetime.now() - began).total_seconds()
        folder.with_name(f"{folder.name}.seconds.json").write_text(json.dumps(seconds), encoding="utf-8")
    return folder


def held_out(folder: Path) -> float:
    """The loss on the rows that the run held out."""
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["after"]["loss"]


def evaluated(runs: Path, name: str, words: list[str]) -> dict[str, Any]:
    """What `ingraft eval` says of a part."""
    kept = runs / f"{name}.eval.json"
    if not kept.exists():
        kept.write_text(command("eval", *words), encoding="utf-8")
    found = json.loads(kept.read_text(encoding="utf-8"))
    return next(value for key, value in found.items() if key in ("train", "eval", "test"))


def command(*words: str) -> str:
    """What a command of the package prints.

    Raises:
        Failed: it ended badly.
    """
    done = subprocess.run(
        [sys.executable, "-m", "ingraft.cli.main", *words, "--json"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise Failed(f"`ingraft {' '.join(words)}`: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    return done.stdout


def told_of(scores: dict[str, Any] | None, metric: str) -> str:
    """A metric with its interval."""
    if scores is None or metric not in scores:
        return "–"
    value, ends = scores[metric], scores.get(f"{metric}_interval")
    if isinstance(value, dict):
        value, ends = value["value"], value["interval"]
    return f"{value:.3f}" if ends is None else f"{value:.3f} [{ends[0]:.3f}, {ends[1]:.3f}]"


def majority(test: Path, case: Case) -> str:
    """What the most frequent class would get."""
    if case.task != "classify":
        return "–"
    labels = Counter(json.loads(line)["label"] for line in test.read_text(encoding="utf-8").splitlines())
    return f"{max(labels.values()) / labels.total():.3f}"


def page(lines: list[str], failed: list[str]) -> str:
    """The table and how it was made."""
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers"))
    names = [
        "set",
        "task",
        "base",
        "metric",
        "majority",
        "zero-shot",
        f"{SHOTS} shots",
        "LoRA",
        "full",
        "LoRA - full",
        "parameters",
        "seconds",
        "GiB",
    ]
    head = f"| {' | '.join(names)} |\n|{'---|' * len(names)}"
    made = f"*Written by `make study-tasks` on {datetime.date.today()}: {cores} cores, {platform.machine()}, {versions}. All defaults; full tuning at the best of three rates; intervals of 95 %.*"
    return "\n".join(["# Every kind of task", "", made, "", head, *lines, "", *failed, ""])


if __name__ == "__main__":
    sys.exit(main())
