"""Every law of every method on every kind of layer; convolutions have a file of their own, so that two workers share the work."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws
from ingraft.testing.subjects import CONVOLUTIONS


@parametrize_with_laws(
    subjects=[one for one in SUBJECTS.values() if not (one.transformers or one.packed or one.name in CONVOLUTIONS)]
)
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
