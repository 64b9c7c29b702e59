"""Several files as one data set: which rows an epoch is made of, and what each file's part in a set of rows is.

An epoch has as many rows as all files have together. Without weights it is all of them. With weights each file gives its share, whatever its
size: a small file is read several times, of a large one a part is read, and the next epoch goes on behind it. So a file is a stream, one shuffled pass over its rows
after another, and an epoch takes the next piece of each. Over epochs all rows of a file are seen equally often, to one time.

What an epoch holds is a function of sizes, weights, seed and its number: a resumed run works it out again. Shares within an epoch are exact to one row. Drawing each row's
file at random was not taken: it needs a generator, and its shares are exact only in the mean.

One epoch's rows of all files are shuffled together and batched as those of one file are (`batching`): a batch holds rows of several files, and the loss counts each
learned token alike. A file's share of what is learned is therefore its share of the learned tokens, which the report says beside that of the rows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ingraft.data.examples import Example
from ingraft.data.records import Record
from ingraft.data.rows import Row
from ingraft.data.splits import quotas
from ingraft.errors import IngraftError


@dataclass(frozen=True, kw_only=True, slots=True)
class Origin:
    """One file's part in a part of the data.

    Attributes:
        name: short and of this file alone, for metrics.
        file: as the user named it.
        rows, examples: where its own lie in the part.
        shift: what its examples' row ids begin at.
        weight: relative to the others'; None where files are taken as they are.
    """

    name: str
    file: str
    rows: range
    examples: range
    shift: int
    weight: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows and what became of them; `rows[example.row_id]` is an example's row, unless the task's examples are `blocks`.

    Attributes:
        origins: the files that they came from, in order.
    """

    rows: list[Row]
    records: list[Record]
    examples: list[Example]
    origins: tuple[Origin, ...] = ()

    def of(self, origin: Origin) -> Part:
        """The part of one file alone, as if there were no other."""
        examples = [self.examples[i] for i in origin.examples]
        if origin.shift:
            examples = [example.moved(-origin.shift) for example in examples]
        there = origin.rows
        own = replace(origin, rows=range(len(there)), examples=range(len(examples)), shift=0)
        return Part(
            rows=self.rows[there.start : there.stop],
            records=self.records[there.start : there.stop],
            examples=examples,
            origins=(own,),
        )


def joined(parts: Sequence[Part], *, blocks: bool) -> Part:
    """The parts of several files as one.

    Args:
        blocks: whether examples are numbered by themselves, and not as the rows are.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Part(rows=[], records=[], examples=[])
    origins: list[Origin] = []
    for part in parts:
        (origin,) = part.origins
        shift = len(whole.examples) if blocks else len(whole.rows)
        rows, examples = (range(len(a), len(a) + len(b)) for a, b in _pairs(whole, part))
        origins.append(replace(origin, rows=rows, examples=examples, shift=shift))
        whole.rows.extend(part.rows)
        whole.records.extend(part.records)
        whole.examples.extend(example.moved(shift) for example in part.examples)
    return replace(whole, origins=tuple(origins))


def _pairs(whole: Part, part: Part) -> tuple[tuple[list[Row], list[Row]], tuple[list[Example], list[Example]]]:
    return (whole.rows, part.rows), (whole.examples, part.examples)


class Mixture:
    """Which examples each epoch is made of.

    Attributes:
        quotas: how many of each file an epoch holds, in the files' order.
    """

    def __init__(self, origins: Sequence[Origin], seed: int) -> None:
        """Args:
        origins: of the training rows. seed: the run's.

        Raises:
            IngraftError: a weight is so small that its file has no row in an epoch.
        """
        self._pools, self._seed = [origin.examples for origin in origins], seed
        sizes: dict[tuple[int, str], float] = {(number, ""): len(pool) for number, pool in enumerate(self._pools)}
        total = sum(map(len, self._pools))
        self.weighted = any(origin.weight is not None for origin in origins)
        if self.weighted:
            sizes = {(number, ""): origin.weight or 0.0 for number, origin in enumerate(origins)}
        shares = quotas(sizes, total)
        self.quotas = tuple(shares[key] for key in sizes)
        if never := [origin.file for origin, quota in zip(origins, self.quotas, strict=True) if not quota]:
            raise IngraftError(
                f"data.train: {', '.join(never)}: its weight is so small that an epoch of {total} rows holds none of it. Raise it, or leave the file out."
            )

    def epoch(self, number: int) -> list[int]:
        """The positions of an epoch's examples, file after file; a position stands twice where an example is seen twice."""
        if not self.weighted:
            return [position for pool in self._pools for position in pool]
        return [position for file in range(len(self._pools)) for position in self._piece(file, number)]

    def _piece(self, file: int, number: int) -> list[int]:
        """The next piece of a file's stream."""
        pool, quota = self._pools[file], self.quotas[file]
        found: list[int] = []
        at = number * quota
        while len(found) < quota:
            turn, within = divmod(at + len(found), len(pool))
            order = list(pool)
            random.Random(f"ingraft mixture {self._seed} {file} {turn}").shuffle(order)
            found += order[within : within + quota - len(found)]
        return found


def short_names(files: Sequence[str]) -> list[str]:
    """A short name for each file: its own without its endings, with as many folders before it as tell it from the others, else its number."""
    names = [[*Path(file).parts[:-1], Path(file).name.split(".")[0] or "data"] for file in files]
    for depth in range(1, max(map(len, names), default=1) + 1):
        shown = ["/".join(parts[-depth:]).strip("/") for parts in names]
        if len(set(shown)) == len(shown):
            return shown
    shown = [parts[-1] for parts in names]
    counts = Counter(shown)
    return [f"{name}-{number}" if counts[name] > 1 else name for number, name in enumerate(shown, 1)]
