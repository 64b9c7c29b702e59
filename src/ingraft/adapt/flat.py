"""Rows laid end to end: the layers of a stack see one sequence of all the real tokens of a batch, and no padding.

The place is the model that embeds tokens (`virtual.Inner`), on both sides of its own forward: what goes in is laid end to end, what comes out is
put back into rows. So nothing outside knows (labels, heads, losses, pooling of a classifier, prompts and their masks), and which rows form a
batch and a step stays what it was. Positions are those that each row has by itself.

Inside, nearly everything acts on each token by itself: products, norms, most adapters. What does not:

* Attention. It gets each row by itself again (`attend`), through the function that the base would have called: rows of like length as one batch
  of it, filled up to the longest of them. A mask is made for the longest row once (`row_mask`), and none over all tokens by all tokens; where
  the base needs none for a causal row, none is made. Prefixes join behind that, in rows. Rows of very different lengths are not filled up to
  one: at lengths from 50 to 430 that took four times as long as all of them one by one.
  A flash kernel knows where rows end by itself and is told.
* Dropout, whose masks are a function of a token's own row and column, so its keys are by token (`keys`).
* Parts that ask what the rows are about, and rows with different adapters. Their hosts see rows (`in_rows`), filled up, while the base below
  them still sees none of that.

Anything else that mixes tokens (a convolution, a recurrence, positions worked out from columns) would see its neighbours' rows. No list of
families could be complete, so each model is tried before it is trusted (`packing.py`).

A call whose tokens have a cache, or that brings anything beyond tokens, runs as it always did.

Legend: B rows, T columns of the batch, N real tokens, L tokens of the longest row, H heads, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from ingraft.errors import IngraftError

Output = tuple[Tensor, Tensor | None]
FILLED = 0.125
"""At most this share of what an attention call is given is filling."""


@dataclass(frozen=True, kw_only=True)
class Together:
    """Rows that an attention call gets at once: those from `first` on, in the order in which they are laid."""

    first: int
    lengths: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def mask(self, mask: Any) -> Any:
        """What these rows need of a mask for all, (1 or B, heads, L, L)."""
        if not isinstance(mask, Tensor):
            return mask
        rows = slice(None) if mask.shape[0] == 1 else slice(self.first, self.first + len(self.lengths))
        return mask[rows, :, : self.longest, : self.longest]


@dataclass(frozen=True, kw_only=True, eq=False)
class Flat:
    """How the rows of a batch are laid.

    Attributes:
        shape: B and T.
        places: (N,) which of the B x T each token is.
        together: the rows by attention call, in the order in which they are laid.
        causal: whether no token sees what comes after it.
        by_row: hosts are to see rows.
        plain: nothing joins the attention.
    """

    shape: tuple[int, int]
    places: Tensor
    together: tuple[Together, ...]
    causal: bool
    by_row: bool = False
    plain: bool = True

    @property
    def tokens(self) -> int:
        return self.places.shape[0]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, in the order in which they are laid."""
        return tuple(length for rows in self.together for length in rows.lengths)

    def lay(self, x_BT: Tensor) -> Tensor:
        """(1, N, ...) of (B, T, ...)."""
        return x_BT.flatten(0, 1).index_select(0, self.places)[None]

    def put_back(self, x_1N: Tensor) -> Tensor:
        """(B, T, ...) of (1, N, ...), zero where no token is."""
        B, T = self.shape
        return x_1N.new_zeros(B * T, *x_1N.shape[2:]).index_copy(0, self.places, x_1N[0]).unflatten(0, (B, T))

    def holds(self, x: object) -> bool:
        """Whether a layer's input or output is the tokens, laid."""
        return isinstance(x, Tensor) and x.shape[:2] == (1, self.tokens)

    def keys(self, keys_B: Tensor, x: Tensor) -> Tensor:
        """(N, 2) keys of dropout by token, from those by row: the row's, and the place of the token's first entry in its row."""
        if not self.holds(x) and x.shape[0] != self.tokens:
            return keys_B[:1]
        T, entries = self.shape[1], x.numel() // self.tokens
        rows_N = torch.div(self.places, T, rounding_mode="floor")
        return torch.stack([keys_B[rows_N], ((self.places % T) * entries).to(keys_B.dtype)], 1)

    def attend(
        self, base: Callable[..., Output], query: Tensor, key: Tensor, value: Tensor, mask: Any, kwargs: dict[str, Any]
    ) -> Output:
        """Attention of each row by itself.

        Args:
            base: attention of rows (b, H, L, D), which returns (b, L, H, D).
            query, key, value: (1, H, N, D).
            mask: as `row_mask` made it.
        """
        sizes = [rows.tokens for rows in self.together]
        found: list[Tensor] = []
        for rows, *laid in zip(self.together, *(x.split(sizes, 2) for x in (query, key, value)), strict=True):
            q, k, v = (_apart(x.transpose(1, 2), rows.lengths).transpose(1, 2) for x in laid)
            found.append(_end_to_end(base(q, k, v, rows.mask(mask), **kwargs)[0], rows.lengths))
        return (found[0] if len(found) == 1 else torch.cat(found, 1)), None


