"""Virtual tokens at the input of transformers models: prompts in front, and the positions of the real tokens behind prompts and prefixes.

The place is the *inner* model, the one that embeds tokens and works out masks and positions. Its class is swapped; on the way in, virtual
embeddings are put in front and positions move on; on the way out, the virtual positions are cut off again. Heads, losses and pooling by
position then see real tokens only and need no change, and labels none either.

With a cache, the first call puts the virtual tokens into it (they are ordinary entries of this layer stack) and later calls only account for
them: `past` counts them, positions and the mask go on behind them. `generate` makes room for them in a static cache (`hf.ModelRoot`).

Virtual tokens may also stand behind the row's prompt, just before the answer, where `context.py` knows it to end: each row is then put into
an order of its own on the way in (embeddings, positions, mask) and out of it on the way out. In a causal model the answer is predicted from
the last of them, so what comes out for the prompt's last token is what it says.

Rows may have prompts of different lengths, or none: shorter ones are filled up with masked slots. In a causal model these lie on the left,
where a cache can go on behind the row; elsewhere at the end of the row, so that column 0, which poolers read, and every column after it are
what they are in the row alone. In an encoder-decoder the prompt goes in front of the encoder's input and stays in its output, for the decoder
to attend to.

Legend: B batch, T tokens, P longest prompt, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.context import end_of_prompt, last_of, tasks_of, tokens_of
from ingraft.adapt.control import Control, HostState, host_state, part_of
from ingraft.adapt.counting import COUNTING, leaves_slots_alone, names_of
from ingraft.adapt.flat import each, layout, refuse_several, run_laid, tokens_alone
from ingraft.adapt.offload import present
from ingraft.adapt.root import outermost
from ingraft.adapt.rows import Call, Group, entries_of
from ingraft.adapt.swap import Forward, Mixin, original_class
from ingraft.errors import IngraftError
from ingraft.methods.contract import AttentionPart, InputPart, RowsAtHand


class Inner(Mixin):
    """The model that embeds tokens."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = host_state(module)
        assert state is not None
        return outermost(
            state.control, module, state.path, lambda: _run(module, state, base, args, kwargs), args, kwargs
        )


