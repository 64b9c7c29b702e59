"""What the rows of a batch are about: the task of each row, and which of its tokens are the prompt.

Some parts act on the prompt alone (a representation edit at its first and last tokens), others choose their values by the row's task. Both
are facts about the batch which no layer can see, so they travel in the `Call` (`rows.py`) and parts ask their site for them. A user tells
them with `adapt.context`; what nobody tells is worked out:

* in `generate`, the tokens it was given are the prompt and those it makes are not, with any cache and without one;
* where labels come with a batch, what stands before the first learned token is the prompt;
* in the decoder of an encoder-decoder, the start token is the prompt: all that stands there before an answer;
* else every real token is the prompt, save those that a cache puts behind an earlier call.

`Tokens` is what one call of a stack of layers sees of the rows: how many columns lie in the cache before it, and which of its own are real.
It is worked out only for adapters whose parts ask (`Part.reads_context`).

Legend: B rows or entries of dimension 0, T tokens of this call, L tokens that were told about, n rows of the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ingraft.errors import IngraftError

IGNORED_LABEL = -100
"""The label of a token that is not learned."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a user tells about the rows.

    Attributes:
        tasks: (n,) int64 the task of each row; None if nobody said.
        prompt: (n, L) bool which tokens belong to the prompt; those behind L do not.
    """

    tasks: Tensor | None = None
    prompt: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What one call of a stack of layers sees of the rows.

    Attributes:
        count: T, real and padded; 0 where the input is no text.
        past: columns that lie in the cache already.
        real: (B, columns up to the last of this call) bool; None if all are.
        in_decoder: whether this is the decoder beside an encoder.
        virtual: (B or 1, virtual and own columns of this call) bool, the places of virtual tokens; None if there are none.
    """

    count: int = 0
    past: int | Tensor = 0
    real: Tensor | None = None
    in_decoder: bool = False
    virtual: Tensor | None = field(default=None)


def told(tasks: Sequence[int] | Tensor | None, prompt: Tensor | None) -> Context:
    """Check what a user tells.

    Raises:
        IngraftError: for shapes and kinds of numbers that cannot be meant.
    """
    problems: list[str] = []
    tasks_n = None if tasks is None else torch.as_tensor(tasks)
    if tasks_n is not None and (tasks_n.dim() != 1 or tasks_n.is_floating_point() or tasks_n.dtype == torch.bool):
        problems.append(
            f"context: tasks must be one whole number a row, got {tasks_n.dtype} of shape {tuple(tasks_n.shape)}."
        )
    if prompt is not None and (prompt.dim() != 2 or prompt.is_floating_point()):
        problems.append(
            f"context: prompt must be (rows, tokens) bool, got {prompt.dtype} of shape {tuple(prompt.shape)}."
        )
    if tasks_n is not None and prompt is not None and tasks_n.shape[:1] != prompt.shape[:1]:
        problems.append(f"context: tasks speaks of {tasks_n.shape[0]} rows, prompt of {prompt.shape[0]}.")
    if problems:
        raise IngraftError(*problems)
    return Context(tasks=None if tasks_n is None else tasks_n.long(), prompt=None if prompt is None else prompt.bool())


def tokens_of(named: Mapping[str, Any], *, virtual: int = 0, in_decoder: bool = False) -> Tokens:
    """What a call of a stack sees, from its arguments.

    Args:
        virtual: virtual tokens that an earlier call has put into the cache.
    """
    given = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
    cached, mask = named.get("past_key_values"), named.get("attention_mask")
    past = 0 if cached is None else cached.get_seq_length()
    if isinstance(past, Tensor):
        past = (past - virtual).clamp(min=0)  # a tensor of its own: a static cache counts on in place
    else:
        past = max(past - virtual, 0)
    return Tokens(
        count=0 if given is None else given.shape[1],
        past=past,
        real=mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None,
        in_decoder=in_decoder,
    )


def prompt_at_start(named: Mapping[str, Any], virtual: int) -> Tensor | None:
    """(rows, L) bool the prompt that `generate` begins with: what its mask says, or all of its input where nothing is padded.

    Args:
        virtual: virtual tokens that a cache from an earlier call holds.
    """
    mask, ids, embedded = named.get("attention_mask"), named.get("input_ids"), named.get("inputs_embeds")
    if isinstance(mask, Tensor):
        return mask.bool()
    given = ids if embedded is None else embedded
    if given is None:
        return None
    cached = named.get("past_key_values")
    past, length = 0 if cached is None else max(int(cached.get_seq_length()) - virtual, 0), given.shape[1]
    # An input that does not reach beyond a cache from an earlier call continues it.
    return torch.ones(1, length + (past if length <= past else 0), dtype=torch.bool, device=given.device)


