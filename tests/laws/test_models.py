"""Every law of every method on a tiny model of every family."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws


@parametrize_with_laws(subjects=[subject for subject in SUBJECTS.values() if subject.transformers])
def test_law(check: Check, record_property: Callable[[str, object], None]) -> None:
    record_property("law", (*check.cell, check()))
