"""How long a step takes against its matrix products alone: the `roofline` of a log line.

The ratio is the seconds of the steps over the seconds that the multiplications and additions of their matrix products would take at the rate of
this machine. 1 would be a step of nothing but products at full speed; the rest is what the products' shapes, the elementwise operations,
memory and Python cost.

*The rate* is measured once a process for each base's shapes, when a run begins: products of 512 rows with matrices of the base's own shapes, both ways round as forward and
backward use them, in the base's dtype and with the threads at hand. Each is repeated and the best taken, by
processor time on a CPU. The steps are taken by the clock on the wall: a machine that is busy with other things shows in the ratio.

*The work* is what is executed, whatever the method and the architecture: products of the forward pass, gradients of inputs, adapters, the
head over the learned tokens, attention (all of its scores: a causal mask spares none of them on a CPU), and what gradient checkpointing repeats.
It is counted by looking at every operation that reaches torch's dispatcher, which costs some Python for each of thousands, so only a few micro-batches
are looked at. Work is a sum of terms in 1, B, BT, BT^2 and N, so once the micro-batches counted so far span a new one's
(1, B, BT, BT^2, N), the new one's work is the same combination of theirs, in exact arithmetic; a micro-batch that is not spanned is counted.
Where rows are laid end to end there are two more terms, the real tokens and the squares of the lengths that attention calls have.

Legend: B rows, T positions, N learned tokens.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ingraft.adapt.flat import layout
from ingraft.adapt.weights import kind_of
from ingraft.evaluate import virtual_tokens
from ingraft.recipe import Recipe

SECONDS = 0.25
"""What measuring the rate takes, and at most one round of products; more where the machine is too slow or busy for full ones in that time."""
ROWS = 512
"""Rows of the products by which the rate is measured."""
LARGEST = 1 << 31
"""Multiplications and additions of the largest such product; a larger matrix is cut."""


def gemm_rate(model: nn.Module) -> float:
    """Multiplications and additions a second of products on this base's shapes, in its dtype, with the threads at hand."""
    device = next(model.parameters()).device
    dtype = cast(torch.dtype, getattr(model, "dtype", torch.float32))
    work: Counter[tuple[int, int]] = Counter()
    for module in model.modules():
        kind = kind_of(module)
        if kind is not None and kind.multiplies and len(shape := kind.shape_of(module)) == 2:
            work[shape] += prod(shape)
    shapes = tuple(work.most_common(3)) or (((512, 512), 1),)
    return _measured(shapes, dtype, device, torch.get_num_threads())