def layout(
    mask_BT: Tensor, *, causal: bool, by_row: bool = False, plain: bool = True, at_once: bool = False
) -> Flat | None:
    """How to lay the tokens that a mask shows; None if there is nothing to gain (no padding), or a row is empty or has holes.

    Args:
        plain: nothing joins the attention, so rows may be laid by length.
        at_once: attention must get all rows in one call.
    """
    shown_BT = mask_BT.bool()
    B, T = shown_BT.shape
    length_B = shown_BT.sum(1)
    holes = (shown_BT[:, 1:] & ~shown_BT[:, :-1]).sum(1) + shown_BT[:, 0] > 1
    lengths = cast("list[int]", length_B.tolist())
    if sum(lengths) == B * T or not all(lengths) or bool(holes.any()):
        return None
    order = sorted(range(B), key=lambda row: -lengths[row]) if plain else list(range(B))
    order_B = torch.tensor(order, device=mask_BT.device)
    laid_N, column_N = torch.nonzero(shown_BT[order_B], as_tuple=True)
    sizes = [lengths[row] for row in order]
    return Flat(
        shape=(B, T),
        places=order_B[laid_N] * T + column_N,
        together=_together(sizes, at_once or not plain),
        causal=causal,
        by_row=by_row,
        plain=plain,
    )


def _together(lengths: list[int], at_once: bool) -> tuple[Together, ...]:
    """Rows by attention call; these are as few as `FILLED` allows."""
    found: list[list[int]] = []
    for length in lengths:
        own = found[-1] if found else []
        fits = own and 1 - (sum(own) + length) / ((len(own) + 1) * max(own[0], length)) <= FILLED
        if own and (at_once or fits):
            own.append(length)
        else:
            found.append([length])
    starts = [sum(map(len, found[:n])) for n in range(len(found))]
    return tuple(Together(first=start, lengths=tuple(own)) for start, own in zip(starts, found, strict=True))


# ---------------------------------------------------------------------------------------------------------------- the stack

_LAID: ContextVar[Flat | None] = ContextVar("ingraft_laid", default=None)
"""What the stack runs on whose masks are being made: a function that makes masks is told neither the model nor its call."""

_KNOWN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids")


def tokens_alone(named: dict[str, Any]) -> bool:
    """Whether a call of a stack is about the tokens of a batch and nothing else."""
    tokens = named.get("input_ids") if named.get("inputs_embeds") is None else named["inputs_embeds"]
    mask, positions = named.get("attention_mask"), named.get("position_ids")
    return (
        tokens is not None
        and not torch.compiler.is_compiling()
        and named.get("past_key_values") is None
        and not named.get("use_cache")
        and not named.get("output_attentions")
        and named.get("return_dict") is not False
        and isinstance(mask, Tensor)
        and mask.shape == tokens.shape[:2]
        and (positions is None or positions.dim() == 2)
        and not any(isinstance(x, Tensor) and x.dim() > 0 for name, x in named.items() if name not in _KNOWN)
    )


def refuse_several(named: dict[str, Any]) -> None:
    """Refuse rows that the caller has laid end to end itself, told apart by positions that begin again, where parts ask for rows.

    transformers masks such rows from each other and adds nothing to any of them.
    """
    positions = named.get("position_ids")
    if positions is None or named.get("attention_mask") is not None or named.get("past_key_values") is not None:
        return
    if positions.dim() == 2 and positions.shape[0] == 1 and bool((positions.diff() != 1).any()):
        raise IngraftError(
            "The positions begin again: several rows lie in one sequence. What acts here has something for each row, and cannot tell where one begins. "
            "Call the model with rows and a mask, inside `packing(model)`, which lays them end to end."
        )


@contextmanager
def laid(flat: Flat) -> Iterator[None]:
    """Inside the block, masks are made for these rows."""
    token = _LAID.set(flat)
    try:
        yield
    finally:
        _LAID.reset(token)


def run_laid(
    flat: Flat, what: str, base: Callable[..., Any], named: dict[str, Any], positions_BT: Tensor, *, kernel: bool
) -> Any:
    """One call of a stack on tokens laid end to end, its output in rows.

    Args:
        what: the stack, for messages.
        kernel: attention is told where rows end, rather than given them one by one.

    Raises:
        IngraftError: the stack returns more than something for each token.
    """
    B, T = flat.shape
    given = {**named, "position_ids": positions_BT.expand(B, T)}
    named = {**named, **{name: flat.lay(x) for name in _KNOWN if (x := given.get(name)) is not None}}
    if kernel:
        ends = torch.tensor([0, *flat.lengths], device=flat.places.device).cumsum(0).to(torch.int32)
        named |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}
        named |= {"max_length_q": max(flat.lengths), "max_length_k": max(flat.lengths)}
    with laid(flat):
        output = base(**named)
    if getattr(output, "pooler_output", None) is not None:
        raise IngraftError(
            f"data.packing: {what} pools its rows inside its stack, where they lie end to end; leave packing false for this base."
        )
    return each(output, flat.put_back)


