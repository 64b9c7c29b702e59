"""Whether a step fits the memory: how many rows may go through at once, and which blocks are to recompute themselves.

A forecast is made before the first step, from one forward pass of the longest row: what each block keeps for backward is counted to the
byte, each storage once. Rows keep in proportion; on top come gradients and moments of what is trained, the head's piece of logits, and the
backward pass of one block, for which a multiple of what the block keeps is taken, as measured. Where even a generous guess from the base's
width and depth takes less than a quarter of what is free, nothing is counted.

The loss is a sum over the effective batch and dropout a function of row and position, so fewer rows at once change rounding and
nothing else. Should a forecast be too low, a CUDA error in a step (or an allocator's, on a CPU) has the step repeated with half the rows; a
process that a CPU's system has to kill is beyond help, hence `SPARE`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft import adapt
from ingraft.data import row_ids
from ingraft.data.examples import Example
from ingraft.evaluate.head import PIECE
from ingraft.recipe import Recipe
from ingraft.train.machine import free_memory
from ingraft.train.objectives import Objective
from ingraft.train.recompute import blocks_of, use

log = logging.getLogger(__name__)

SPARE = 1.15
"""What a forecast is multiplied by."""
PASSING, AGAIN = 4, 6
"""What the pass back through a block takes, in sizes of what the block keeps: as it is, and where it is recomputed (docs/lab-notes.md)."""
LESS = "gradient_checkpointing: true, a smaller data.max_length and a packed base (quantization: nf4) take less memory."
GUESS = 64
"""Activations of the base's width that a block is guessed to keep for each token, where nothing is counted."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What the forward pass of one row keeps for backward, in bytes.

    Attributes:
        outside: outside of all blocks.
        blocks: by block, in the model's order.
        entry: what goes into a block, which one that recomputes itself keeps instead.
    """

    outside: int
    blocks: tuple[int, ...]
    entry: int

    def of(self, rows: int, recomputed: Sequence[int] = ()) -> int:
        """Bytes that so many rows keep, and their backward pass needs beside."""
        chosen = set(recomputed)
        entries = self.entry * len(chosen)
        plain = [size for number, size in enumerate(self.blocks) if number not in chosen]
        again = [size for number, size in enumerate(self.blocks) if number in chosen]
        at_first = entries + sum(plain) + PASSING * max(plain, default=0)
        later = entries + AGAIN * max(again, default=0)  # the blocks behind them are gone by then
        return rows * (self.outside + max(at_first, later))


def measure(model: nn.Module, blocks: Sequence[nn.Module], run: Callable[[], Tensor]) -> Kept:
    """Count what a forward pass keeps.

    Args:
        blocks: modules that may recompute themselves in backward, in order.
        run: the forward pass.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    seen: dict[int, int] = {}
    sizes, entry = [0] * (len(blocks) + 1), [0]
    inside = [len(blocks)]

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage.nbytes()
            sizes[inside[-1]] += storage.nbytes()
        return tensor

    def enter(number: int) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            del module
            inside.append(number)
            given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            entry[0] = max([entry[0], *(value.numel() * value.element_size() for value in given[:1])])

        return note

    def leave(*_: Any) -> None:
        inside.pop()

    handles = [block.register_forward_pre_hook(enter(i), with_kwargs=True) for i, block in enumerate(blocks)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            alive = run()
    finally:
        for handle in handles:
            handle.remove()
    del alive
    return Kept(outside=sizes[-1], blocks=tuple(sizes[:-1]), entry=entry[0])


def forecast(model: nn.Module, kept: Kept, rows: int, recomputed: Sequence[int] = ()) -> int:
    """Bytes that a run will need beside what is there already."""
    return math.ceil(SPARE * (kept.of(rows, recomputed) + _fixed(model)))


def _fixed(model: nn.Module) -> int:
    """Gradients, two moments and a copy of what is trained, all in float32, and the head's piece of logits."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vocabulary = getattr(cast(Any, model).config, "vocab_size", 0) if hasattr(model, "config") else 0
    return 16 * trained + 2 * 4 * PIECE * (vocabulary or 0)


def probe(model: nn.Module, objective: Objective, blocks: Sequence[nn.Module], row: Example) -> Kept:
    """`measure` for one row as it is trained."""
    objective.ready([row], 1)
    adapt.dropout_step(model, 0, row_ids(objective.sequences([row])))
    batch = objective.batch([row])
    return measure(model, blocks, lambda: objective.loss(batch))


def plenty(model: nn.Module, rows: int, length: int) -> bool:
    """Whether a generous guess takes less than a quarter of what is free; False where the base does not tell its size, or reads no tokens."""
    free = free_memory(next(model.parameters()).device)
    config = cast(Any, model).config.get_text_config() if hasattr(model, "config") else None
    width, depth = (getattr(config, name, None) for name in ("hidden_size", "num_hidden_layers"))
    by_token = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if free is None or not by_token or not isinstance(width, int) or not isinstance(depth, int):
        return False
    size = next(model.parameters()).element_size()
    return rows * length * width * depth * GUESS * max(2, size) + _fixed(model) < free / 4


def rows_that_fit(asked: int, need: Callable[[int], int], free: int) -> int:
    """The rows to take at once: the number asked for, or the largest equal share of them that fits; at least 1."""
    for pieces in range(1, asked + 1):
        size = math.ceil(asked / pieces)
        if need(size) <= free:
            return size
    return 1


@dataclass(frozen=True, kw_only=True)
class Choice:
    """How a step goes through the memory.

    Attributes:
        rows: at once.
        recomputed: numbers of the blocks that recompute themselves.
        why: lines for people, where the memory decided something.
    """

    rows: int
    recomputed: tuple[int, ...]
    why: tuple[str, ...] = ()


def choose(model: nn.Module, objective: Objective, rows: Sequence[Example], recipe: Recipe, asked: int) -> Choice:
    """What fits: blocks recompute themselves where the recipe leaves that open, then fewer rows go through at once.

    Nothing recomputes itself while this is found out.

    Args:
        rows: all training rows; the longest decides.
        asked: rows at once; fewer only if the recipe allows it.
    """
    blocks, wanted = blocks_of(model), recipe.gradient_checkpointing
    longest = max(rows, key=len)
    free = free_memory(next(model.parameters()).device)
    enough = free is None or plenty(model, asked, len(longest))
    every = tuple(range(len(blocks)))
    open_ended = wanted == "auto" or recipe.auto_find_batch_size
    if wanted is True and (enough or not open_ended):
        return Choice(rows=asked, recomputed=every)
    if wanted in (False, 0, "auto") and (enough or not open_ended):
        return Choice(rows=asked, recomputed=())
    use(model, ())
    kept = probe(model, objective, blocks, longest)
    part = tuple(number for number, size in enumerate(kept.blocks) if size)
    chosen = every if wanted is True else part[: 0 if wanted == "auto" else int(wanted)]
    if enough or free is None:
        return Choice(rows=asked, recomputed=chosen)

    def need(size: int) -> int:
        return forecast(model, kept, size, chosen)

    need_of_all = f"{asked} {_rows(longest)} need about {gigabytes(need(asked))}, {gigabytes(free)} are free"
    why: list[str] = []
    if wanted == "auto" and need(asked) > free:
        ways = [part[:n] for n in range(len(part) + 1)]
        needs = [forecast(model, kept, asked, way) for way in ways]
        chosen = ways[next((n for n, needed in enumerate(needs) if needed <= free), needs.index(min(needs)))]
        why.append(f"{need_of_all}: {len(chosen)} of {len(part)} blocks recompute themselves in backward.")
        need_of_all = f"Even so {asked} rows need about {gigabytes(need(asked))}"
    size = rows_that_fit(asked, need, free) if recipe.auto_find_batch_size else asked
    if size != asked:
        why.append(f"{need_of_all}: {size} at a time, and the effective batch as it was.")
    if need(size) > free:
        why.append(f"{size} {_rows(longest)} may not fit: about {gigabytes(need(size))} are needed. {LESS}")
    return Choice(rows=size, recomputed=chosen, why=tuple(why))


def gigabytes(count: int) -> str:
    """Bytes for people."""
    return f"{count / 1e9:.1f} GB"


def _rows(longest: Example) -> str:
    return f"rows of {len(longest)} tokens" if longest.input_ids else "rows"


def advice(rows: int, longest: Example) -> str:
    """What to do where a step runs out of memory and cannot be made smaller."""
    fewer = "" if rows == 1 else " auto_find_batch_size: true takes fewer rows at once."
    return f"Memory ran out in a step with {rows} {_rows(longest)} at a time; the last checkpoint is from before.{fewer} {LESS}"


def exhausted(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or in a CPU's allocator."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or (isinstance(error, Exception) and should_reduce_batch_size(error))


def give_back() -> None:
    """Let the allocator have what nobody holds any more."""
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
