"""A line chart as SVG, in a hundred lines: enough for a loss over steps, and nothing to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 26


@dataclass(frozen=True)
class Series:
    """A line of points (x, y), not empty; `kind` is "a" or "b", a colour of the style sheet."""

    name: str
    points: list[tuple[float, float]]
    kind: str


def chart(title: str, series: Sequence[Series]) -> str:
    """A figure with caption, axes and lines. A series of few points is drawn with dots as well."""
    keys = "".join(
        f'<span class="key"><i style="background: var(--{s.kind})"></i>{escape(s.name)}</span>'
        for s in series
        if s.name
    )
    caption = f"<figcaption>{escape(title)}{keys}</figcaption>"
    xs = [x for s in series for x, _ in s.points]
    ys = [y for s in series for _, y in s.points if math.isfinite(y)]
    if not ys:
        return f"<figure>{caption}<p>nothing was logged</p></figure>"
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1 = min(min(xs), x_ticks[0]), max(max(xs), x_ticks[-1])
    y0, y1 = min(min(ys), y_ticks[0]), max(max(ys), y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x0) / (x1 - x0) if x1 > x0 else 0.5
        up = (y - y0) / (y1 - y0) if y1 > y0 else 0.5
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts: list[str] = []
    for tick in y_ticks:
        _, y = at(x0, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label(tick)}</text>')
    for tick in x_ticks:
        x, _ = at(tick, y0)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{label(tick)}</text>')
    for line in series:
        places = [at(x, y) for x, y in line.points if math.isfinite(y)]
        drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="{line.kind}" points="{drawn}"/>')
        if len(places) <= 25:
            parts += [f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in places]
    return f'<figure>{caption}<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'


def ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers, about `wanted` of them, from at or below `low` to at or above `high`."""
    if not high > low:
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first, last = math.floor(low / size), math.ceil(high / size)
    return [n * size for n in range(first, last + 1)]


def label(value: float) -> str:
    """A tick in few characters."""
    if value == 0:
        return "0"
    if abs(value) >= 10_000 or abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:.6g}"
