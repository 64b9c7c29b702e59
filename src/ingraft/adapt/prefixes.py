"""Learned keys and values in the attention of transformers models.

Prefix tuning has always been written through the KV cache: fill it with the learned keys and values, then pretend they were tokens. That
needs code for each family, breaks static caches, and clashes with gradient checkpointing. Here the prefix joins in where the attention is
computed: transformers looks its attention function up in a registry by the config's name, so two names of ours are registered
("ingraft_sdpa", "ingraft_eager"), each with its *mask* function, because a name without one gets no mask at all. The cache then holds real
tokens only, whatever its kind.

* Several queries (training, prefill): keys and values are put behind the prefix and the base's own attention function runs. The mask is
  always explicit: `is_causal` would count the prefix as tokens.
* One query (a decode step): putting prefix and cache together would copy the cache at every step, so only the *scores* are put together:
  softmax([q K_p'; q K']) and two products.

A gated part stands beside: its keys get a softmax of their own, and what comes of it is added to the attention's own result.

Real tokens stand at positions P, P+1, ... (P = the row's own prefix length), as they would behind a filled cache; `virtual.py` shifts them.
T5's relative bias knows no position for a prefix: its slots get no bias.

Where rows lie end to end (`flat.py`), the same names give each row its attention by itself, and a third one stands for flex attention.

Legend: B batch, H key-value heads, G queries a key-value head, Q queries, K keys, P prefix length, D head width, n rows.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, flex_attention_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ingraft.adapt.control import HOST_ATTRIBUTE, Control, HostState, host_state, part_of, release
from ingraft.adapt.flat import refuse_laid, row_mask
from ingraft.adapt.offload import present
from ingraft.adapt.swap import original_class
from ingraft.adapt.virtual import rows_at_hand
from ingraft.adapt.walk import walked
from ingraft.errors import IngraftError
from ingraft.methods.contract import AttentionPart, GatedPart, RowsAtHand

Output = tuple[Tensor, Tensor | None]
OURS = {"sdpa": "ingraft_sdpa", "eager": "ingraft_eager"}
"""transformers' attention implementations that a prefix works with, and the names under which it joins them."""
NAMES = {**OURS, "flex_attention": "ingraft_flex_attention"}
"""Those that rows laid end to end need."""


def register() -> None:
    """Enter our names in transformers' two registries. Repeating it changes nothing."""
    if OURS["sdpa"] not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(OURS["sdpa"], _sdpa)
        ALL_ATTENTION_FUNCTIONS.register(OURS["eager"], _eager)
        ALL_ATTENTION_FUNCTIONS.register(NAMES["flex_attention"], _flex)
        ALL_MASK_ATTENTION_FUNCTIONS.register(OURS["sdpa"], _sdpa_mask)
        ALL_MASK_ATTENTION_FUNCTIONS.register(OURS["eager"], _eager_mask)
        ALL_MASK_ATTENTION_FUNCTIONS.register(NAMES["flex_attention"], _flex_mask)


def configs(model: nn.Module) -> list[Any]:
    """Every config object in the model, once; T5's stacks have copies of their own."""
    found = {
        id(config): config
        for module in walked(model).modules.values()
        if hasattr(config := getattr(module, "config", None), "_attn_implementation")
    }
    return list(found.values())


def implementation(model: nn.Module) -> str:
    """The name of the model's attention in the registry."""
    config: Any = model.config
    return str(config._attn_implementation)


def name_attention(model: nn.Module, control: Control, wanted: bool) -> None:
    """Switch the configs to our names in the attention registry, or back."""
    if wanted and "attention" not in control.restore:
        register()
        control.restore["attention"] = implementation(model)
        name = NAMES.get(implementation(model), implementation(model))
    elif not wanted and "attention" in control.restore:
        name = control.restore.pop("attention")
    else:
        return
    for config in configs(model):
        config._attn_implementation = name


LAID = "_ingraft_laid"
"""Marks an attention that needs a host state while rows are laid end to end, whatever lies in it."""


def know_attention(attentions: Mapping[str, nn.Module], control: Control, wanted: bool) -> None:
    """Let each attention know the call that runs, also when it is run again in backward; or put it back."""
    control.restore.pop(LAID, None)
    if wanted:
        control.restore[LAID] = True
    for path, module in attentions.items():
        state = host_state(module)
        if wanted:
            if state is None:
                state = HostState(control=control, path=path, kind=None, known_forward=False)
            module.__dict__.update({HOST_ATTRIBUTE: state, LAID: True})
        elif module.__dict__.pop(LAID, False):
            release(module)


def uses_registry(module: nn.Module) -> bool:
    """Whether an attention module finds its function in the registry: its file imports it and its config names the choice."""
    source = sys.modules.get(original_class(module).__module__)
    has_name = isinstance(getattr(getattr(module, "config", None), "_attn_implementation", None), str)
    return has_name and vars(source).get("ALL_ATTENTION_FUNCTIONS") is ALL_ATTENTION_FUNCTIONS


def _sdpa_mask(**kwargs: Any) -> Tensor | None:
    """transformers' own mask, never skipped in favour of `is_causal` where a prefix may join."""
    return row_mask(sdpa_mask, skips=False, **kwargs)


