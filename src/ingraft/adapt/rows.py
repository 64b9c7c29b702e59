"""Which adapters act on which rows of a batch, and the dropout that goes with a row.

A `Call` is the immutable answer for one forward pass: every host reads it, and gradient checkpointing replays the very object that the
forward pass saw, so switching adapters or leaving `rows` before `backward()` changes nothing. Rows that carry the same adapters form a
`Group`; the base runs once over all rows, a group's parts act on its slice only, and the user's order is kept.

What a layer sees in dimension 0 need not be the rows of the batch. `spread` maps it: equal (n), a whole multiple (n rows of k consecutive
entries: beams, windows, flattened tokens), or one entry shared by all (GPT-2's position embedding), which is then repeated. Anything else
is refused. A layer that is known not to carry rows at all (T5's relative bias) is declared so by `hf.py`, because its sizes could agree by
chance.

Dropout masks come from a counter-based hash of (adapter seed, step, site, own row, position in the row), not from a generator: no history,
so a resumed run, another batch composition, a pack or a recomputation in backward all see the same mask. Two rounds of a 32-bit
multiply-xorshift mixer (the constants are those of Wellons' `lowbias32`) are enough for masks; cost is a few integer passes over x.

Legend: B dimension 0 of a layer's input, n rows of the batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ingraft.adapt.context import Context, Tokens
from ingraft.adapt.dropout import mixed
from ingraft.adapt.flat import Flat
from ingraft.errors import IngraftError

Names = tuple[str, ...]


@dataclass(frozen=True)
class Group:
    """Rows that carry the same adapters, in the same order. `rows` is None where that is every row."""

    names: Names
    rows: tuple[int, ...] | None


@dataclass(frozen=True)
class Call:
    """What acts in one forward pass.

    Attributes:
        active: the adapters that act where no rows are given, in activation order.
        rows: the adapters of each row, or None.
        step: the optimiser step that dropout is a function of; a tensor, so that compiled graphs need not be made anew.
        row_ids: (n,) the identity of each row for dropout; None counts from zero.
        size: entries of the model's own input in dimension 0, which is more than n where rows are repeated (beams); 0 if unknown.
        context: what a user told about the rows.
        tokens: what the running stack of layers sees of them, where a part that acts asks.
        flat: how the running stack's rows are laid end to end, if they are.
    """

    active: Names = ()
    rows: tuple[Names, ...] | None = None
    step: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64), compare=False)
    row_ids: Tensor | None = field(default=None, compare=False)
    size: int = field(default=0, compare=False)
    context: Context = field(default_factory=Context, compare=False)
    tokens: Tokens | None = field(default=None, compare=False)
    flat: Flat | None = field(default=None, compare=False)
    groups: tuple[Group, ...] = field(init=False, compare=False)
    """Rows by adapters, in order of first appearance; together they cover every row once. Made at once, not when asked for: compiled
    code can follow neither a lock nor a cache."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", _groups(self.active, self.rows))

    @property
    def acting(self) -> tuple[Names, tuple[Names, ...] | None, int, int]:
        """What two calls must share to compute the same function."""
        tokens, flat = (0 if x is None else id(x) for x in (self.tokens, self.flat))
        return self.active, self.rows, tokens, flat

    def at_step(self, step: Tensor, row_ids: Tensor | None) -> Call:
        """The same adapters at another step of training."""
        return replace(self, step=step, row_ids=row_ids)

    def of_group(self, group: Group) -> Call:
        """The same call as seen by code that is run on one group's rows only."""
        if group.rows is None or self.rows is None:
            return self
        ids = torch.arange(len(self.rows)) if self.row_ids is None else self.row_ids
        picked = ids[torch.tensor(group.rows, device=ids.device)]
        n, tokens = len(self.rows), self.tokens
        context = replace(
            self.context,
            tasks=_of_rows(self.context.tasks, group.rows, n),
            prompt=_of_rows(self.context.prompt, group.rows, n),
        )
        if tokens is not None:
            tokens = replace(
                tokens, real=_of_rows(tokens.real, group.rows, n), virtual=_of_rows(tokens.virtual, group.rows, n)
            )
        return replace(self, active=group.names, rows=None, row_ids=picked, size=0, context=context, tokens=tokens)


