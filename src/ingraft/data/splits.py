"""Setting rows aside for evaluation, the same ones every time.

A row's turn comes by a hash of the seed and its text, not by its position: the same file in another order, or with a
few rows more, keeps nearly the same split. Rows that give the model the same text travel together, questions about one
context too, so nothing that is evaluated was seen in training. Classes keep their shares. Lines of a text file are one running text: there the end is
set aside, because scattered lines would leave holes that the neighbours give away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from ingraft.data.formats import read_records
from ingraft.data.readers import read_rows
from ingraft.data.records import Document, Record, kept_together, label_of
from ingraft.data.rows import Row
from ingraft.errors import IngraftError

Eval = float | int | str | Path | None


def split(rows: Sequence[Row], eval: Eval, seed: int, *, form: str = "auto") -> tuple[list[Row], list[Row]]:
    """The rows to train on and those to evaluate on, both in their original order.

    Args:
        rows: all rows.
        eval: a share (0 < x < 1), a number of rows (an int of 1 or more), the path of another file, or None (or 0)
            for no evaluation rows.
        seed: which rows; the same seed gives the same split on every machine.
        form: a format's name or `auto`.

    Raises:
        IngraftError: rows that cannot be used; a share or number that leaves nothing to train on, or makes no sense.
    """
    wanted = evaluation_size(eval, len(rows))
    if isinstance(wanted, str):
        return list(rows), read_rows(wanted)
    if not wanted:
        return list(rows), []
    chosen = choose(read_records(rows, form)[1], wanted, seed)
    return [row for i, row in enumerate(rows) if i not in chosen], [row for i, row in enumerate(rows) if i in chosen]


def evaluation_size(eval: Eval, rows: int) -> int | str:
    """How many of `rows` rows `eval` asks for, or the path it names.

    Raises:
        IngraftError: see `split`.
    """
    if isinstance(eval, str):
        try:
            eval = int(eval) if eval.strip().lstrip("+-").isdecimal() else float(eval)
        except ValueError:
            return str(eval)
    if isinstance(eval, Path):
        return str(eval)
    if eval is None or eval == 0:
        return 0
    if isinstance(eval, bool) or not 0 < eval < float("inf") or (eval > 1 and eval != int(eval)):
        raise IngraftError(f"data.eval must be a share between 0 and 1, a number of rows or a file, not {eval}.")
    wanted = max(1, round(rows * eval)) if eval < 1 else int(eval)
    if wanted >= rows:
        raise IngraftError(
            f"data.eval {eval} sets {wanted} of {rows} rows aside and leaves none to train on. Ask for fewer."
        )
    return wanted


def choose(records: Sequence[Record], wanted: int, seed: int) -> set[int]:
    """The positions of about `wanted` records to set aside: at most so many, fewer only where groups of equal texts
    do not fit.

    Raises:
        IngraftError: all rows give the same text, so that no split is possible.
    """
    if all(isinstance(record, Document) and record.line_of_file for record in records):
        return set(range(len(records) - wanted, len(records)))
    groups: dict[str, list[int]] = defaultdict(list)
    for position, record in enumerate(records):
        groups[kept_together(record)].append(position)
    strata: dict[str, list[list[int]]] = defaultdict(list)
    for text in sorted(groups, key=lambda text: blake2b(f"{seed}\x00{text}".encode(), digest_size=16).digest()):
        strata[min(label_of(records[position]) or "" for position in groups[text])].append(groups[text])
    quotas = _quotas({label: sum(map(len, members)) for label, members in strata.items()}, wanted)
    chosen: set[int] = set()
    for everything in (False, True):  # a quota that no group of its class fits passes on to the others
        for label in sorted(strata):
            left = wanted - len(chosen) if everything else quotas[label]
            # One group of every class stays in training: a class that is only evaluated cannot be learned.
            for group in strata[label][:-1]:
                if len(group) <= left and group[0] not in chosen:
                    chosen.update(group)
                    left -= len(group)
    if not chosen:
        raise IngraftError(
            f"No {wanted} of the {len(records)} rows can be set aside for evaluation: equal texts stay together, and every "
            "class keeps a row in training. Give more rows, remove duplicates, or name a file of its own with data.eval."
        )
    return chosen


def _quotas(sizes: dict[str, int], wanted: int) -> dict[str, int]:
    """`wanted` shared out in proportion to `sizes` (largest remainders, ties by name)."""
    total = sum(sizes.values())
    quotas = {label: size * wanted // total for label, size in sizes.items()}
    remainders = sorted(sizes, key=lambda label: (-(sizes[label] * wanted % total), label))
    for label in remainders[: wanted - sum(quotas.values())]:
        quotas[label] += 1
    return quotas
