"""`report.html`: one file that shows a run to a person, offline, in light and dark.

No plotting library and no script: the curves are SVG drawn in `curves.py`, the rest is a table, samples and a style sheet. Everything that
comes from data or models is escaped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ingraft.evaluate.files import plain_name
from ingraft.evaluate.scorer import LOWER, scorer_of
from ingraft.recipe import Recipe, to_yaml
from ingraft.train.curves import Series, chart
from ingraft.train.journal import rate_of

STYLE = """
:root { color-scheme: light dark; --ink: #1c2127; --soft: #5c6670; --line: #dde2e7; --paper: #ffffff; --card: #f6f8fa;
  --a: #2f6fb3; --b: #c2571a; --good: #1f7a4d; --bad: #b3372f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #98a3ad; --line: #323a42; --paper: #14181c; --card: #1c2228;
  --a: #6fa8dc; --b: #e69055; --good: #63c394; --bad: #e57f77; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2.5rem 1.25rem 4rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
p.lead { color: var(--soft); margin: 0 0 1.5rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .75rem; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--soft); font-size: .85rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem; }
figcaption { color: var(--soft); font-size: .85rem; padding: 0 .3rem .3rem; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } .grid { stroke: var(--line); stroke-width: 1; }
.a { stroke: var(--a); } .b { stroke: var(--b); } .dot.a { fill: var(--a); } .dot.b { fill: var(--b); }
polyline { fill: none; stroke-width: 1.8; stroke-linejoin: round; } .key { display: inline-block; margin-left: 1rem; }
.key i { display: inline-block; width: 1rem; height: .18rem; vertical-align: middle; margin-right: .35rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .4rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--soft); font-size: .85rem; } td.n, th.n { text-align: right; }
.good { color: var(--good); } .bad { color: var(--bad); }
.sample { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem 1rem; margin-bottom: .9rem; }
.sample pre, details pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: inherit; }
.sample dl { display: grid; grid-template-columns: 6rem 1fr; gap: .45rem .8rem; margin: 0; } .sample dt { color: var(--soft); font-size: .85rem; padding-top: .1rem; }
.sample img { float: right; min-width: 6rem; image-rendering: pixelated; border-radius: .3rem; } .sample dd { margin: 0; } details pre, code { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; }
details { margin-top: .6rem; } summary { cursor: pointer; color: var(--soft); }
details pre { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem 1rem; margin-top: .5rem; overflow-x: auto; }
"""


def write_report(
    *,
    recipe: Recipe,
    metrics: Mapping[str, Mapping[str, float]],
    samples: Sequence[Mapping[str, str]],
    log: Sequence[Mapping[str, Any]],
    data: Sequence[str],
    about: Mapping[str, Any],
    trained: int,
    total: int,
) -> str:
    """The whole file.

    Args:
        metrics: {"before", "after"}, or empty.
        samples: rows with prompt, expected, before and after; `picture` is the address of what is shown beside them.
        log: the lines of log.jsonl.
        data: the data report, line by line.
        about: what the manifest says of the run.
        trained, total: parameters trained, and of the base.
    """
    headline = scorer_of(recipe.task).headline
    title = f"{recipe.method} on {recipe.model}"
    lead = f"{recipe.task}, {recipe.data.named}, {about.get('steps', 0):,} steps, seed {recipe.seed}"
    body = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
        _tiles(headline, metrics, log, about, trained, total),
    ]
    if metrics:
        body += ["<h2>Before and after</h2>", _metrics(metrics["before"], metrics["after"])]
    body += ["<h2>Course of training</h2>", _charts(headline, log)]
    if samples:
        body += ["<h2>Samples</h2>", *(_sample(sample, log) for sample in samples)]
    body += ["<h2>How it was made</h2>", _environment(about), _details("The data", "\n".join(data))]
    body += [
        _details("The recipe (recipe.yaml repeats this run)", to_yaml(recipe)),
        _details("What to type next", _next(recipe)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _tiles(
    headline: str,
    metrics: Mapping[str, Mapping[str, float]],
    log: Sequence[Mapping[str, Any]],
    about: Mapping[str, Any],
    trained: int,
    total: int,
) -> str:
    tiles: list[tuple[str, str]] = []
    if metrics:
        before, after = metrics["before"], metrics["after"]
        first = dict.fromkeys((headline, "rewards/accuracies", "rewards/margins", "loss"))
        shown = [name for name in first if name in after]
        tiles += [(f"{_number(before.get(name))} → {_number(after[name])}", name) for name in shown]
    tiles.append((f"{trained:,}", f"trained parameters, {trained / max(1, total):.2%} of the base"))
    steps = [line for line in log if "step_seconds" in line]
    if steps:
        seconds = sorted(line["step_seconds"] for line in steps)[len(steps) // 2]
        speed, unit = sorted(map(rate_of, steps))[len(steps) // 2]
        tiles.append((f"{seconds:.2f} s", f"a step, {speed:,.0f} {unit} a second"))
    if about.get("peak_memory"):
        tiles.append((f"{about['peak_memory'] / 2**30:.2f} GB", "peak memory"))
    cells = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for value, name in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _metrics(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    rows: list[str] = []
    for name, value in after.items():
        change = ""
        if name in before:
            difference = value - before[name]
            lower = plain_name(name.removeprefix("test_")) in LOWER
            kind = "good" if difference * (-1 if lower else 1) > 0 else "bad" if difference else ""
            change = f'<span class="{kind}">{difference:+.4f}</span>'
        rows.append(
            f'<tr><td>{escape(name)}</td><td class="n">{_number(before.get(name))}</td>'
            f'<td class="n">{_number(value)}</td><td class="n">{change}</td></tr>'
        )
    head = '<tr><th>metric</th><th class="n">before</th><th class="n">after</th><th class="n">change</th></tr>'
    return f"<table>{head}{''.join(rows)}</table>"


COURSES = (
    ("accuracy", "accuracy by step"),
    ("margin", "mean difference of rewards by step"),
    ("rewards/accuracies", "share of pairs the right way round by step"),
    ("rewards/margins", "mean difference of implied rewards by step"),
    ("reward", "reward by step"),
    ("length", "length of answers by step, tokens"),
    ("kl", "log-ratio of policy and reference by step, nats an answer"),
)
"""Metrics that are drawn where a run has them, beside the loss."""


def _charts(headline: str, log: Sequence[Mapping[str, Any]]) -> str:
    def points(key: str) -> list[tuple[float, float]]:
        return [(float(line["step"]), float(line[key])) for line in log if line.get(key) is not None and "step" in line]

    figures: list[str] = []
    losses = [Series("training", points("loss"), "a"), Series("evaluation", points("eval_loss"), "b")]
    figures.append(chart("loss by step", [s for s in losses if s.points]))
    for key, name in {headline: f"{headline} by step", **dict(COURSES)}.items():
        both = [Series("training", points(key), "a"), Series("evaluation", points(f"eval_{key}"), "b")]
        if max(len(one.points) for one in both) > 1:
            figures.append(chart(name, [one for one in both if one.points]))
    for line in log:
        if line.get("range_test"):
            tested = [(math.log10(rate), float(loss)) for rate, loss in line["range_test"]]
            found = f"range test: loss by learning rate, 10 to the power; {line['found_learning_rate']:.2g} was chosen"
            figures.append(chart(found, [Series("", tested, "a")]))
    if len(points("learning_rate")) > 1:
        figures.append(chart("learning rate by step", [Series("", points("learning_rate"), "a")]))
    if len(points("grad_norm")) > 1:
        figures.append(chart("norm of the gradient, before clipping", [Series("", points("grad_norm"), "a")]))
    return f'<div class="charts">{"".join(figures)}</div>'


def _sample(sample: Mapping[str, str], log: Sequence[Mapping[str, Any]]) -> str:
    """A row with its answers: before, at the evaluations where the log has one, after."""
    between = [
        (f"step {line['step']}", shown["answer"])
        for line in log
        for shown in line.get("samples", ())
        if (shown["prompt"], shown["expected"]) == (sample.get("prompt"), sample.get("expected"))
    ]
    ends = [(name, sample.get(name, "")) for name in ("prompt", "expected", "before", "after")]
    items = "".join(
        f"<dt>{escape(name)}</dt><dd><pre>{escape(text)}</pre></dd>" for name, text in [*ends[:3], *between, *ends[3:]]
    )
    picture = f'<img src="{escape(sample["picture"])}" alt="">' if "picture" in sample else ""
    return f'<div class="sample">{picture}<dl>{items}</dl></div>'


def _environment(about: Mapping[str, Any]) -> str:
    facts: dict[str, Any] = {**about.get("machine", {}), **about.get("versions", {})}
    rows = "".join(
        f"<tr><td>{escape(str(name))}</td><td>{escape(str(value))}</td></tr>" for name, value in facts.items()
    )
    return f"<table>{rows}</table>"


def _details(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def _next(recipe: Recipe) -> str:
    folder = recipe.output_dir
    talk = [f"ingraft chat --adapter {folder}"] if scorer_of(recipe.task).writes else []
    return "\n".join(
        [
            *talk,
            f"ingraft eval --adapter {folder} --data FILE",
            f"ingraft merge --adapter {folder} --output-dir {folder}-merged",
        ]
    )


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.0f}"