def _of_rows(values: Tensor | None, rows: tuple[int, ...], n: int) -> Tensor | None:
    """The entries of these rows, of values by row; one entry that all rows share stays."""
    if values is None or (values.shape[0] == 1 and n > 1):
        return values
    return values[entries_of(rows, values.shape[0], n, "the context").to(values.device)]


def _groups(active: Names, rows: tuple[Names, ...] | None) -> tuple[Group, ...]:
    if rows is None:
        return (Group(active, None),)
    members: dict[Names, list[int]] = {}
    for index, names in enumerate(rows):
        members.setdefault(names, []).append(index)
    if len(members) == 1:
        return (Group(next(iter(members)), None),)
    return tuple(Group(names, tuple(indices)) for names, indices in members.items())


def rows_of(entries: Sequence[str | None | Sequence[str]], known: Sequence[str]) -> tuple[Names, ...]:
    """Normalise what a user passes to `rows`: a name, several names, or None (the base) for each row.

    Raises:
        IngraftError: naming every entry that is not an attached adapter, or cannot be one.
    """
    if isinstance(entries, str | bytes) or not isinstance(entries, Iterable):
        raise IngraftError(f"rows: got {entries!r}; give a list with an entry for each row of the batch.")
    entries = tuple(entries)
    if odd := [
        f"rows: entry {index} is {entry!r}; an entry is a name, several names or None (the base alone)."
        for index, entry in enumerate(entries)
        if not _names_something(entry)
    ]:
        raise IngraftError(*odd)
    rows = tuple(() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries)
    unknown = sorted({name for names in rows for name in names if name not in known})
    if unknown:
        raise IngraftError(
            *(f"rows: no adapter named {name!r} is attached (attached: {', '.join(known)})." for name in unknown)
        )
    if not rows:
        raise IngraftError("rows: the list of adapters per row is empty.")
    return rows


def _names_something(entry: object) -> bool:
    """Whether an entry of `rows` is a name, several names or None."""
    if entry is None or isinstance(entry, str):
        return True
    return isinstance(entry, Iterable) and all(isinstance(name, str) for name in entry)


def entries_of(rows: tuple[int, ...], size: int, n: int, where: str) -> Tensor:
    """Indices into dimension 0 (of length `size`) that belong to these rows of an n-row batch.

    Raises:
        IngraftError: if dimension 0 cannot be n rows of k consecutive entries.
    """
    if size % n:
        raise IngraftError(
            f"rows: the batch has {n} rows, but {where} sees {size} entries in dimension 0, which is no multiple of it. "
            "Give one adapter per row of the batch, or use `activate` to let one adapter act on all of it."
        )
    index = torch.tensor(rows, dtype=torch.int64)
    k = size // n
    return index if k == 1 else (index[:, None] * k + torch.arange(k)).flatten()


def spread(x: Tensor, call: Call) -> Tensor:
    """Repeat an input that all rows share, so that each entry of the batch has its own."""
    if x.shape[0] != 1 or call.rows is None:
        return x
    n = len(call.rows)
    return x.expand(call.size if call.size and call.size % n == 0 else n, *x.shape[1:])


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """What a module returned, (B T, ...) as (B, T, ...) where its input x has tokens in rows: mixtures of experts return one long list of them."""
    flat = 1 < y.dim() == x.dim() - 1 and y.shape[0] == x.shape[0] * x.shape[1]
    return y.unflatten(0, x.shape[:2]) if flat else y


def row_keys(call: Call, salt: int, size: int, entries: Tensor | None, device: torch.device) -> Tensor:
    """(len(entries),) int32 keys, one an entry of dimension 0, from (adapter seed and site in `salt`, step, row identity).

    Args:
        size: length of dimension 0 over the whole batch.
        entries: the indices of dimension 0 at hand; None for all.
    """
    index = torch.arange(size, device=device) if entries is None else entries.to(device)
    if call.row_ids is not None:
        n = call.row_ids.shape[0]
        k = max(size // n, 1)
        index = call.row_ids.to(device)[torch.clamp(index // k, max=n - 1)] * k + index % k
    key = mixed((index + salt * 0x632BE5).to(torch.int32))
    return mixed(key + call.step.to(device=device, dtype=torch.int32) * -1640531527)
