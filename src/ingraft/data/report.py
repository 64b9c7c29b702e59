"""What the data turned out to be, counted, so that nothing about it is silent.

Every branch of encoding that loses or changes a row has a number here, and a number above zero has a line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from ingraft.data.examples import Tally
from ingraft.data.mixing import Mixture, Part
from ingraft.data.repeats import Leaks, Repeats, repeats_of
from ingraft.data.rows import LISTED
from ingraft.data.tasks import Task

UNKNOWN_LIMIT = 0.05
"""Above this share of unknown tokens the model would learn from holes; a base that knows the script reads well
below 1 %.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class PartReport:
    """One part of the data: train, eval or test.

    Attributes:
        name: train, eval or test.
        source: the file as the user named it.
        rows: rows read into this part.
        examples: sequences made of them (blocks, for plain text).
        tokens: tokens the model reads per epoch, after cutting.
        lengths: shortest, median, 95 % and longest sequence in tokens, before cutting.
        spread: how many sequences have up to so many tokens, and more than the entry before; each entry is twice the one before.
        learned_share: share of the tokens that the loss counts; 1 where it counts rows.
        labels: rows per class, largest first; empty for language models.
        cut: rows that were cut at `max_length`.
        lost: those of them that lost something to be learned; by place.
        long: rows left out because they are longer than `max_length`; by place.
        dropped: rows without a learned token, mostly because their whole answer was cut away; by place.
        same: rows dropped because their answers are the same, as written or within `max_length`; by place.
        duplicates: rows that repeat an earlier row entirely. repeats: these and others by place, see `repeats`.
        unknown_share: share of tokens that the tokenizer does not know.
        about: lines on what only some tasks have: numbers, tags, windows.
        counted: what examples and what goes through the model are called.
        files: the same of each file, where they are several.
    """

    name: str
    source: str
    rows: int
    examples: int
    tokens: int
    lengths: tuple[int, int, int, int]
    spread: tuple[tuple[int, int], ...]
    learned_share: float
    labels: dict[str, int]
    cut: int
    lost: tuple[str, ...]
    long: tuple[str, ...]
    dropped: tuple[str, ...]
    same: tuple[str, ...]
    duplicates: int
    repeats: Repeats
    unknown_share: float
    about: tuple[str, ...] = ()
    counted: tuple[str, str] = ("sequences", "tokens")
    files: tuple[PartReport, ...] = ()

    def lines(self) -> list[str]:
        """The part in a few lines of plain text."""
        least, median, most, longest = self.lengths
        out = [f"{self.name}: {self.rows:,} rows from {self.source}, {self._counts()}"]
        if longest:
            out.append(f"  length in tokens: shortest {least}, median {median}, 95 % below {most}, longest {longest}")
        if longest and len(self.spread) > 1:
            total = sum(count for _, count in self.spread)
            out.append("    up to " + ", ".join(f"{size}: {count / total:.0%}" for size, count in self.spread))
        if self.labels:
            shown = [f"{name} {count} ({count / self.rows:.0%})" for name, count in list(self.labels.items())[:LISTED]]
            rest = len(self.labels) - len(shown)
            out.append("  classes: " + ", ".join(shown) + (f", and {rest} more" if rest > 0 else ""))
        elif self.learned_share < 1 or not self.about:
            out.append(f"  learned: {self.learned_share:.1%} of the tokens")
        out += [f"  {line}" for line in self.about]
        if self.cut:
            out.append(f"  cut to max_length: {self.cut} rows ({self.cut / self.rows:.1%})")
        if self.lost:
            out.append(f"  warning: {len(self.lost)} of them lose part of what is to be learned {_some(self.lost)}")
        for why, places in (
            ("longer than max_length", self.long),
            ("nothing to learn within max_length", self.dropped),
            ("the answers are the same, as written or within max_length", self.same),
        ):
            if places:
                out.append(f"  dropped, {why}: {len(places)} rows {_some(places)}")
        found = self.repeats
        for pairs, what in (
            (found.same, "duplicates: {} rows repeat an earlier one"),
            (found.alike, "near duplicates: {} rows repeat an earlier one but for case, spaces or punctuation"),
            (found.contrary, "{} rows give the model what an earlier one gives, with another answer"),
        ):
            if pairs.count:
                out.append(f"  {what.format(pairs.count)} {pairs.shown}")
        if self.unknown_share:
            out.append(f"  unknown tokens: {self.unknown_share:.2%}")
        return out + [f"  {file.line()}" for file in self.files]

    def _counts(self) -> str:
        """Examples and what goes through the model; once, where both are the same."""
        counts = zip((self.examples, self.tokens), self.counted, strict=True)
        return ", ".join(dict.fromkeys(f"{count:,} {what}" for count, what in counts))

    def line(self) -> str:
        """The part in one line, as one file's of several."""
        found = f"{self.source}: {self.rows:,} rows, {self._counts()}"
        if self.learned_share < 1:
            found += f", {self.learned_share:.1%} of them learned"
        gone = len(self.dropped) + len(self.same) + len(self.long)
        for count, what in ((self.cut, "cut"), (gone, "dropped")):
            if count:
                found += f", {count:,} {what}"
        return found


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What an epoch holds of one of several files.

    Attributes:
        file: as the user named it.
        rows: of it in an epoch. times: how often each of its rows is seen in one, in the mean.
        of_rows, of_learned: its share of an epoch's rows, and of the terms of its loss.
    """

    file: str
    rows: int
    times: float
    of_rows: float
    of_learned: float

    def line(self) -> str:
        """The share in one line."""
        seen = "once" if self.times == 1 else f"{self.times:.3g} times"
        return f"{self.file}: {self.rows:,} rows ({self.of_rows:.1%}), each seen {seen}; {self.of_learned:.1%} of what is learned"


def shares_of(part: Part, mixture: Mixture) -> tuple[Share, ...]:
    """What an epoch holds of each file; nothing where there is one."""
    if len(part.origins) < 2:
        return ()
    learned: list[float] = []
    for origin, quota in zip(part.origins, mixture.quotas, strict=True):
        own = [part.examples[i].learned for i in origin.examples]
        learned.append(quota * sum(own) / len(own))
    return tuple(
        Share(
            file=origin.file,
            rows=quota,
            times=quota / len(origin.examples),
            of_rows=quota / sum(mixture.quotas),
            of_learned=terms / max(1.0, sum(learned)),
        )
        for origin, quota, terms in zip(part.origins, mixture.quotas, learned, strict=True)
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataReport:
    """The whole data set.

    Attributes:
        format: the recognised form of the training rows.
        task: what they were encoded for.
        max_length: the longest sequence, as applied.
        parts: train, then eval and test where there are any.
        shares: what an epoch holds of each file, where there are several.
        shared: rows of eval and test whose text also stands in train (possible only with files of their own).
        leaks: these, and such as differ from one in train by case, spaces or punctuation alone, by part.
        notes: what was decided on the way and may surprise.
    """

    format: str
    task: str
    max_length: int
    parts: tuple[PartReport, ...]
    shared: int
    leaks: Mapping[str, Leaks]
    shares: tuple[Share, ...] = ()
    notes: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report as plain text, one line an entry."""
        cut = f", max_length {self.max_length}" if any(part.lengths[-1] for part in self.parts) else ""
        out = [f"format: {self.format}, task {self.task}{cut}"]
        for part in self.parts:
            out += part.lines()
            if part.name == "train" and self.shares:
                out += ["  an epoch:", *(f"    {share.line()}" for share in self.shares)]
        if self.shared:
            out.append(f"warning: {self.shared} evaluation rows give the model what is also in the training data")
        for name, leaks in self.leaks.items():
            for pairs, how in ((leaks.same, "the text"), (leaks.alike, "but for case, spaces or punctuation the text")):
                if pairs.count:
                    out.append(f"  {name}: {pairs.count} rows have {how} of a training row {pairs.shown}")
        return out + [f"note: {note}" for note in self.notes]

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values."""
        return asdict(self)


def _some(places: Sequence[str]) -> str:
    """The first of them, in brackets."""
    return f"({', '.join(places[:LISTED])}{', ...' if len(places) > LISTED else ''})"


def spread_of(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Counts by size, each size a power of two and at least 8; without sizes below the first that has any."""
    counts = Counter(max(8, 1 << (length - 1).bit_length()) if length else 8 for length in lengths)
    if not counts:
        return ()
    sizes = [8 << n for n in range(40) if min(counts) <= 8 << n <= max(counts)]
    return tuple((size, counts[size]) for size in sizes)


