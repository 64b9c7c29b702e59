"""The matrix method x law x subject: how many checks held, and the reason for every cell or part of a cell where none was tried.

A test that tries a check says so with `record_property("law", (*check.cell, outcome))`; the properties travel with the reports, also from
pytest-xdist's workers. `pytest_terminal_summary`, imported by a `conftest.py` above the tests, prints the matrix at the end of the session.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HELD, REFUSED, BROKEN = "held", "refused", "broken"

Cell = tuple[str, int]


def lines(results: Iterable[tuple[str, int, str, str]]) -> list[str]:
    """The matrix as text.

    Args:
        results: (method, law, subject, outcome) of every check that was tried.
    """
    from ingraft.testing.suite import LATER, all_laws, checks

    count: dict[Cell, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    places: dict[tuple[str, str], dict[str, int]] = defaultdict(lambda: defaultdict(int))
    tried: set[tuple[str, int, str]] = set()
    for method, number, subject, outcome in results:
        count[method, number][outcome] += 1
        places[method, subject][outcome] += 1
        tried.add((method, number, subject))
    methods = list(dict.fromkeys(method for method, _ in count))
    numbers = sorted({one.number for one in all_laws()} | set(LATER))
    reasons: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for check in checks(with_holes=True):
        method, number, subject = check.cell
        if method not in methods or check.law.of_refusal:
            continue
        if check.hole is not None:
            reasons[check.hole][f"{method} on {subject}"].add(number)
        elif (method, number, subject) not in tried:
            reasons[check.study or "not part of this session"][f"{method} on {subject}"].add(number)
    by_law = {(method, str(number)): found for (method, number), found in count.items()}
    later = {(method, str(number)): "later" for method in methods for number in LATER}
    subjects = list(dict.fromkeys(subject for _, subject in places))
    return [
        "Checks that held, by method and law (n+mr: m of them are refusals that were due and came; later: the law's part is not built yet).",
        "",
        *_table(methods, [str(number) for number in numbers], by_law, later),
        "",
        "The same checks, by method and what they were tried on: layer kinds and models in float32 and bfloat16, then both over packed weights.",
        "",
        *_table(methods, subjects, places, {}),
        "",
        *(f"later: law {number}, {what}" for number, what in LATER.items()),
        *_explained(reasons),
    ]


def _table(
    rows: Sequence[str],
    columns: Sequence[str],
    found: Mapping[tuple[str, str], Mapping[str, int]],
    said: Mapping[tuple[str, str], str],
) -> list[str]:
    """A table of counts under its header."""
    first = max((len(row) for row in rows), default=0)
    cells = {
        (row, column): said.get((row, column)) or _cell(found.get((row, column), {}))
        for row in rows
        for column in columns
    }
    widths = [2 + max([len(column), *(len(cells[row, column]) for row in rows)]) for column in columns]
    lines = [" " * first + "".join(f"{column:>{width}}" for column, width in zip(columns, widths, strict=True))]
    for row in rows:
        filled = (f"{cells[row, column]:>{width}}" for column, width in zip(columns, widths, strict=True))
        lines.append(f"{row:<{first}}" + "".join(filled))
    return lines


def _cell(found: Mapping[str, int]) -> str:
    if found.get(BROKEN):
        return f"{found[BROKEN]} FAIL"
    if not found:
        return "-"
    refused = f"+{found[REFUSED]}r" if found.get(REFUSED) else ""
    return f"{found.get(HELD, 0)}{refused}"


def _explained(reasons: Mapping[str, Mapping[str, set[int]]]) -> list[str]:
    """One paragraph for each reason: which laws, of which methods, on which subjects."""
    found: list[str] = []
    for reason, where in reasons.items():
        alike: dict[tuple[int, ...], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for place, numbers in where.items():
            method, _, subject = place.partition(" on ")
            alike[tuple(sorted(numbers))][method].append(subject)
        found.append(f"not tried: {reason}")
        for numbers, methods in alike.items():
            grouped: dict[str, list[str]] = defaultdict(list)
            for method, subjects in methods.items():
                grouped[", ".join(subjects)].append(method)
            found += [
                f"    law {', '.join(map(str, numbers))}: {', '.join(names)} on {subjects}"
                for subjects, names in grouped.items()
            ]
    return found


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the matrix, if laws were tried in this session."""
    results: list[tuple[str, int, str, str]] = []
    for outcome, reports in terminalreporter.stats.items():
        for report in reports:
            for key, value in getattr(report, "user_properties", ()):
                if key == "law" and (getattr(report, "when", "") == "call" or outcome == "error"):
                    method, number, subject, said = value
                    results.append((method, int(number), subject, said if outcome == "passed" else BROKEN))
    if results:
        terminalreporter.section("laws")
        for line in lines(results):
            terminalreporter.write_line(line)