def tasks_of(context: Context, size: int, entries: Tensor | None, where: str) -> Tensor | None:
    """(B,) the tasks of the entries at hand. See `_rows_at`."""
    return None if context.tasks is None else _rows_at(context.tasks, size, entries, where)


def prompt_of(context: Context, tokens: Tokens, like: Tensor, size: int, entries: Tensor | None, where: str) -> Tensor:
    """Which positions of a layer's output belong to the prompt, bool of the shape of `like` without its last dimension.

    Args:
        like: (B, T, ...), or another shape where nothing is known about tokens: then all of it is the prompt.
        size: length of dimension 0 over the whole batch.
        entries: the indices of dimension 0 at hand; None for all.

    Raises:
        IngraftError: `like` has no tokens though the prompt is told, or another number of them.
    """
    known = context.prompt is not None or tokens.real is not None or tokens.count > 0
    if not known:
        return torch.ones(like.shape[:-1], dtype=torch.bool, device=like.device)
    if like.dim() != 3:
        raise IngraftError(
            f"{where} returns shape {tuple(like.shape)}, in which the tokens of the prompt cannot be found; it must be (rows, tokens, width)."
        )
    virtual = like.shape[1] - tokens.count if tokens.count else 0
    own = like.shape[1] - virtual
    if virtual < 0:
        raise IngraftError(
            f"{where} returns {like.shape[1]} positions for {tokens.count} tokens; which are the prompt cannot be told."
        )
    column_T = tokens.past + torch.arange(own, device=like.device)
    if tokens.in_decoder:
        mask_BT = (column_T == 0)[None].expand(like.shape[0], -1)
    elif context.prompt is not None:
        prompt_BL = _rows_at(context.prompt.to(like.device), size, entries, where)
        L = prompt_BL.shape[1]
        mask_BT = prompt_BL[:, column_T.clamp(max=L - 1)] & (column_T < L)
    else:
        mask_BT = (column_T == torch.arange(own, device=like.device))[None].expand(like.shape[0], -1)
        if tokens.real is not None:
            mask_BT = mask_BT & _rows_at(tokens.real.to(like.device), size, entries, where)[:, -own:]
    return _among_virtual(mask_BT, tokens.virtual, virtual, size, entries, where)


def end_of_prompt(context: Context, size: int, where: str, device: torch.device) -> Tensor | None:
    """(B,) the column behind each entry's last token of the prompt, 0 if none is; None where nobody told which they are."""
    if context.prompt is None:
        return None
    prompt_BL = _rows_at(context.prompt.to(device), size, None, where)
    return last_of(prompt_BL)


def last_of(mask_BL: Tensor) -> Tensor:
    """(B,) the column behind the last True, 0 if there is none."""
    columns_L = torch.arange(1, mask_BL.shape[1] + 1, device=mask_BL.device)
    return (mask_BL.bool() * columns_L).amax(1)


def before_answer(labels_BT: Tensor, mask_BT: Tensor | None) -> Tensor:
    """(B, T) bool the prompt, where labels say what is learned: the tokens before the first learned one; all real tokens of plain text, where
    nothing but the text is learned."""
    learned_BT = labels_BT != IGNORED_LABEL
    before_BT = (learned_BT.cumsum(1) == 0) | learned_BT[:, :1]
    return before_BT if mask_BT is None else before_BT & mask_BT.bool()


def _among_virtual(
    mask_BT: Tensor, places: Tensor | None, count: int, size: int, entries: Tensor | None, where: str
) -> Tensor:
    """The mask with a False at each virtual token, in front where nothing else is said."""
    if not count:
        return mask_BT
    B, T = mask_BT.shape
    if places is None:
        return torch.cat([mask_BT.new_zeros(B, count), mask_BT], 1)
    places_BT = places.to(mask_BT.device).expand(size, -1) if places.shape[0] == 1 else places.to(mask_BT.device)
    places_BT = _rows_at(places_BT, size, entries, where)
    return mask_BT.new_zeros(B, T + count).masked_scatter(~places_BT, mask_BT)


def _rows_at(values: Tensor, size: int, entries: Tensor | None, where: str) -> Tensor:
    """Each entry's own row of what was told by row: rows that the model repeats (beams, windows) lie side by side.

    Raises:
        IngraftError: if `size` is no multiple of the rows told about.
    """
    n = values.shape[0]
    if size % n:
        raise IngraftError(
            f"context: it speaks of {n} rows, but {where} sees {size} entries in dimension 0, which is no multiple of it."
        )
    if entries is None:
        return values if size == n else values.repeat_interleave(size // n, 0)
    return values[(entries // (size // n)).to(values.device)]
