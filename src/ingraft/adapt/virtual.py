"""Virtual tokens at the input of transformers models: prompts in front, and the positions of the real tokens behind prompts and prefixes.

The place is the *inner* model, the one that embeds tokens and works out masks and positions. Its class is swapped; on the way in, virtual
embeddings are put in front and positions move on; on the way out, the virtual positions are cut off again. Heads, losses and pooling by
position then see real tokens only and need no change, and labels none either.

With a cache, the first call puts the virtual tokens into it (they are ordinary entries of this layer stack) and later calls only account for
them: `past` counts them, positions and the mask go on behind them. `generate` makes room for them in a static cache (`hf.ModelRoot`).

Rows may have prompts of different lengths, or none: shorter ones are filled up on the left with masked slots. In an encoder-decoder the
prompt goes in front of the encoder's input and stays in its output, for the decoder to attend to.

Legend: B batch, T tokens, P longest prompt, D width.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.context import tasks_of, tokens_of
from ingraft.adapt.control import Control, HostState, host_state, part_of
from ingraft.adapt.offload import present
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
        call = state.current()
        state.ran = True
        virtual = bool(lengths(state.control, call, InputPart) or lengths(state.control, call, AttentionPart))
        if not virtual and not reads_context(state.control, call):
            return base(*args, **kwargs)
        named = {**dict(zip(names_of(original_class(module)), args, strict=False)), **kwargs}
        with _telling(state.control, call, named):
            return _with_virtual(module, state, call, base, named) if virtual else base(**named)


class Decoder(Mixin):
    """The decoder of an encoder-decoder: it sees the encoder's virtual positions."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = host_state(module)
        encoded, mask = kwargs.get("encoder_hidden_states"), kwargs.get("encoder_attention_mask")
        if state is not None and encoded is not None and mask is not None and mask.shape[-1] < encoded.shape[1]:
            lacking = encoded.shape[1] - mask.shape[-1]
            prompt_B = per_row(state, state.current(), InputPart, encoded.shape[0], encoded.device)
            seen = torch.arange(lacking, device=mask.device) >= (lacking - prompt_B[:, None])
            kwargs = {**kwargs, "encoder_attention_mask": torch.cat([seen.to(mask.dtype), mask], -1)}
        if state is None or not reads_context(state.control, state.current()):
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


def per_row(state: HostState, call: Call, kind: type, batch: int, device: torch.device) -> Tensor:
    """(B,) virtual tokens of this kind that each entry of the batch has."""
    found = lengths(state.control, call, kind)
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


_NAMES: dict[type[nn.Module], tuple[str, ...]] = {}
"""What `names_of` has found; a plain dictionary, because compiled code can look into one and cannot run `inspect`."""


