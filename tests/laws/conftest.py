"""Tries a law and leaves a note of it for the matrix (`ingraft.testing.matrix`), which `tests/conftest.py` has printed at the end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ingraft.testing import Check


@pytest.fixture
def try_law(record_property: Callable[[str, object], None]) -> Callable[[Check], None]:
    """Try a check; its place in the matrix and the outcome go with the test's report."""

    def attempt(check: Check) -> None:
        outcome = "broken"
        try:
            outcome = check()
        finally:
            record_property("law", [*check.cell, outcome])

    return attempt
