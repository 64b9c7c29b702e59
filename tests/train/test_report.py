"""The report's parts: text from data is escaped, ticks are round and cover the points."""

from __future__ import annotations

import pytest

from ingraft.recipe import as_recipe
from ingraft.train.curves import Series, chart, label, ticks
from ingraft.train.report import write_report

EVIL = "<script>alert('x')</script>"


def test_text_is_escaped() -> None:
    recipe = as_recipe({"model": EVIL, "data": {"train": EVIL}, "output_dir": "out"})
    text = write_report(
        recipe=recipe,
        metrics={"before": {EVIL: 1.0}, "after": {EVIL: 2.0}},
        samples=[{"prompt": EVIL, "expected": EVIL, "before": EVIL, "after": EVIL}],
        log=[],
        data=[EVIL],
        about={"machine": {EVIL: EVIL}},
        trained=1,
        total=10,
    )
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 8


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.3, 2.31), (-5.0, 130.0), (1e-6, 2e-4), (0.0, 48213.0)])
def test_ticks_are_few_and_cover(low: float, high: float) -> None:
    found = ticks(low, high)
    assert found[0] <= low
    assert found[-1] >= high - 1e-12
    assert 3 <= len(found) <= 8
    assert len(set(map(label, found))) == len(found)
    assert all(len(label(tick)) <= 8 for tick in found)


def test_charts_of_little() -> None:
    assert "nothing was logged" in chart("empty", [])
    assert "<circle" in chart("one", [Series("", [(1.0, 2.0)], "a")])
    assert "nan" not in chart("hole", [Series("", [(1.0, 2.0), (2.0, float("nan")), (3.0, 1.0)], "a")]).lower()
