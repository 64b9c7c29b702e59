"""Every law of every method on tiny models: llama, gpt2, mixtral."""

from __future__ import annotations

from collections.abc import Callable

from ingraft.testing import SUBJECTS, Check, parametrize_with_laws


@parametrize_with_laws(subjects=[SUBJECTS[name] for name in ["llama", "gpt2", "mixtral"]])
def test_law(check: Check, try_law: Callable[[Check], None]) -> None:
    try_law(check)
