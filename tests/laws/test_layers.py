"""Every law of every method on every kind of layer."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws


@parametrize_with_laws(subjects=[subject for subject in SUBJECTS.values() if not subject.transformers])
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
