"""What a part may ask of the place it sits in, bound to one host, one call and the rows at hand."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ingraft.adapt.compose import composed, own_parameters
from ingraft.adapt.context import Tokens, prompt_of, tasks_of
from ingraft.adapt.control import HostState, part_of
from ingraft.adapt.dropout import dropout, dropped_product
from ingraft.adapt.offload import present
from ingraft.adapt.products import plus_product
from ingraft.adapt.rows import Call, row_keys
from ingraft.adapt.swap import Forward
from ingraft.adapt.weights import Kind
from ingraft.errors import IngraftError
from ingraft.methods.contract import ParameterPart, Part, Site, WeightPart, addition


class LayerSite(Site):
    """What a part may ask, bound to one host, one call and the rows at hand."""

    def __init__(
        self,
        host: nn.Module,
        state: HostState,
        call: Call,
        below: Sequence[Part],
        part: Part,
        entries: Tensor | None,
        size: int,
        base: Forward,
    ) -> None:
        self._host, self._state, self._call, self._below, self._part = host, state, call, below, part
        self._entries, self._size, self._base = entries, size, base

    @property
    def role(self) -> str:
        return self._state.roles.get(name_of(self._host, self._part), "weight")

    def _kind(self) -> Kind:
        assert self._state.kind is not None, f"{self._state.path} is no layer of a known kind"
        return self._state.kind

    def op(self, x: Tensor, matrix_KI: Tensor, dropout: float = 0.0) -> Tensor:
        if not self.drops(x, dropout):
            return self._kind().op(self._host, x, matrix_KI)
        if self._kind().multiplies:
            return dropped_product(x, matrix_KI, dropout, self._keys(x))
        return self._kind().op(self._host, self.dropout(x, dropout), matrix_KI)

    def mix(self, u: Tensor, matrix_OK: Tensor) -> Tensor:
        return self._kind().mix(self._host, u, matrix_OK)

    def plus(self, y: Tensor, u: Tensor, matrix_OK: Tensor) -> Tensor:
        if not self._kind().multiplies:
            return y + self.mix(u, matrix_OK)
        u = self.own(u)
        return torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), matrix_OK.T).view(y.shape)

    def own(self, u: Tensor) -> Tensor:
        return u

    def low_rank(
        self, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float = 1.0, dropout: float = 0.0
    ) -> Tensor:
        drops = self.drops(x, dropout)
        if self._kind().multiplies and not torch.compiler.is_compiling():
            return plus_product(x, y, A_RI, B_OR, scale, dropout if drops else 0.0, self._keys(x) if drops else None)
        dtype = x.dtype if x.is_floating_point() else y.dtype  # ids: an embedding
        u = self.op(x, A_RI.to(dtype), dropout)
        return y + self.mix(u if scale == 1.0 else u * scale, B_OR.to(dtype))

    def weight(self) -> Tensor:
        own = own_parameters(self._host)
        below = [part for part in self._below if isinstance(part, WeightPart | ParameterPart)]
        stored = composed(self._kind(), below, own).get("weight") if below else None
        return self._kind().dense(stored if stored is not None else own["weight"]).detach()  # type: ignore[arg-type]

    def base(self, x: Tensor) -> Tensor:
        return self._base(x)

    def out(self, v_O: Tensor) -> Tensor:
        kind = self._state.kind
        return v_O if kind is None else kind.along_out(self._host, v_O)

    def inp(self, v_I: Tensor) -> Tensor:
        return self._kind().along_in(self._host, v_I)

    def drops(self, x: Tensor, p: float) -> bool:
        return p > 0.0 and self._part.training and x.is_floating_point()

    def dropout(self, x: Tensor, p: float) -> Tensor:
        return dropout(x, p, self._keys(x)) if self.drops(x, p) else x

    def _keys(self, x: Tensor) -> Tensor:
        seed = self._state.control.adapters[name_of(self._host, self._part)].seed
        salt, flat = seed ^ self._state.salt, self._call.flat
        if flat is not None:
            return flat.keys(row_keys(self._call, salt, flat.shape[0], None, x.device), x)
        return row_keys(self._call, salt, self._size, self._entries, x.device)

    def others(self, names: Sequence[str], x: Tensor, y: Tensor) -> list[Tensor]:
        changes: list[Tensor] = []
        for name in names:
            part = part_of(self._host, name)
            assert part is not None, f"{self._state.path} has no part of {name}"
            site = LayerSite(self._host, self._state, self._call, [], part, self._entries, self._size, self._base)
            with present(part):
                changes.append(addition(part, x, y, site))
        return changes

    def prompt_mask(self, y: Tensor) -> Tensor:
        call = self._call
        return prompt_of(call.context, call.tokens or Tokens(), y, self._size, self._entries, self._state.path)

    def tasks(self) -> Tensor | None:
        return tasks_of(self._call.context, self._size, self._entries, self._state.path)


def site_of(host: nn.Module, state: HostState, part: Part) -> LayerSite:
    """A site to ask outside a forward: all rows, nothing below."""

    def rerun(x: Tensor) -> Tensor:
        raise IngraftError(f"{state.path}: the base cannot be run from here.")

    return LayerSite(host, state, state.control.call, [], part, None, 0, rerun)


def name_of(host: nn.Module, part: Part) -> str:
    """The adapter a part belongs to."""
    child = next(name for name, module in host._modules.items() if module is part)
    return child.removeprefix("adapter:").replace("%2E", ".")