def _run(module: nn.Module, state: HostState, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the inner model."""
    call = state.current()
    state.ran = True
    virtual = bool(lengths(state.control, call, InputPart) or lengths(state.control, call, AttentionPart))
    packing = state.control.packing
    if not virtual and not packing and not reads_context(state.control, call):
        return base(*args, **kwargs)
    named = {**dict(zip(names_of(original_class(module)), args, strict=False)), **kwargs}
    if not torch.compiler.is_compiling() and (
        lengths(state.control, call, InputPart) or reads_context(state.control, call)
    ):
        refuse_several(named)
    if packing:
        base = partial(_end_to_end, module, state, base)
    with _telling(state.control, call, named):
        return _with_virtual(module, state, call, base, named) if virtual else base(**named)


def _end_to_end(module: nn.Module, state: HostState, base: Forward, **named: Any) -> Any:
    """The stack's forward on the batch's tokens laid end to end; as it is where they cannot be, or nothing is padded."""
    control = state.control
    before = control.call
    if not tokens_alone(named):
        return base(**named)
    mask, ids = named["attention_mask"], named.get("input_ids")
    parts = [control.adapters[name].method.part for group in before.groups for name in group.names]
    how = attention_of(module)
    flat = layout(
        mask,
        causal=control.causal,
        by_row=len(before.groups) > 1 or reads_context(control, before),
        plain=not any(issubclass(part, AttentionPart) for part in parts),
        at_once=how == "blocks",
    )
    if flat is None:
        return base(**named)
    positions = named.get("position_ids")
    if positions is None:
        positions = module.__dict__[COUNTING].positions(ids, mask, mask.shape[1], mask.device)
    if "use_cache" in names_of(original_class(module)):
        named["use_cache"] = False
    control.call = replace(before, flat=flat)
    try:
        return run_laid(flat, original_class(module).__name__, base, named, positions, kernel=how == "kernel")
    finally:
        control.call = before


def attention_of(module: Any) -> str:
    """How a stack's attention learns where rows end: it gets them one by one ("rows"), or all at once ("blocks"), or is told ("kernel")."""
    name = str(module.config._attn_implementation)
    return "kernel" if name.startswith("flash_attention") else "blocks" if name.endswith("flex_attention") else "rows"


class Decoder(Mixin):
    """The decoder of an encoder-decoder: it sees the encoder's virtual positions."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = host_state(module)
        assert state is not None
        return outermost(
            state.control, module, state.path, lambda: _decode(module, state, base, args, kwargs), args, kwargs
        )


def _decode(module: nn.Module, state: HostState, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One call of the decoder."""
    encoded, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
    virtual = longest(state.control, state.current(), InputPart)
    if encoded is not None and virtual and (mask is None or mask.shape[-1] < encoded.shape[1]):
        real = encoded[:, : encoded.shape[1] - virtual if mask is None else mask.shape[-1]]
        batch = _batch(state, state.current(), real, {"attention_mask": mask})
        kwargs = {**kwargs, "encoder_attention_mask": _mask(module, mask, batch)}
    if not reads_context(state.control, state.current()):
        return base(*args, **kwargs)
    named = {**dict(zip(names_of(original_class(module)), args, strict=False)), **kwargs}
    with _telling(state.control, state.current(), named, in_decoder=True):
        return base(**named)


def reads_context(control: Control, call: Call) -> bool:
    """Whether a part that acts asks what the rows are about."""
    return any(control.adapters[name].method.part.reads_context for group in call.groups for name in group.names)


@contextmanager
def _telling(control: Control, call: Call, named: dict[str, Any], *, in_decoder: bool = False) -> Iterator[None]:
    """Inside the block the layers of a stack can tell which of their tokens are real and which came before."""
    before = control.call
    if reads_context(control, call):
        virtual = 0 if in_decoder else longest(control, call, InputPart)
        control.call = replace(before, tokens=tokens_of(named, virtual=virtual, in_decoder=in_decoder))
    try:
        yield
    finally:
        control.call = before


def lengths(control: Control, call: Call, kind: type) -> dict[tuple[str, ...], int]:
    """Virtual tokens of this kind for each group of adapters that has any."""
    found = {
        group.names: sum(
            control.adapters[name].virtual
            for name in group.names
            if issubclass(control.adapters[name].method.part, kind)
        )
        for group in call.groups
    }
    return {names: length for names, length in found.items() if length}


def longest(control: Control, call: Call, kind: type) -> int:
    """The most virtual tokens of this kind that any group of adapters has."""
    P = 0
    for length in lengths(control, call, kind).values():  # compiled code knows no max with a default
        P = length if length > P else P
    return P


def behinds(control: Control, call: Call) -> dict[tuple[str, ...], int]:
    """Virtual tokens behind the prompt for each group of adapters that has any."""
    found = {group.names: sum(control.adapters[name].behind for name in group.names) for group in call.groups}
    return {names: length for names, length in found.items() if length}


def per_row(
    state: HostState, call: Call, found: dict[tuple[str, ...], int], batch: int, device: torch.device
) -> Tensor:
    """(B,) the number found for each entry's group of adapters, 0 if there is none."""
    count_B = torch.zeros(batch, dtype=torch.int64, device=device)
    for group in call.groups:
        if group.rows is None:
            return count_B + found.get(group.names, 0)
        assert call.rows is not None
        count_B[entries_of(group.rows, batch, len(call.rows), state.path).to(device)] = found.get(group.names, 0)
    return count_B


def rows_at_hand(call: Call, group: Group, size: int, where: str, like: Tensor) -> tuple[Tensor | None, RowsAtHand]:
    """The entries of dimension 0 that carry a group's adapters (None for all), and what its parts may know of them."""
    entries = None
    if group.rows is not None:
        assert call.rows is not None
        entries = entries_of(group.rows, size, len(call.rows), where).to(like.device)
    count = size if entries is None else entries.shape[0]
    return entries, RowsAtHand(count=count, dtype=like.dtype, tasks=tasks_of(call.context, size, entries, where))


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What one call of the inner model is about.

    Attributes:
        size, tokens: B and T.
        past: entries of the cache, virtual ones counted; 0 in a first call.
        prompt: P, slots for virtual tokens in each row.
        own: (B,) virtual tokens that a row has; the slots before them are empty.
        even: no row has empty slots.
        trailing: empty slots are put at the end of the row.
        behind: (B,) how many of these, the last ones, stand behind the row's prompt.
        prefix: (B,) prefix slots of a row's attention.
        ends: (B,) the column at which a row's prompt ends; None if nothing stands behind it anywhere.
    """

    size: int
    tokens: int
    past: Any
    prompt: int
    device: torch.device
    own: Tensor
    behind: Tensor
    prefix: Tensor
    even: bool
    trailing: bool
    ends: Tensor | None = None

    @property
    def first(self) -> bool:
        """Whether the virtual tokens go in now, rather than lie in the cache."""
        return not bool(self.past > 0)

    def order(self, columns: int) -> Tensor | None:
        """(B, P + columns) which of the slots and columns, counted in this order, comes where in the row; None if just so."""
        if self.ends is None and not self.trailing:
            return None
        slot_P, column_K = (torch.arange(n, device=self.device) for n in (self.prompt, columns))
        key_BP = (slot_P * 0 - 1).expand(self.size, -1)
        if self.ends is not None:
            key_BP = torch.where(slot_P >= (self.prompt - self.behind)[:, None], 2 * self.ends[:, None] - 1, key_BP)
        if self.trailing:
            key_BP = torch.where(slot_P < (self.prompt - self.own)[:, None], 2 * columns, key_BP)
        return torch.argsort(torch.cat([key_BP, (2 * column_K).expand(self.size, -1)], 1), dim=1, stable=True)


def _batch(state: HostState, call: Call, tokens: Tensor, named: dict[str, Any]) -> _Batch:
    cached = named.get("past_key_values")
    size, device, behind = tokens.shape[0], tokens.device, behinds(state.control, call)
    own, P = lengths(state.control, call, InputPart), longest(state.control, call, InputPart)
    even = all(own.get(group.names, 0) == P for group in call.groups)
    batch = _Batch(
        size=size,
        tokens=tokens.shape[1],
        past=0 if cached is None else cached.get_seq_length(),
        prompt=P,
        device=device,
        own=per_row(state, call, own, size, device),
        behind=per_row(state, call, behind, size, device),
        prefix=per_row(state, call, lengths(state.control, call, AttentionPart), size, device),
        even=even,
        trailing=not even and not state.control.causal,
    )
    if batch.trailing and not batch.first:
        raise IngraftError(
            f"{state.path}: rows with different numbers of virtual tokens cannot be continued from a cache in this model; run them separately."
        )
    return replace(batch, ends=_ends(state, call, batch, named)) if behind else batch


def _ends(state: HostState, call: Call, batch: _Batch, named: dict[str, Any]) -> Tensor:
    """(B,) where each row's prompt ends: as told; else where the second text of a pair begins; else behind its last real token."""
    told = end_of_prompt(call.context, batch.size, state.path, batch.device)
    if told is not None:
        return told
    mask, types = named.get("attention_mask"), named.get("token_type_ids")
    if mask is None or mask.dim() != 2:
        return torch.full((batch.size,), batch.tokens, device=batch.device)
    if not batch.first and bool((mask.bool().diff(dim=1) & mask[:, :-1].bool()).any()):
        raise IngraftError(
            f"{state.path}: the mask has holes, and nobody told where the prompt ends, behind which virtual tokens stand. "
            "Tell it with `context(model, prompt=...)`."
        )
    ends_B = last_of(mask.expand(batch.size, -1))
    if types is None:
        return ends_B
    second_BT = types.expand(batch.size, -1) == 1
    return torch.where(second_BT.any(1), second_BT.int().argmax(1), ends_B)


def _with_virtual(inner: nn.Module, state: HostState, call: Call, base: Forward, named: dict[str, Any]) -> Any:
    tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
    if tokens is None and "position_ids" not in names_of(original_class(inner)):
        return base(**named)  # pictures: no positions to shift, and prompts were refused
    if tokens is None:
        raise IngraftError(f"{original_class(inner).__name__}: virtual tokens need input_ids or inputs_embeds.")
    batch = _batch(state, call, tokens, named)
    P = batch.prompt
    if not batch.even:
        _check_uneven(inner, state, call, base, batch)
    order = batch.order(batch.tokens) if batch.first else None
    if "position_ids" in names_of(original_class(inner)):
        named["position_ids"] = _arranged(_positions(inner, named, batch), order)
    if P:
        named["attention_mask"] = _mask(inner, named.get("attention_mask"), batch)
    if not P or not batch.first:
        return base(**named)
    real = named.pop("inputs_embeds", None)
    ids = named.pop("input_ids", None)
    real_BTD = inner.get_input_embeddings()(ids) if real is None else real  # type: ignore[operator]
    named["inputs_embeds"] = _arranged(torch.cat([_prompts(inner, state, call, batch, real_BTD), real_BTD], 1), order)
    if named.get("token_type_ids") is not None:
        types_BT = named["token_type_ids"]
        named["token_type_ids"] = _arranged(torch.cat([types_BT.new_zeros(batch.size, P), types_BT], 1), order)
    told = state.control.call.tokens
    if told is not None and order is not None:
        state.control.call = replace(state.control.call, tokens=replace(told, virtual=order < P))
    output = base(**named)
    if getattr(getattr(inner, "config", None), "is_encoder_decoder", False):
        return output
    keep = state.control.keep_virtual
    if order is not None:
        place = _places(batch, order, causal=state.control.causal, keep=keep)
        return each(output, lambda x: _arranged(x, place))
    return output if keep else each(output, lambda x: x[:, P:])


def _check_uneven(inner: nn.Module, state: HostState, call: Call, base: Forward, batch: _Batch) -> None:
    """Refuse rows of different lengths where the model cannot serve each as it would be served alone."""
    what, none = original_class(inner).__name__, len(lengths(state.control, call, InputPart)) < len(call.groups)
    if none and not inner.__dict__[COUNTING].alike:
        raise IngraftError(
            f"{what} makes something else of embeddings than of tokens, so that rows without virtual tokens beside rows with some would not be "
            "the base's. Run them separately."
        )
    if not leaves_slots_alone(inner, base, state.control, trailing=batch.trailing):
        raise IngraftError(
            f"{what} does not leave masked positions out everywhere, so that rows with different numbers of virtual tokens would change each other "
            "in one batch. Run them separately."
        )


def _arranged(x: Tensor, order: Tensor | None) -> Tensor:
    """The entries of dimension 1 in each row's own order."""
    if order is None:
        return x
    return x.gather(1, order.view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:]))


