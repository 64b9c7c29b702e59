"""How cost grows: one quantity is doubled again and again, everything else stays, and the exponent is the slope of a line through the logarithms.

* `tokens`: a training step of 1 row of 64 to 1,024 tokens.
* `rank`: a training step of 256 tokens, LoRA of rank 1 to 256.
* `rows`: one decoded token for 1 to 64 rows, each with an adapter of its own.
* `adapters acting`: one decoded token for 64 rows that share 1 to 64 adapters.
* `adapters in memory`: one decoded token for 8 rows of one adapter, with 0 to 63 others attached beside it. Flat is the aim.

A Llama of random weights, small enough for a minute, in float32; LoRA of rank 8 on every linear layer unless said. Seconds of processor time on one
thread, the least of several turns, so that other work on the machine counts as little as possible. An exponent of 1 is linear; a constant share (the
base's own time, calls from Python) pulls it down. Linear or better is what `performance.md` asks for; above 1.1 the line says so.

    python benchmarks/growth.py [--turns 5] [--tiny] [--output benchmarks/results]
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SHAPE = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
TINY = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
MOST = 1.1
"""Exponent above which growth is called more than linear; the rest is what a fit over a few points may be off by."""

Points = list[tuple[int, float]]


def main() -> int:
    parser = argparse.ArgumentParser(description="How cost grows with tokens, rank, rows and adapters.")
    parser.add_argument("--turns", type=int, default=5, help="turns at each size; the least counts (default: 5)")
    parser.add_argument(
        "--tiny", action="store_true", help="a model of next to nothing, three sizes each: a trial of this script"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), help="where to write the result")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    found: dict[str, Points] = {}
    for name, (sizes, at) in SERIES.items():
        sizes = sizes[:3] if asked.tiny else sizes
        found[name] = [(size, _least(at(size, TINY if asked.tiny else SHAPE), asked.turns)) for size in sizes]
        print(f"{name}: " + ", ".join(f"{size}: {1e3 * s:.1f} ms" for size, s in found[name]), flush=True)
    write(found, asked.output, "growth-tiny" if asked.tiny else "growth")
    return 0


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The slope of the least-squares line through the logarithms of sizes and costs."""
    xs, ys = ([math.log(value) for value in column] for column in zip(*points, strict=True))
    x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
    over = sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True))
    return over / sum((x - x_mean) ** 2 for x in xs)


def write(found: dict[str, Points], folder: Path, name: str) -> None:
    """NAME-DATE.json, .md and .svg; the table is printed too."""
    from ingraft.train.machine import environment

    date = datetime.date.today().isoformat()
    lines = ["| what grows | from | to | ms at first | ms at last | exponent | |", "|---|---|---|---|---|---|---|"]
    slopes = {series: exponent(points) for series, points in found.items()}
    for series, points in found.items():
        (first, cheap), (last, dear) = points[0], points[-1]
        verdict = "more than linear" if slopes[series] > MOST else "linear or better"
        lines.append(
            f"| {series} | {first} | {last} | {1e3 * cheap:.2f} | {1e3 * dear:.2f} | {slopes[series]:.2f} | {verdict} |"
        )
    folder.mkdir(parents=True, exist_ok=True)
    result = {"date": date, "seconds of processor time": found, "exponents": slopes, **environment()}
    (folder / f"{name}-{date}.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / f"{name}-{date}.md").write_text("\n".join(lines) + "\n")
    (folder / f"{name}-{date}.svg").write_text(plot(found, slopes))
    print("\n".join(lines))


def plot(found: dict[str, Points], slopes: dict[str, float]) -> str:
    """Both axes logarithmic, one line a series, cost relative to its first point; the dashed line is linear growth."""
    colours = ("#1b6ca8", "#c8553d", "#3a7d44", "#7b4ea3", "#8a6d1d")
    wide, high, edge = 640, 420, 50
    far = max(math.log2(max(points[-1][0] / points[0][0], 2)) for points in found.values())

    def place(x: float, y: float) -> str:
        return f"{edge + (wide - 2 * edge) * x / far:.1f},{high - edge - (high - 2 * edge) * y / far:.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide} {high}" font-family="sans-serif" font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<polyline points="{place(0, 0)} {place(far, far)}" stroke="#999" stroke-dasharray="5 4" fill="none"/>',
        f'<text x="{edge}" y="{high - 15}">times the first size, to {2**far:.0f}; upwards: times the first cost, the same scale</text>',
    ]
    for index, (series, points) in enumerate(found.items()):
        colour = colours[index % len(colours)]
        first, cheap = points[0]
        spots = " ".join(place(math.log2(size / first), max(math.log2(s / cheap), 0.0)) for size, s in points)
        parts.append(f'<polyline points="{spots}" stroke="{colour}" stroke-width="2" fill="none"/>')
        parts.append(
            f'<text x="{edge + 10}" y="{edge + 16 * index}" fill="{colour}">{series}: {slopes[series]:.2f}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def _least(run: Callable[[], object], turns: int) -> float:
    """Seconds of processor time of the quickest turn, after one that does not count."""
    run()
    seconds: list[float] = []
    for _ in range(turns):
        began = time.process_time()
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


# ---------------------------------------------------------------------------------------------------------------- what is run


def _model(shape: dict[str, int], adapters: int, r: int = 8) -> Any:
    """A Llama with adapters a0, a1, ..., none of them a no-op."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from ingraft import adapt
    from ingraft.methods import registry

    torch.manual_seed(0)
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 4096}
    model = LlamaForCausalLM(LlamaConfig(**shape, **heads))
    config = registry.make_config("lora", {"r": r, "init_lora_weights": False})
    for index in range(adapters):
        adapt.attach(model, config, name=f"a{index}", seed=index)
    adapt.activate(model, "a0")
    return model.eval()


def _training(tokens: int, shape: dict[str, int], r: int = 8) -> Callable[[], object]:
    import torch

    model = _model(shape, 1, r)
    ids = torch.randint(1, shape["vocab_size"], (1, tokens))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return step


def _decoding(rows: Sequence[str] | int, adapters: int, shape: dict[str, int]) -> Callable[[], object]:
    """One more token behind 16, always the same one."""
    import torch
    from transformers import DynamicCache

    from ingraft import adapt

    model = _model(shape, adapters)
    count = rows if isinstance(rows, int) else len(rows)
    ids, cache = torch.ones(count, 16, dtype=torch.int64), DynamicCache()

    @torch.no_grad()
    def several() -> None:
        for _ in range(4):  # a step takes a few milliseconds
            model(input_ids=ids[:, :1], past_key_values=cache)
            cache.crop(-1)

    entered: Any = None if isinstance(rows, int) else adapt.rows(model, rows)
    if entered is not None:
        entered.__enter__()  # for as long as the process measures it
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return several


SERIES: dict[str, tuple[tuple[int, ...], Callable[[int, dict[str, int]], Callable[[], object]]]] = {
    "tokens": ((64, 128, 256, 512, 1024), lambda size, shape: _training(size, shape)),
    "rank": ((1, 4, 16, 64, 256), lambda size, shape: _training(256, shape, size)),
    "rows": ((1, 4, 16, 64), lambda size, shape: _decoding([f"a{i}" for i in range(size)], size, shape)),
    "adapters acting": (
        (1, 4, 16, 64),
        lambda size, shape: _decoding([f"a{i % size}" for i in range(64)], size, shape),
    ),
    "adapters in memory": ((1, 4, 16, 64), lambda size, shape: _decoding(8, size, shape)),
}
"""By name: the sizes, and what makes the work of one size."""


if __name__ == "__main__":
    sys.exit(main())
