"""Layers that keep their matrices in other ways than one `weight` that they apply themselves.

* `nn.MultiheadAttention` keeps its input projections in one tensor (or three) of its own, beside a bias of all three.
* Mixtures of experts keep the matrices of all experts in one tensor, (experts, out, in), and apply it in code of their own. Which of a module's
  tensors are meant says `target_parameters`.
* `nn.MultiheadAttention` also *reads* the weight of its `out_proj`, and never calls it.

A method knows one matrix W of shape (out, in). For the first two, a `Matrix` says where one lies among the module's parameters, and a `Stack`
holds an ordinary part of the method for each of them and states the module's parameters by their definitions: the general path, merging,
composition and saving take it for any other `ParameterPart`, and no method knows of it. For the third, the layer that is read hosts its part
as any layer does, and the module that reads it lays the new weight under the layer's name for the length of its own forward (`Read`).

There is no shortcut in such places, hence no input of a branch that dropout could act on: `select` refuses it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods.contract import Composition, ParameterPart, Part, WeightPart


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """One matrix among a module's parameters.

    Attributes:
        key: its name in the adapter ("in_proj", "gate_up_proj.3").
        parameter: the tensor it lies in; index: which of that tensor's matrices it is, None if it is the tensor.
        transposed: whether it is kept as (in, out).
        bias: the parameter that is added to its product, None if there is none; rows: its share of that parameter, None if all.
    """

    key: str
    parameter: str
    index: int | None = None
    transposed: bool = False
    bias: str | None = None
    rows: tuple[int, int] | None = None

    def weight(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The matrix (out, in); a view."""
        stored = parameters[self.parameter]
        W = stored if self.index is None else stored[self.index]
        return W.T if self.transposed else W

    def bias_of(self, parameters: Mapping[str, Tensor]) -> Tensor | None:
        """Its bias (out,), or None."""
        b = parameters.get(self.bias) if self.bias is not None else None
        return b if b is None or self.rows is None else b[slice(*self.rows)]


def matrices(module: nn.Module, chosen: Sequence[str] = ()) -> tuple[Matrix, ...]:
    """The matrices that a module keeps in parameters of its own.

    Args:
        chosen: the names of these parameters, where the module's class does not tell.
    """
    if chosen:
        transposed = bool(getattr(module, "is_transposed", False))  # as transformers' expert modules declare it
        found: list[Matrix] = []
        for name, stored in module._parameters.items():
            if name in chosen and stored is not None and stored.dim() == 3:
                found += [
                    Matrix(key=f"{name}.{index}", parameter=name, index=index, transposed=transposed)
                    for index in range(len(stored))
                ]
            elif name in chosen:
                found.append(Matrix(key=name, parameter=name))
        return tuple(found)
    if not isinstance(module, nn.MultiheadAttention):
        return ()
    if module._qkv_same_embed_dim:
        return (Matrix(key="in_proj", parameter="in_proj_weight", bias="in_proj_bias"),)
    d = module.embed_dim
    return tuple(
        Matrix(key=key, parameter=f"{key}_weight", bias="in_proj_bias", rows=(place * d, (place + 1) * d))
        for place, key in enumerate(("q_proj", "k_proj", "v_proj"))
    )


def reads(module: nn.Module) -> tuple[str, ...]:
    """Names of the children whose weights a module reads instead of calling them."""
    return ("out_proj",) if isinstance(module, nn.MultiheadAttention) else ()


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters a module has, by name."""
    return {name: p for name, p in module._parameters.items() if p is not None}


class Stack(ParameterPart):
    """A part of a method for each of a module's matrices."""

    copies = False

    def __init__(self, parts: Mapping[Matrix, Part]) -> None:
        super().__init__()
        self.matrices = tuple(parts)
        first = next(iter(parts.values()))
        self.composition: Composition = first.composition if isinstance(first, WeightPart) else "add"
        for matrix, part in parts.items():
            holder: nn.Module = self
            *above, leaf = matrix.key.split(".")
            for name in above:
                if name not in holder._modules:
                    holder.add_module(name, nn.ModuleDict())
                holder = holder.get_submodule(name)
            holder.add_module(leaf, part)

    def parts(self) -> Iterator[tuple[Matrix, Part]]:
        """Each matrix with its part, in the order of the module's parameters: a weight part, or in a file what stands for one."""
        for matrix in self.matrices:
            part = self.get_submodule(matrix.key)
            assert isinstance(part, Part)
            yield matrix, part

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        biases: dict[str, list[Tensor | None]] = {}
        changed: dict[str, list[Tensor]] = {}
        moved: set[str] = set()
        for matrix, part in self.parts():
            assert isinstance(part, WeightPart)
            W, b = matrix.weight(parameters), matrix.bias_of(parameters)
            W_new, b_new = part.weight(W, b)
            if W_new is not W:
                moved.add(matrix.parameter)
            changed.setdefault(matrix.parameter, []).append(W_new.T if matrix.transposed else W_new)
            if matrix.bias is not None:
                biases.setdefault(matrix.bias, []).append(b_new)
        for name, pieces in changed.items():
            if name in moved:
                made[name] = torch.stack(pieces) if parameters[name].dim() == 3 else pieces[0]
        for name, pieces in biases.items():
            given = [piece for piece in pieces if piece is not None]
            if len(given) == len(pieces):
                made[name] = torch.cat(given) if len(given) > 1 else given[0]
        return made


def each_alone(parts: Mapping[str, Part]) -> dict[str, Part]:
    """Parts by path, those of a module's matrices each by its own: `<path>.<matrix>`."""
    found: dict[str, Part] = {}
    for path, part in parts.items():
        if isinstance(part, Stack):
            found |= {f"{path}.{matrix.key}": inner for matrix, inner in part.parts()}
        else:
            found[path] = part
    return found


@dataclass(frozen=True, eq=False)
class Read:
    """What the parts of a layer make of it, in the eyes of the module that reads its weight; made for each call."""

    name: str
    layer: nn.Module
    parts: Sequence[Any]
    """Weight and parameter parts, in activation order."""

    composition = "add"

    @property
    def copies(self) -> bool:
        return all(isinstance(part, ParameterPart) and part.copies for part in self.parts)


def sliced(
    host: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], entries: Tensor, size: int, path: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """All inputs of such a module for some entries of dimension 0, which is `size` long.

    Raises:
        IngraftError: for an input that does not show which of its entries belong to which rows.
    """
    heads = host.num_heads if isinstance(host, nn.MultiheadAttention) else 0
    masks = {"attn_mask"} if heads else set[str]()
    named = dict(enumerate(args)) | kwargs
    if heads and len(args) > 5:
        masks |= {5}  # type: ignore[arg-type]  # attn_mask by position

    def of(name: Any, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if name in masks:
            if value.dim() == 2:
                return value  # the same for every row
            k = torch.arange(heads, device=entries.device)
            return value.index_select(0, (entries[:, None] * heads + k).flatten())
        if value.dim() == 0 or value.shape[0] != size:
            raise IngraftError(
                f"rows: {path} takes an input of shape {list(value.shape)}, which does not show its rows; its weight cannot differ from row to "
                "row. Run the rows separately."
            )
        return value.index_select(0, entries)

    new = {name: of(name, value) for name, value in named.items()}
    return tuple(new[place] for place in range(len(args))), {name: new[name] for name in kwargs}