def _eager_mask(**kwargs: Any) -> Tensor:
    return row_mask(eager_mask, **kwargs)


def _flex_mask(**kwargs: Any) -> Any:
    return row_mask(flex_attention_mask, **kwargs)


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Output:
    return _attend(sdpa_attention_forward, module, query, key, value, attention_mask, kwargs)


def _eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> Output:
    """Every modeling file has its own eager function (soft caps, sinks); this finds the module's."""
    own = vars(sys.modules[original_class(module).__module__])["eager_attention_forward"]
    return _attend(own, module, query, key, value, attention_mask, kwargs)


def _flex(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Output:
    return _attend(ALL_ATTENTION_FUNCTIONS["flex_attention"], module, query, key, value, attention_mask, kwargs)


def _attend(
    base: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> Output:
    state = host_state(module)
    if state is None:
        refuse_laid(original_class(module).__name__, query)
        return base(module, query, key, value, mask, **kwargs)
    flat = state.current().flat
    if flat is not None and flat.holds(query.transpose(1, 2)):
        of_rows = functools.partial(base, module) if flat.plain else functools.partial(_of_rows, base, module, state)
        return flat.attend(of_rows, query, key, value, mask, kwargs)
    return _of_rows(base, module, state, query, key, value, mask, **kwargs)


def _of_rows(
    base: Callable[..., Output],
    module: nn.Module,
    state: HostState,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    **kwargs: Any,
) -> Output:
    """Attention with what joins it, dimension 0 being rows."""
    prefix = _prefix(module, state, query.shape[0], key)
    output, weights = (
        base(module, query, key, value, mask, **kwargs)
        if prefix is None
        else _behind(base, module, query, key, value, mask, prefix, kwargs)
    )
    added = _gated(module, state, query, key, kwargs.get("scaling"))
    return (output if added is None else output + added), weights


def _behind(
    base: Callable[..., Output],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    prefix: tuple[Tensor, Tensor, Tensor | None],
    kwargs: dict[str, Any],
) -> Output:
    """Attention to a prefix and to what stands behind it."""
    key_BHPD, value_BHPD, seen_BP = prefix
    if (
        query.shape[2] == 1
        and not kwargs.get("dropout")
        and not any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias"))
    ):
        return _one_query(query, key, value, mask, key_BHPD, value_BHPD, seen_BP, kwargs.get("scaling")), None
    if kwargs.get("position_bias") is not None:
        kwargs = {**kwargs, "position_bias": F.pad(kwargs["position_bias"], (key_BHPD.shape[2], 0))}
    mask = _widened(module, query, key, mask, seen_BP, key_BHPD.shape[2])
    return base(module, query, torch.cat([key_BHPD, key], 2), torch.cat([value_BHPD, value], 2), mask, **kwargs)


def _prefix(
    module: nn.Module, state: HostState, batch: int, like: Tensor
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """Keys and values (B, H, P, D) of the acting prefixes, and which of their slots each entry sees (B, P), None for all."""
    call, control = state.current(), state.control
    state.ran = True

    def of(names: tuple[str, ...], rows: RowsAtHand) -> tuple[Tensor, Tensor] | None:
        parts = _parts(module, names, gated=False)
        with present(*(part for _, part in parts)):
            pairs = [part.keys_values(control.shared_of(name), rows) for name, part in parts]
        if not pairs:
            return None
        keys, values = (
            [side.to(like.dtype).expand(rows.count, *side.shape[-3:]) for side in sides]
            for sides in zip(*pairs, strict=True)
        )
        return (keys[0], values[0]) if len(pairs) == 1 else (torch.cat(keys, 2), torch.cat(values, 2))

    served = [rows_at_hand(call, group, batch, state.path, like) for group in call.groups]
    groups = [
        (of(group.names, rows), entries, rows) for group, (entries, rows) in zip(call.groups, served, strict=True)
    ]
    found = [pair for pair, _, _ in groups if pair is not None]
    if not found:
        return None
    if len(groups) == 1:
        return (*found[0], None)
    longest = max(k.shape[2] for k, _ in found)
    H, D = found[0][0].shape[1], found[0][0].shape[3]
    order: list[Tensor] = []
    keys: list[Tensor] = []
    values: list[Tensor] = []
    seen: list[Tensor] = []
    for pair, entries, rows in groups:
        assert entries is not None
        blank_BHPD = like.new_zeros(rows.count, H, 0, D)
        key_BHPD, value_BHPD = pair if pair is not None else (blank_BHPD, blank_BHPD)
        blank = longest - key_BHPD.shape[2]
        keys.append(F.pad(key_BHPD, (0, 0, blank, 0)))
        values.append(F.pad(value_BHPD, (0, 0, blank, 0)))
        seen.append((torch.arange(longest, device=like.device) >= blank).expand(rows.count, longest))
        order.append(entries)
    inverse = torch.argsort(torch.cat(order))
    key_BHPD, value_BHPD, seen_BP = (torch.cat(pieces).index_select(0, inverse) for pieces in (keys, values, seen))
    return key_BHPD, value_BHPD, seen_BP


def _parts(module: nn.Module, names: tuple[str, ...], *, gated: bool) -> list[tuple[str, AttentionPart]]:
    """The parts of these adapters of one of the two kinds."""
    found = [(name, part) for name in names if isinstance(part := part_of(module, name), AttentionPart)]
    return [(name, part) for name, part in found if isinstance(part, GatedPart) == gated]


def _gated(module: nn.Module, state: HostState, query: Tensor, like: Tensor, scaling: float | None) -> Tensor | None:
    """(B, Q, heads, D) what the gated parts add to the attention; None if none acts."""
    call, control = state.current(), state.control
    total: Tensor | None = None
    B, heads, Q, D = query.shape
    H = like.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    for group in call.groups:
        parts = _parts(module, group.names, gated=True)
        if not parts:
            continue
        entries, rows = rows_at_hand(call, group, B, state.path, like)
        rows = replace(rows, project=functools.partial(_projected, module, state, like))
        own = query if entries is None else query.index_select(0, entries)
        own_BHXD = own.reshape(own.shape[0], H, heads // H * Q, D)  # X: the queries of all heads that share a key head
        for name, part in parts:
            assert isinstance(part, GatedPart)
            with present(part):
                key_HPD, value_HPD = part.keys_values(control.shared_of(name), rows)
                gate = part.gate().to(like.dtype).view(-1, 1, 1)
            scores = (own_BHXD @ key_HPD.to(like.dtype).transpose(-1, -2)).float() * scale
            added = (torch.softmax(scores, -1).to(like.dtype) @ value_HPD.to(like.dtype)).reshape(own.shape)
            added = (added * gate).transpose(1, 2)
            if entries is not None:
                added = added.new_zeros(B, Q, heads, D).index_copy(0, entries, added)
            total = added if total is None else total + added
    return total


def _projected(module: nn.Module, state: HostState, like: Tensor, x_PC: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values (H, P, D) by the attention's own projections, whatever is grafted onto these."""
    H, P, D = like.shape[1], x_PC.shape[0], like.shape[3]
    layers = [module.get_submodule(name) for name in state.projections]
    with present(*layers):
        made = [original_class(layer).forward(layer, x_PC.to(like.dtype)) for layer in layers]
    key, value = (made[0][:, -2 * H * D : -H * D], made[0][:, -H * D :]) if len(made) == 1 else made
    return key.reshape(P, H, D).transpose(0, 1), value.reshape(P, H, D).transpose(0, 1)


def _widened(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, seen_BP: Tensor | None, P: int
) -> Tensor | None:
    """The mask with a column for each prefix slot, in the form (bool or additive) it came in."""
    Q, K = query.shape[2], key.shape[2]
    if mask is None:
        if getattr(module, "is_causal", False) and Q > 1:
            mask = torch.ones(Q, K, dtype=torch.bool, device=query.device).tril(K - Q)[None, None]
        elif seen_BP is None:
            return None
        else:
            mask = torch.ones(1, 1, Q, K, dtype=torch.bool, device=query.device)
        if module.config._attn_implementation == OURS["eager"]:  # type: ignore[union-attr]
            mask = _additive(mask, query.dtype)
    if mask.dim() != 4:
        raise IngraftError(
            f"{original_class(module).__name__}: a prefix needs a four-dimensional attention mask, got shape {tuple(mask.shape)}."
        )
    seen = torch.ones(1, P, dtype=torch.bool, device=query.device) if seen_BP is None else seen_BP
    columns = seen[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1)
    if mask.dtype != torch.bool:
        columns = _additive(columns, mask.dtype)
    batch = max(columns.shape[0], mask.shape[0])
    return torch.cat([columns.expand(batch, -1, -1, -1), mask.expand(batch, -1, -1, -1)], -1)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def _one_query(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    key_BHPD: Tensor,
    value_BHPD: Tensor,
    seen_BP: Tensor | None,
    scaling: float | None,
) -> Tensor:
    """A decode step: one softmax over prefix and cache without putting the two together. Returns (B, 1, heads, D)."""
    B, heads, _, D = query.shape
    H = key.shape[1]
    scale = D**-0.5 if scaling is None else scaling
    query_BHGD = query.reshape(B, H, heads // H, D)
    scores = (query_BHGD @ key.transpose(-1, -2)).float() * scale
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        scores = (
            scores.masked_fill(~mask, torch.finfo(torch.float32).min)
            if mask.dtype == torch.bool
            else scores + mask.float()
        )
    prefix_scores = (query_BHGD @ key_BHPD.transpose(-1, -2)).float() * scale
    if seen_BP is not None:
        prefix_scores = prefix_scores.masked_fill(~seen_BP[:, None, None, :], torch.finfo(torch.float32).min)
    weights = torch.softmax(torch.cat([prefix_scores, scores], -1), -1).to(value.dtype)
    P = key_BHPD.shape[2]
    out_BHGD = weights[..., :P] @ value_BHPD + weights[..., P:] @ value
    return out_BHGD.reshape(B, heads, 1, D).transpose(1, 2).contiguous()