def names_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Parameter names of a class's forward, `self` left out."""
    if cls not in _NAMES:
        _NAMES[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _NAMES[cls]


@dataclass(frozen=True, kw_only=True)
class _Batch:
    """What one call of the inner model is about."""

    size: int
    tokens: int
    past: Any
    prompt: int
    device: torch.device


def _with_virtual(inner: nn.Module, state: HostState, call: Call, base: Forward, named: dict[str, Any]) -> Any:
    tokens = named.get("input_ids") if named.get("input_ids") is not None else named.get("inputs_embeds")
    if tokens is None and "position_ids" not in names_of(original_class(inner)):
        return base(**named)  # pictures: no positions to shift, and prompts were refused
    if tokens is None:
        raise IngraftError(f"{original_class(inner).__name__}: virtual tokens need input_ids or inputs_embeds.")
    cached = named.get("past_key_values")
    past = 0 if cached is None else cached.get_seq_length()
    P = longest(state.control, call, InputPart)
    batch = _Batch(size=tokens.shape[0], tokens=tokens.shape[1], past=past, prompt=P, device=tokens.device)
    prompt_B = per_row(state, call, InputPart, batch.size, batch.device)
    prefix_B = per_row(state, call, AttentionPart, batch.size, batch.device)
    first = not bool(past > 0)
    if "position_ids" in names_of(original_class(inner)):
        named["position_ids"] = _positions(inner, named, batch, prompt_B, prefix_B, first)
    if P:
        named["attention_mask"] = _mask(inner, named.get("attention_mask"), batch, prompt_B)
    if not P or not first:
        return base(**named)
    real = named.pop("inputs_embeds", None)
    ids = named.pop("input_ids", None)
    real_BTD = inner.get_input_embeddings()(ids) if real is None else real  # type: ignore[operator]
    named["inputs_embeds"] = torch.cat([_prompts(inner, state, call, batch, real_BTD), real_BTD], 1)
    if named.get("token_type_ids") is not None:
        named["token_type_ids"] = torch.cat(
            [named["token_type_ids"].new_zeros(batch.size, P), named["token_type_ids"]], 1
        )
    output = base(**named)
    keep = state.control.keep_virtual or getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    return output if keep else _cut(output, P)


def _prompts(inner: nn.Module, state: HostState, call: Call, batch: _Batch, like: Tensor) -> Tensor:
    """(B, P, D) each row's virtual embeddings, filled up on the left."""
    pieces: list[Tensor] = []
    order: list[Tensor] = []
    for group in call.groups:
        parts = {name: part for name in group.names if isinstance(part := part_of(inner, name), InputPart)}
        entries, rows = rows_at_hand(call, group, batch.size, state.path, like)
        with present(*parts.values()):
            made = [part.embeddings(state.control.shared_of(name), rows) for name, part in parts.items()]
        own = [x.expand(rows.count, -1, -1) for x in made]
        own_BPD = torch.cat(own, 1) if own else like.new_zeros(rows.count, 0, like.shape[2])
        full_BPD = nn.functional.pad(own_BPD.to(like.dtype), (0, 0, batch.prompt - own_BPD.shape[1], 0))
        if entries is None:
            return full_BPD
        pieces.append(full_BPD)
        order.append(entries)
    return torch.cat(pieces).index_select(0, torch.argsort(torch.cat(order)))


def _positions(
    inner: nn.Module, named: dict[str, Any], batch: _Batch, prompt_B: Tensor, prefix_B: Tensor, first: bool
) -> Tensor:
    """(B, [P+]T) positions, the row's virtual tokens counted."""
    given = named.get("position_ids")
    if given is None:
        behind = batch.past - batch.prompt if not first else 0
        given = _default_positions(inner, named, batch) + behind
    real_BT = given.expand(batch.size, -1) + (prompt_B + prefix_B)[:, None]
    if not batch.prompt or not first:
        return real_BT
    slot_P = torch.arange(batch.prompt, device=batch.device)
    virtual_BP = (slot_P - (batch.prompt - prompt_B[:, None])).clamp(min=0) + prefix_B[:, None]
    return torch.cat([virtual_BP, real_BT], 1)


def _default_positions(inner: nn.Module, named: dict[str, Any], batch: _Batch) -> Tensor:
    """(1 or B, T) the positions the model would work out itself for a first call."""
    embeddings = getattr(inner, "embeddings", None)
    from_ids = getattr(embeddings, "create_position_ids_from_input_ids", None)
    if (
        embeddings is not None and from_ids is not None and named.get("input_ids") is not None
    ):  # RoBERTa counts from its padding index
        return from_ids(named["input_ids"], embeddings.padding_idx)
    return torch.arange(batch.tokens, device=batch.device)[None]


def _mask(inner: nn.Module, mask: Tensor | None, batch: _Batch, prompt_B: Tensor) -> Tensor | None:
    """The mask with the virtual tokens in front; None where all rows see everything."""
    even = bool((prompt_B == batch.prompt).all())
    if mask is None:
        if even:
            return None
        mask = torch.ones(
            batch.size, batch.tokens + max(int(batch.past) - batch.prompt, 0), dtype=torch.int64, device=batch.device
        )
    if mask.dim() != 2:
        raise IngraftError(
            f"{original_class(inner).__name__}: with virtual tokens the attention mask must be (batch, tokens), got shape {tuple(mask.shape)}."
        )
    seen_BP = torch.arange(batch.prompt, device=batch.device) >= (batch.prompt - prompt_B[:, None])
    return torch.cat([seen_BP.to(mask.dtype), mask], 1)


def _cut(output: Any, P: int) -> Any:
    """The output without its virtual positions."""
    if type(output) is tuple:
        return (output[0][:, P:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, P:]
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(layer[:, P:] for layer in output.hidden_states)
    return output
