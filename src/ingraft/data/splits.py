"""Setting rows aside for evaluation, the same ones every time.

A row's turn comes by a hash of the seed and its text, not by its position: the same file in another order, or with a
few rows more, keeps nearly the same split. Rows that give the model the same text travel together, questions about one
context too, so nothing that is evaluated was seen in training. Classes keep their shares. Lines of a text file are one running text: there the end is
set aside, because scattered lines would leave holes that the neighbours give away.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fractions import Fraction
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


def choose(records: Sequence[Record], wanted: int, seed: int, files: Sequence[int] | None = None) -> set[int]:
    """The positions of about `wanted` records to set aside: at most so many, fewer only where groups of equal texts
    do not fit.

    Args:
        files: of each record the number of its file. Files keep their shares, as classes do, and equal texts stay together across files.

    Raises:
        IngraftError: all rows give the same text, so that no split is possible.
    """
    files = [0] * len(records) if files is None else files
    of_file: dict[int, list[int]] = defaultdict(list)
    for position, file in enumerate(files):
        of_file[file].append(position)
    running = {
        file
        for file, positions in of_file.items()
        if all(isinstance(record, Document) and record.line_of_file for record in map(records.__getitem__, positions))
    }
    chosen: set[int] = set()
    if running:
        shares = quotas({(file, ""): len(positions) for file, positions in of_file.items()}, wanted)
        for file in running:
            chosen.update(of_file[file][len(of_file[file]) - shares[file, ""] :])
    rest = [position for position, file in enumerate(files) if file not in running]
    if rest:
        chosen |= _scattered(records, rest, wanted - len(chosen), seed, files)
    if not chosen:
        raise IngraftError(
            f"No {wanted} of the {len(records)} rows can be set aside for evaluation: equal texts stay together, and every "
            "class keeps a row in training. Give more rows, remove duplicates, or name a file of its own with data.eval."
        )
    return chosen


def _scattered(
    records: Sequence[Record], positions: Sequence[int], wanted: int, seed: int, files: Sequence[int]
) -> set[int]:
    """As `choose`, of rows that are no running text."""
    groups: dict[str, list[int]] = defaultdict(list)
    for position in positions:
        groups[kept_together(records[position])].append(position)
    strata: dict[tuple[int, str], list[list[int]]] = defaultdict(list)
    for text in sorted(groups, key=lambda text: blake2b(f"{seed}\x00{text}".encode(), digest_size=16).digest()):
        kind = min((files[position], label_of(records[position]) or "") for position in groups[text])
        strata[kind].append(groups[text])
    shares = quotas({kind: sum(map(len, members)) for kind, members in strata.items()}, wanted)
    chosen: set[int] = set()
    for everything in (False, True):  # a quota that no group of its class fits passes on to the others
        for kind in sorted(strata):
            left = wanted - len(chosen) if everything else shares[kind]
            # One group of every class stays in training: a class that is only evaluated cannot be learned.
            for group in strata[kind][:-1]:
                if len(group) <= left and group[0] not in chosen:
                    chosen.update(group)
                    left -= len(group)
    return chosen


def quotas(sizes: Mapping[tuple[int, str], float], wanted: int) -> dict[tuple[int, str], int]:
    """`wanted` shared out in proportion to `sizes` (largest remainders, ties by name); they are of a file by number, and of a class of it."""
    total = sum(map(Fraction, sizes.values()))
    exact = {name: Fraction(size) * wanted / total for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    remainders = sorted(sizes, key=lambda name: (shares[name] - exact[name], name))
    for name in remainders[: wanted - sum(shares.values())]:
        shares[name] += 1
    return shares
