"""The laws over packed weights: nf4, int8 and a GGUF's blocks."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws


@parametrize_with_laws(subjects=[one for one in SUBJECTS.values() if one.packed])
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