def each(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of a stack with its hidden states changed."""
    if type(output) is tuple:
        return (change(output[0]), *output[1:])
    output.last_hidden_state = change(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(change(layer) for layer in output.hidden_states)
    return output


def row_mask(make: Callable[..., Any], *, skips: bool = True, **given: Any) -> Any:
    """A mask as transformers asks for it; for tokens laid end to end, that of their rows: (1 or B, 1, L, L), or none where the base needs none.

    Args:
        make: transformers' own function for this kind of attention.
        skips: whether it may make none because a causal kernel needs none, where rows are not laid.
    """
    flat = None if torch.compiler.is_compiling() else _LAID.get()
    if flat is None or given.get("q_length") != flat.tokens:
        return make(**given if skips else {**given, "allow_is_causal_skip": False})
    if given.get("use_vmap"):
        raise IngraftError(
            "data.packing: this base adds a mask of its own to its attention, over places in the batch, which are others where rows lie end to "
            "end; leave packing false for it."
        )
    lengths = flat.lengths
    L, device = max(lengths), given["device"]
    own = {"batch_size": 1, "q_length": L, "kv_length": L, "attention_mask": None}
    if not flat.causal:  # a causal row is filled up behind its last token, which sees none of that
        shown_BL = torch.arange(L, device=device) < torch.tensor(lengths, device=device)[:, None]
        own |= {"batch_size": len(lengths), "attention_mask": shown_BL}
    if not flat.plain and not skips:
        own["allow_is_causal_skip"] = False
    return make(**{**given, **own})


def refuse_laid(what: str, query: Tensor) -> None:
    """Refuse an attention that would take tokens laid end to end for one row."""
    flat = None if torch.compiler.is_compiling() else _LAID.get()
    if flat is not None and query.shape[2] == flat.tokens:
        raise IngraftError(
            f"data.packing: {what} is no attention that is known here; leave packing false for this base."
        )


# ---------------------------------------------------------------------------------------------------------------- hosts


def in_rows(
    act: Callable[..., Any],
    state: Any,
    call: Any,
    base: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """One forward of a host whose parts see rows.

    A layer by itself does to each token the same wherever it is, and is given rows too; what is inside of other modules sees tokens laid.

    Raises:
        IngraftError: the host does not see tokens, so its rows cannot be told apart.
    """
    flat: Flat = call.flat
    first = args[0] if args else next(iter(kwargs.values()), None)
    if not flat.holds(first):
        raise IngraftError(
            f"data.packing: {state.path} does not see the tokens of the batch one behind the other, so what acts on some of its rows only cannot "
            "find them. Leave packing false, or this module out of target_modules."
        )

    def beneath(x: Tensor, *others: Any, **named: Any) -> Any:
        y = base(flat.lay(x), *others, **named)
        return (flat.put_back(y[0]), *y[1:]) if isinstance(y, tuple) else flat.put_back(y)

    x_BT = flat.put_back(cast(Tensor, first))
    if args:
        rest, named = args[1:], kwargs
    else:
        name = next(iter(kwargs))
        rest, named = (), {key: value for key, value in kwargs.items() if key != name}
        inner = base
        base = lambda x, *others, **given: inner(*others, **{name: x}, **given)  # noqa: E731
    y = act(replace(call, flat=None), base if state.kind is not None else beneath, (x_BT, *rest), named)
    return (flat.lay(y[0]), *y[1:]) if isinstance(y, tuple) else flat.lay(y)


# ---------------------------------------------------------------------------------------------------------------- pieces


def _apart(x_1nHD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(b, L, H, D): a row each, filled up with zeros. A view where rows are of one length."""
    if min(lengths) == max(lengths):
        return x_1nHD.reshape(len(lengths), lengths[0], *x_1nHD.shape[2:])
    return cast(Tensor, _Apart.apply(x_1nHD, lengths))


def _end_to_end(x_bLHD: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """(1, n, H, D), the reverse of `_apart`."""
    if min(lengths) == max(lengths):
        return x_bLHD.reshape(1, -1, *x_bLHD.shape[2:])
    return cast(Tensor, _EndToEnd.apply(x_bLHD, lengths))


def _filled(x_1n: Tensor, lengths: tuple[int, ...]) -> Tensor:
    made = x_1n.new_zeros(len(lengths), max(lengths), *x_1n.shape[2:])
    for row, piece in zip(made, x_1n[0].split(lengths), strict=True):
        row[: len(piece)] = piece
    return made


def _joined(x_bL: Tensor, lengths: tuple[int, ...]) -> Tensor:
    return torch.cat([row[:length] for row, length in zip(x_bL, lengths, strict=True)])[None]


class _Apart(torch.autograd.Function):
    """Copies of slices both ways: an index would go back through an addition, token by token."""

    @staticmethod
    def forward(ctx: Any, x_1n: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.lengths = lengths
        return _filled(x_1n, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _joined(grads[0], ctx.lengths), None


class _EndToEnd(torch.autograd.Function):
    """See `_Apart`."""

    @staticmethod
    def forward(ctx: Any, x_bL: Tensor, lengths: tuple[int, ...]) -> Tensor:
        ctx.lengths = lengths
        return _joined(x_bL, lengths)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _filled(grads[0], ctx.lengths), None
