"""Every law of every method on tiny models: t5."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws


@parametrize_with_laws(subjects=[SUBJECTS[name] for name in ["t5"]])
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
