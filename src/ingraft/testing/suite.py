"""Laws as data: what a law says, where it applies, why not elsewhere, and what it costs.

A law is a function of a `Case` that returns nothing and raises AssertionError. `@law` records it with three answers that are data too:

* `hole`: why it says nothing of a case (a reason a reader accepts), or None;
* `refusal`: why the method must refuse what the law is about (a prefix has no weight form to merge), or None; the refusal is then the
  thing asserted;
* `of_refusal`: it is about the cases that cannot be attached, and about no others;
* `heavy`: tried everywhere only if everything is asked for (`-m study`); else on a Llama with every method and on every subject with LoRA,
  or where the law itself says (`everyday`). On some subjects a method of each family is tried every day, and all on request
  (`Subject.everyday`).

`checks` multiplies methods, subjects and laws; nothing in it is left out without a reason, and `matrix` prints both.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from ingraft.testing.cases import Case, why_not
from ingraft.testing.subjects import SUBJECTS, Subject
from ingraft.testing.table import METHODS, Row, row

Reason = Callable[[Case], str | None]

LATER = {14: "packs", 15: "two processes"}
"""Laws of the architecture that hold of parts still to be built."""

OF_LAYERS = (*range(8), 21)
"""Laws that hold of a method's maths on a kind of layer; the others are about who acts when, which does not depend on the kind."""

OF_MODELS = (*OF_LAYERS, 13, 18, 19, 22)
"""Laws that hold of a method's place in a family of models: its rows, its text, its outputs, the numbers of the reference."""

OF_PACKED = 17
"""The law that is about packed weights and nothing else."""

HELD, REFUSED = "held", "refused"


@dataclass(frozen=True, kw_only=True)
class Law:
    """One law, or one side of it; several may share a number."""

    number: int
    name: str
    check: Callable[[Case], None]
    hole: Reason
    refusal: Reason
    refuses: Callable[[Case], None] | None
    heavy: bool
    everyday: Callable[[Case], bool]
    of_refusal: bool

    @property
    def statement(self) -> str:
        """The law in a sentence."""
        return (self.check.__doc__ or "").strip().splitlines()[0]


FILES = ("laws", "laws_rows", "laws_files", "laws_gradients", "laws_models", "laws_packed", "laws_reference")
"""Where the laws are written."""

LAWS: list[Law] = []
"""Filled by these files, as they are imported."""


def nowhere(case: Case) -> str | None:
    """The answer of a law without exceptions."""
    del case
    return None


def _everyday(case: Case) -> bool:
    """Where a heavy law is tried every day, unless it says otherwise."""
    return case.subject.name == "llama" or case.method.name == "lora"


def law(
    number: int,
    *,
    hole: Reason = nowhere,
    refusal: Reason = nowhere,
    refuses: Callable[[Case], None] | None = None,
    heavy: bool = False,
    everyday: Callable[[Case], bool] = _everyday,
    of_refusal: bool = False,
) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
    """Record a function as a law. See the module docstring."""

    def record(check: Callable[[Case], None]) -> Callable[[Case], None]:
        assert check.__doc__, f"{check.__name__} has to state its law"
        LAWS.append(
            Law(
                number=number,
                name=check.__name__,
                check=check,
                hole=hole,
                refusal=refusal,
                refuses=refuses,
                heavy=heavy,
                everyday=everyday,
                of_refusal=of_refusal,
            )
        )
        return check

    return record


@dataclass(frozen=True, kw_only=True)
class Check:
    """One law on one case. Calling it tries it; `hole` says why it cannot be tried, `study` why it is not tried every day."""

    case: Case
    law: Law
    hole: str | None
    study: str | None

    def __str__(self) -> str:
        return f"{self.case}-{self.law.number:02d}-{self.law.name}"

    @property
    def cell(self) -> tuple[str, int, str]:
        """Method, law, subject: where the result stands in the matrix."""
        return self.case.method.name, self.law.number, self.case.subject.name

    def __call__(self) -> str:
        """Try it: HELD or REFUSED, where a refusal was due and came.

        Raises:
            AssertionError: the law is broken.
        """
        assert self.hole is None, self.hole
        if self.law.refuses is not None and self.law.refusal(self.case) is not None:
            self.law.refuses(self.case)
            return REFUSED
        self.law.check(self.case)
        return HELD


def all_laws() -> Sequence[Law]:
    """Every law, in order of number."""
    for name in FILES:
        importlib.import_module(f"ingraft.testing.{name}")
    return sorted(LAWS, key=lambda one: one.number)


def checks(
    rows: Sequence[Row] = (), subjects: Sequence[Subject] = (), numbers: Sequence[int] = (), *, with_holes: bool = False
) -> Iterator[Check]:
    """Every law on every case, by method, then subject, then law.

    Args:
        rows: methods with their options; the package's own table if empty.
        subjects: modules to try them on; the package's own if empty.
        numbers: of laws; all if empty.
        with_holes: also those that cannot be tried, each with its reason.
    """
    for one in rows or [row(name) for name in METHODS]:
        for subject in subjects or SUBJECTS.values():
            case = Case(row=one, subject=subject)
            unfit = why_not(case)
            for each in all_laws():
                if numbers and each.number not in numbers:
                    continue
                hole = _hole(each, case, unfit)
                if hole is None or with_holes:
                    yield Check(case=case, law=each, hole=hole, study=_study(each, case))


def _study(each: Law, case: Case) -> str | None:
    """Why this check is not tried every day, or None."""
    everyday = case.subject.everyday
    if everyday is not None and case.method.name in METHODS and case.method.name not in everyday:
        return f"`pytest -m study` tries it: every day {case.subject.name} has one method of each family"
    if case.subject.packed:
        if each.number == OF_PACKED or (case.method.name == "lora" and (not each.heavy or each.everyday(case))):
            return None
        return f"`pytest -m study` tries it: over packed weights every day has law {OF_PACKED}, and LoRA all laws"
    own = not case.exemplary and case.row == row(case.method.name)
    model = case.subject.transformers and case.subject.name != "llama"
    everywhere = case.method.sites == ("all-linear",)
    if own and model and everywhere:
        return "`pytest -m study` tries it: a method on linear layers knows no models; its kinds of layer and a Llama are tried every day"
    if own and case.subject.transformers and each.number not in OF_MODELS and (model or everywhere) and not each.heavy:
        where = "linear layers" if everywhere else "a Llama"
        return f"`pytest -m study` tries it: it is a law of calls, not of models, and is tried on {where} and with a method of each family every day"
    if own and not case.subject.transformers and case.subject.name != case.layer and each.number not in OF_LAYERS:
        return f"`pytest -m study` tries it: it is a law of calls, not of layers, and is tried on {case.layer} layers and a Llama every day"
    if each.heavy and not each.everyday(case):
        return "heavy: `pytest -m study` tries it"
    return None


def _hole(each: Law, case: Case, unfit: str | None) -> str | None:
    if each.of_refusal:
        return None if unfit is not None else "it can be attached"
    if unfit is not None:
        return f"refused at attach (law 0): {unfit}"
    return each.hole(case)
