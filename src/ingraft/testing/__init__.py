"""The laws of the method contract, for the methods of this package and for yours.

    from ingraft.testing import check_method, parametrize_with_laws

    check_method(MyConfig(rank=4))                       # raises AssertionError: every law it breaks, and on what

    @parametrize_with_laws([MyConfig(rank=4)])           # or as single tests under pytest
    def test_law(check):
        check()

The method has to be known to the registry (entry point `ingraft.methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ingraft.methods.contract import MethodConfig
from ingraft.testing.subjects import SUBJECTS, Subject
from ingraft.testing.suite import Check, all_laws, checks
from ingraft.testing.table import Row

__all__ = ["SUBJECTS", "Check", "Row", "Subject", "all_laws", "check_method", "checks", "parametrize_with_laws"]


def _rows(methods: Sequence[MethodConfig | Row]) -> list[Row]:
    return [one if isinstance(one, Row) else Row(config=one) for one in methods]


def check_method(
    method: MethodConfig | Row, *, subjects: Sequence[Subject] = (), numbers: Sequence[int] = (), study: bool = False
) -> int:
    """Try every law on a method.

    Args:
        method: its options, or a `Row` with other options on some subjects and the name of its dropout option.
        subjects: modules to try it on; the package's own if empty.
        numbers: of laws; all if empty.
        study: also the expensive laws on every subject.

    Returns:
        How many checks held.

    Raises:
        AssertionError: naming every law that is broken, on what, and how.
    """
    broken: list[str] = []
    held = 0
    for check in checks(_rows([method]), subjects, numbers):
        if check.study and not study:
            continue
        try:
            check()
            held += 1
        except Exception as error:  # every law is to be tried, whatever the one before did
            broken.append(
                f"law {check.law.number}, {check.law.name}, on {check.case.subject.name}: {check.law.statement}\n    {type(error).__name__}: {error}"
            )
    if broken:
        raise AssertionError(f"{len(broken)} of {held + len(broken)} checks are broken:\n" + "\n".join(broken))
    return held


def parametrize_with_laws(
    methods: Sequence[MethodConfig | Row] = (), *, subjects: Sequence[Subject] = (), numbers: Sequence[int] = ()
) -> Callable[[Any], Any]:
    """A decorator that turns a test with the argument `check` into one test for each law and subject.

    Args:
        methods: options or rows; the package's own table if empty.
        subjects, numbers: as in `check_method`.
    """
    import pytest

    return pytest.mark.parametrize(
        "check",
        [
            pytest.param(check, id=str(check), marks=[pytest.mark.study] if check.study else [])
            for check in checks(_rows(methods), subjects, numbers)
        ],
    )