def quantiles(lengths: Sequence[int]) -> tuple[int, int, int, int]:
    """Shortest, median, 95th percentile and longest (nearest rank)."""
    if not lengths:
        return 0, 0, 0, 0
    ordered = sorted(lengths)
    last = len(ordered) - 1
    return ordered[0], ordered[last // 2], ordered[-(-last * 95 // 100)], ordered[-1]


def report_of_files(name: str, files: Sequence[tuple[Part, Tally]], whole: Part, task: Task) -> PartReport:
    """Count one part, and each of its files where there are several."""
    if len(files) == 1:
        return part_report(name, *files[0], task)
    each = tuple(part_report(name, part, tally, task) for part, tally in files)
    together = Tally()
    for _, tally in files:
        together.add(tally)
    found = part_report(name, whole, together, task)
    return replace(found, source=", ".join(report.source for report in each), files=each)


def part_report(name: str, part: Part, tally: Tally, task: Task) -> PartReport:
    """Count one part, or one file of it. A line of a text file may well repeat, so duplicates are not counted there."""
    rows, records, examples = part.rows, part.records, part.examples
    tokens = sum(map(len, examples))
    learned = sum(example.learned for example in examples)
    classes = Counter(name for record in records for name in (task.classes(record) if task.classes is not None else ()))
    by_token = bool(examples) and (examples[0].labels is not None or examples[0].target is not None)
    about = task.about(records) if task.about is not None and records else []
    repeats = repeats_of(rows, records)
    return PartReport(
        name=name,
        source=rows[0].file,
        rows=len(rows),
        examples=sum(len(example.sequences) for example in examples),
        tokens=tokens,
        lengths=quantiles(tally.lengths),
        spread=spread_of(tally.lengths),
        learned_share=learned / max(1, tokens) if by_token else 1.0,
        labels=dict(classes.most_common()),
        cut=tally.cut,
        lost=tuple(tally.lost),
        long=tuple(tally.long),
        dropped=tuple(tally.dropped),
        same=tuple(tally.same),
        duplicates=repeats.same.count,
        repeats=repeats,
        unknown_share=tally.unknown / max(1, tally.tokens),
        counted=task.counted,
        about=(*about, *(f"{what}: {count:,}" for what, count in tally.more.items() if count)),
    )