def _places(batch: _Batch, order: Tensor, *, causal: bool, keep: bool) -> Tensor:
    """(B, T) where each real token lies; (B, P + T) with the slots in front where they are kept. In a causal model the last token of a prompt answers from the last virtual token behind it, which is
    the one that the answer follows."""
    place_BX = torch.argsort(order, dim=1)
    place_BT = place_BX[:, batch.prompt :]
    if causal and batch.ends is not None:
        last_BT = torch.arange(batch.tokens, device=batch.device) == batch.ends[:, None] - 1
        final_B1 = place_BX[:, batch.prompt - 1 : batch.prompt]
        place_BT = torch.where(last_BT & (batch.behind > 0)[:, None], final_B1, place_BT)
    return torch.cat([place_BX[:, : batch.prompt], place_BT], 1) if keep else place_BT


def _prompts(inner: nn.Module, state: HostState, call: Call, batch: _Batch, like: Tensor) -> Tensor:
    """(B, P, D) each row's virtual embeddings in its last slots; those that stand behind the prompt last."""
    pieces: list[Tensor] = []
    order: list[Tensor] = []
    for group in call.groups:
        parts = {name: part for name in group.names if isinstance(part := part_of(inner, name), InputPart)}
        entries, rows = rows_at_hand(call, group, batch.size, state.path, like)
        with present(*parts.values()):
            made = [part.embeddings(state.control.shared_of(name), rows) for name, part in parts.items()]
        front: list[Tensor] = []
        behind: list[Tensor] = []
        for x, part in zip(made, parts.values(), strict=True):
            x_BPD = x.expand(rows.count, -1, -1)
            front.append(x_BPD[:, : part.length - part.behind])
            behind.append(x_BPD[:, part.length - part.behind :])
        own_BPD = torch.cat([*front, *behind], 1) if made else like.new_zeros(rows.count, 0, like.shape[2])
        full_BPD = nn.functional.pad(own_BPD.to(like.dtype), (0, 0, batch.prompt - own_BPD.shape[1], 0))
        if entries is None:
            return full_BPD
        pieces.append(full_BPD)
        order.append(entries)
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(order)))


