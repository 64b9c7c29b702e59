"""Every law of every method on convolutions."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws
from ingraft.testing.subjects import CONVOLUTIONS


@parametrize_with_laws(subjects=[SUBJECTS[name] for name in CONVOLUTIONS])
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
