"""How a model counts positions where it is told none, found by asking it.

Virtual tokens stand in front of the real ones, which move on by their number, so what the model would have counted must be known: over columns
(most), from behind a padding index and over tokens that are not padding (RoBERTa, MPNet), or over what the mask shows (OPT). Families write that
in functions of a module, static methods, tables or in the forward itself; so nothing is read, the model is run up to its first layer instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten_with_path

from ingraft.adapt.control import Control
from ingraft.adapt.rows import Call
from ingraft.adapt.swap import Forward, original_class

_NAMES: dict[type[nn.Module], tuple[str, ...]] = {}
"""What `names_of` has found; a plain dictionary, because compiled code can look into one and cannot run `inspect`."""


def names_of(cls: type[nn.Module]) -> tuple[str, ...]:
    """Parameter names of a class's forward, `self` left out."""
    if cls not in _NAMES:
        _NAMES[cls] = tuple(inspect.signature(cls.forward).parameters)[1:]
    return _NAMES[cls]


@dataclass(frozen=True)
class Counting:
    """How a model counts positions where it is told none: from `start`, over all columns, over all tokens but the padding `start - 1` (ids), or
    over those that the mask shows."""

    over: str
    start: int
    alike: bool = True
    """Whether the model makes the same of embeddings as of the tokens they belong to."""

    def positions(self, ids: Tensor | None, mask: Tensor | None, T: int, device: torch.device) -> Tensor:
        """(1 or B, T) of the last T columns."""
        if self.over == "mask" and mask is not None and mask.dim() == 2:
            shown = mask.long()
            return (shown.cumsum(1) * shown)[:, -T:] + self.start - 1
        if self.over == "ids" and ids is not None:
            real = ids.ne(self.start - 1).long()
            return real.cumsum(1) * real + self.start - 1
        return torch.arange(T, device=device)[None] + self.start


COUNTING = "_ingraft_counting"
"""Where an inner model with virtual tokens remembers how it counts."""


class _Reached(Exception):
    """A stack of layers is about to run."""


def counting_of(inner: Any, control: Control | None) -> Counting | None:
    """How a model counts positions, found by asking it: a row behind padding is led up to the first layer, told no positions, and told each of
    the ways, until one makes no difference. None if all do. A model that cannot be asked (no weights yet) is taken to count columns."""
    if COUNTING in inner.__dict__:
        return inner.__dict__[COUNTING]
    if "position_ids" not in names_of(original_class(inner)):
        return Counting("column", 0)
    known = (getattr(getattr(inner, "embeddings", None), "padding_idx", 0), getattr(inner.config, "pad_token_id", 0))
    paddings = sorted({p for p in known if isinstance(p, int) and 0 <= p < 16}) or [0]
    ways = [Counting("column", s) for s in sorted({0, 1, 2, *(p + 1 for p in paddings)})]
    ways += [*(Counting("ids", p + 1) for p in paddings), Counting("mask", 0)]
    weight = inner.get_input_embeddings().weight
    device = torch.device("cpu") if weight.is_meta else weight.device
    real = [n for n in range(9) if n not in paddings][-2:]
    k = next(k for k in range(2, 9) if len({int(x[0, -2]) for x in _told(ways, paddings, k, real)[2]}) == len(ways))
    ids, mask, told = _told(ways, paddings, k, real, device)  # so much padding that no two ways agree
    T = ids.shape[1]
    with alone(inner, control):
        plain = _led_up(inner, T, input_ids=ids, attention_mask=mask)
        if plain is None:
            return ways[0]
        for way, positions in zip(ways, told, strict=True):
            found = _led_up(inner, T, input_ids=ids, attention_mask=mask, position_ids=positions)
            if _same(plain, found):
                embedded = inner.get_input_embeddings()(ids)
                found = _led_up(inner, T, inputs_embeds=embedded, attention_mask=mask, position_ids=positions)
                return replace(way, alike=_same(plain, found))
    return None


UNEVEN = "_ingraft_uneven"
"""Where an inner model remembers whether it leaves masked slots alone."""


def leaves_slots_alone(inner: Any, base: Forward, control: Control, *, trailing: bool) -> bool:
    """Whether tokens come out as they do without masked slots beside them, found by trying it once: a mask may be taken and never looked at
    (recurrent models), or not go everywhere (pooling between layers, landmarks). A model that cannot be tried is believed."""
    if UNEVEN in inner.__dict__ or torch.compiler.is_compiling():
        return inner.__dict__.get(UNEVEN, True)
    T, P = 8, 3
    found: list[Tensor] = []
    with alone(inner, control):
        x_BTD = inner.get_input_embeddings()(torch.arange(T, device=inner.get_input_embeddings().weight.device)[None])
        for slots in (0, P):
            shown = torch.ones(1, T + slots, dtype=torch.int64, device=x_BTD.device)
            shown[:, T if trailing else 0 :][:, :slots] = 0
            named = {"inputs_embeds": x_BTD.new_ones(1, T + slots, x_BTD.shape[2]), "attention_mask": shown}
            named["inputs_embeds"][shown.bool()] = x_BTD[0]
            if "position_ids" in names_of(original_class(inner)):
                named["position_ids"] = (shown.cumsum(1) - 1).clamp(min=0) + inner.__dict__[COUNTING].start
            try:
                output = base(**named)
            except Exception:  # it asks for more than tokens
                return True
            found.append(output[0][shown.bool()])
    plain, beside = found
    inner.__dict__[UNEVEN] = bool(
        (plain - beside).abs().max() <= torch.finfo(plain.dtype).eps ** 0.5 * plain.abs().max()
    )
    return inner.__dict__[UNEVEN]


def _told(
    ways: list[Counting], paddings: list[int], k: int, real: list[int], device: torch.device | None = None
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """A row of real tokens behind k of each padding, its mask, and the positions that each way gives it."""
    ids = torch.tensor([[p for p in paddings for _ in range(k)] + real], device=device)
    T = ids.shape[1]
    mask = (torch.arange(T, device=device) >= T - len(real)).long()[None]
    return ids, mask, [way.positions(ids, mask, T, ids.device) for way in ways]


def _same(one: dict[str, Tensor], other: dict[str, Tensor] | None) -> bool:
    return other is not None and all(torch.equal(other[key], x) for key, x in one.items() if key in other)


def _led_up(inner: nn.Module, T: int, **named: Tensor) -> dict[str, Tensor] | None:
    """What the first layer would be given for the last two of T tokens, by place; None if the model cannot run."""
    seen: dict[str, Tensor] = {}

    def stop(_: nn.Module, *given: Any) -> None:
        for path, x in tree_flatten_with_path(given)[0]:
            if isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[1] >= T:
                seen[str(path)] = x[:, T - 2 : T]
        raise _Reached

    stacks = [module for module in inner.modules() if isinstance(module, nn.ModuleList) and len(module)]
    handles = [stack[0].register_forward_pre_hook(stop, with_kwargs=True) for stack in stacks]
    try:
        inner(**named)
    except _Reached:
        return seen
    except Exception:  # whatever a model raises that has no weights, or asks for more than tokens
        return None
    finally:
        for handle in handles:
            handle.remove()
    return seen


@contextmanager
def alone(inner: nn.Module, control: Control | None) -> Iterator[None]:
    """Inside the block no adapter acts, nothing is dropped or packed and no gradients are kept."""
    training, before = [module for module in inner.modules() if module.training], None
    if control is not None:
        before = control.call, control.running, control.packing
        control.call, control.running, control.packing = Call(step=control.call.step), True, False
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if control is not None and before is not None:
            control.call, control.running, control.packing = before