def _positions(inner: nn.Module, named: dict[str, Any], batch: _Batch) -> Tensor:
    """(B, [P+]T) positions of the slots and of the real tokens, the row's virtual tokens counted."""
    given, counting = named.get("position_ids"), inner.__dict__[COUNTING]
    if given is None:
        ids, mask = named.get("input_ids"), named.get("attention_mask")
        given = counting.positions(ids, mask, batch.tokens, batch.device)
        if not batch.first and (counting.over != "mask" or mask is None or mask.dim() != 2):
            given = given + batch.past - batch.prompt
    given = given.expand(batch.size, -1)
    front_B = (batch.own - batch.behind + batch.prefix)[:, None]
    if not batch.prompt or not batch.first:
        return given + front_B + batch.behind[:, None]
    slot_P = torch.arange(batch.prompt, device=batch.device)
    start = counting.start
    virtual_BP = (slot_P - (batch.prompt - batch.own[:, None])).clamp(min=0) + batch.prefix[:, None] + start
    if batch.ends is None:
        return torch.cat([virtual_BP, given + front_B], 1)
    ends_B = batch.ends[:, None]
    before_B = torch.where(ends_B > 0, given.gather(1, (ends_B - 1).clamp(min=0)) + 1, start)
    slot_BP = slot_P - (batch.prompt - batch.behind[:, None])
    virtual_BP = torch.where(slot_BP >= 0, before_B + front_B + slot_BP, virtual_BP)
    answer_BT = torch.arange(batch.tokens, device=batch.device) >= ends_B
    return torch.cat([virtual_BP, given + front_B + answer_BT * batch.behind[:, None]], 1)


def _mask(inner: nn.Module, mask: Tensor | None, batch: _Batch) -> Tensor | None:
    """The mask with the virtual tokens in their places; None where all rows see everything."""
    if mask is None:
        if batch.even:
            return None
        mask = torch.ones(
            batch.size, batch.tokens + max(int(batch.past) - batch.prompt, 0), dtype=torch.int64, device=batch.device
        )
    if mask.dim() != 2:
        raise IngraftError(
            f"{original_class(inner).__name__}: with virtual tokens the attention mask must be (batch, tokens), got shape {tuple(mask.shape)}."
        )
    seen_BP = torch.arange(batch.prompt, device=batch.device) >= (batch.prompt - batch.own[:, None])
    return _arranged(torch.cat([seen_BP.to(mask.dtype), mask], 1), batch.order(mask.shape[1]))