@cache
def _measured(
    shapes: tuple[tuple[tuple[int, int], int], ...], dtype: torch.dtype, device: torch.device, threads: int
) -> float:
    """`gemm_rate` of (out, in) shapes, each with its weight."""
    del threads  # those at hand; here so that another number of them is measured anew
    began = time.perf_counter()
    seconds = total = 0.0
    for number, ((out, inner), weight) in enumerate(shapes, start=1):
        w_OI = torch.ones(min(out, max(1, LARGEST // (2 * ROWS * inner))), inner, dtype=dtype, device=device)
        seconds += weight / _rate(w_OI, began + SECONDS * number / len(shapes))
        total += weight
    return total / seconds


def _rate(w_OI: Tensor, until: float) -> float:
    """The best rate of products with a matrix, both ways round; of fewer rows where so many take too long."""
    rows, best = ROWS // 64, 0.0
    while True:
        x_NI = torch.ones(rows, w_OI.shape[1], dtype=w_OI.dtype, device=w_OI.device)
        _settle(w_OI.device)
        began, at = time.perf_counter(), _clock(w_OI.device)
        torch.mm(F.linear(x_NI, w_OI), w_OI)
        _settle(w_OI.device)
        now = time.perf_counter()
        best = max(best, 4 * rows * w_OI.numel() / max(_clock(w_OI.device) - at, 1e-9))
        larger = rows < ROWS and 2 * (now - began) < SECONDS  # few rows are no measure, however busy the machine is
        if not larger and now + (now - began) > until:
            return best
        if larger:
            rows *= 2


def _clock(device: torch.device) -> float:
    """Seconds; on a CPU those that this process's threads had, each its share, so that other processes take nothing from the rate."""
    return time.process_time() / torch.get_num_threads() if device.type == "cpu" else time.perf_counter()


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Products(TorchDispatchMode):
    """Inside it, the work of every matrix product that runs, forward or backward.

    Attributes:
        work: multiplications and additions so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = _formulas().get(func._overloadpacket)
        if formula is not None:
            self.work += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _formulas() -> Mapping[Any, Callable[..., int]]:
    """What each operation's products are, by torch's own table, and of those that it leaves out."""
    if not _FORMULAS:
        from torch.utils.flop_counter import flop_registry

        aten = torch.ops.aten
        _FORMULAS.update(cast(Any, flop_registry))
        for name in ("addmm", "baddbmm"):
            _FORMULAS[getattr(aten, f"{name}_")] = _FORMULAS[getattr(aten, name)]
        for end in ("", "_backward"):
            known = _FORMULAS[getattr(aten, f"_scaled_dot_product_flash_attention{end}")]
            _FORMULAS[getattr(aten, f"_scaled_dot_product_flash_attention_for_cpu{end}")] = known
        _FORMULAS[aten.mv] = lambda matrix, vector, out_val: 2 * matrix.numel()
        _FORMULAS[aten.dot] = lambda a, b, out_val: 2 * a.numel()
    return _FORMULAS


_FORMULAS: dict[Any, Callable[..., int]] = {}


class Ledger:
    """Work of micro-batches by their terms; see the module docstring.

    Each row of `_rows` is a combination of counted micro-batches, reduced so that it is 1 in a place of its own and 0 in every other row's.
    """

    def __init__(self) -> None:
        self._rows: dict[int, tuple[list[Fraction], Fraction]] = {}

    def known(self, terms: Sequence[int]) -> int | None:
        """The work of a micro-batch, or None if it has to be counted."""
        rest, work = self._reduced(terms, Fraction(0))
        return None if any(rest) else int(-work)

    def learn(self, terms: Sequence[int], work: int) -> None:
        """Take note of a counted micro-batch."""
        rest, left = self._reduced(terms, Fraction(work))
        place = next((i for i, x in enumerate(rest) if x), None)
        if place is None:
            return
        found, value = [x / rest[place] for x in rest], left / rest[place]
        for other, (row, theirs) in self._rows.items():
            factor = row[place]
            self._rows[other] = ([a - factor * b for a, b in zip(row, found, strict=True)], theirs - factor * value)
        self._rows[place] = found, value

    def _reduced(self, terms: Sequence[int], work: Fraction) -> tuple[list[Fraction], Fraction]:
        rest = [Fraction(x) for x in terms]
        for place, (row, theirs) in self._rows.items():
            factor = rest[place]
            if factor:
                rest = [a - factor * b for a, b in zip(rest, row, strict=True)]
                work -= factor * theirs
        return rest, work


class Meter:
    """The work of a run's micro-batches, counted or derived, and what it would take.

    Attributes:
        rate: multiplications and additions a second.
        packed: rows may be laid end to end (`data.packing`); two more terms then say how. virtual: tokens that each row has in front.
    """

    def __init__(self, rate: float, *, packed: bool = False, virtual: int = 0) -> None:
        self.rate, self.packed, self.virtual, self._work = rate, packed, virtual, 0
        self._ledgers: dict[str, Ledger] = {}

    @contextmanager
    def micro_batch(self, name: str, batch: Mapping[str, Tensor], learned: int) -> Iterator[None]:
        """Around forward and backward of a micro-batch.

        Args:
            name: of the adapter that acts.
            batch: as the model gets it.
            learned: terms of the loss in it.
        """
        ledger = self._ledgers.setdefault(name, Ledger())
        terms = _terms(batch, learned, self.virtual if self.packed else None)
        work = ledger.known(terms)
        if work is not None:
            yield
        else:
            with Products() as products:
                yield
            work = products.work
            ledger.learn(terms, work)
        self._work += work

    def taken(self) -> int:
        """The work since the last call."""
        work, self._work = self._work, 0
        return work

    def ratio(self, seconds: float, work: int) -> float | None:
        """Seconds against what the products of this work would take; None without any."""
        return seconds * self.rate / work if work else None


def meter_of(recipe: Recipe, model: nn.Module) -> Meter:
    """For a run of this recipe."""
    packed, virtual = recipe.data.packing, 0
    if packed:
        virtual = virtual_tokens(recipe.method, recipe.method_config, recipe.init_adapter)
    return Meter(gemm_rate(model), packed=packed, virtual=virtual)


def _terms(batch: Mapping[str, Tensor], learned: int, virtual: int | None = None) -> tuple[int, ...]:
    """Of a micro-batch. virtual: tokens in front of each row, where rows may be laid end to end; None where they are not."""
    shape = batch["input_ids"].shape if "input_ids" in batch else next(iter(batch.values())).shape[:1]
    rows = int(shape[0])
    length = int(shape[1]) if len(shape) > 1 else 1
    padded = (1, rows, rows * length, rows * length**2, learned)
    if "decoder_attention_mask" in batch:  # a decoder that looks at itself and at what was read
        written = int(batch["decoder_attention_mask"].shape[1])
        padded += (rows * written, rows * written**2, rows * length * written)
    if virtual is None:
        return padded
    flat = layout(F.pad(batch["attention_mask"], (virtual, 0), value=1), causal=True)
    if flat is None:
        return (*padded, rows * (virtual + length), rows * (virtual + length) ** 2)
    return (*padded, flat.tokens, sum(len(call.lengths) * call.longest**2 for call in flat.together))
