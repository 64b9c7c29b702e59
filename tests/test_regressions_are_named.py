"""Every defect of the existing libraries that this one must not have is a test with its number (`docs/regressions.md` tells what each was)."""

from __future__ import annotations

import re
from pathlib import Path

ROWS = {*range(1, 31)}


def test_every_regression_has_a_test_of_its_number() -> None:
    files = Path(__file__).parent.rglob("test_*.py")
    named = [
        re.findall(r"^def test_regression_(\d+)_", file.read_text(encoding="utf-8"), re.MULTILINE) for file in files
    ]
    found = {int(number) for numbers in named for number in numbers}
    assert found >= ROWS, f"no test for {sorted(ROWS - found)}"
    told = re.findall(
        r"^(\d+)\. ", (Path(__file__).parents[1] / "docs/regressions.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(map(int, told)) >= ROWS
