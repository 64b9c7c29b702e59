"""A linear layer and an embedding whose weight stays packed.

The weight is unpacked when it is used and thrown away: in the forward pass, and once more in the backward pass, so that nothing of a weight's
size is kept for backward. The dtype is that of the input, as under bitsandbytes. `like` is an empty tensor that follows `model.to(dtype)`,
which packed bytes cannot, and says what the weight is unpacked to where there is no input to ask.

A layer as tall as an output head is multiplied in pieces of its rows: the whole of it is never unpacked at once in a forward pass.

Legend: O out, I in, N number of embeddings.
"""

from __future__ import annotations

import copyreg
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.quant.blocks import FileFormat, Format, Quantiser, dequantise, pieces

PIECE = 2**20
"""Numbers of a weight unpacked at once in a forward pass. On SmolLM2's head a quarter of a million took 18 ms, a million 12, four million 25."""

FEW = 4
"""For so many rows, as when text is generated, the product is float32's on a CPU: rounding the weight would take longer than it saves. Not tried elsewhere."""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a packed weight was before it was packed.

    Attributes:
        shape: as the base stored it.
        sample: some of its values at fixed places (`sampled`), bfloat16.
        read: fetches it again from the base's files; None where the blocks are the original.
    """

    shape: tuple[int, ...]
    sample: Tensor
    read: Callable[[], Tensor] | None = None


SAMPLES = 64
"""Values that stand for a weight where two bases are compared."""


def sampled(weight: Tensor) -> Tensor:
    """Some values of a weight at fixed places, rounded to bfloat16, so that copies of different precision agree."""
    # A copy: a view would keep the whole weight in memory.
    return places(weight.detach().contiguous()).to(torch.bfloat16, copy=True)


def places(weight: Tensor) -> Tensor:
    """These values of a contiguous tensor, as they are: a view of at most `SAMPLES` of them."""
    count = weight.numel()
    step = max(1, count // SAMPLES)
    return weight.as_strided((min(SAMPLES, -(-count // step)),), (step,))


class Packed(nn.Module):
    """What both layers share: packed bytes, and how numbers come out of them. Abstract."""

    weight: Tensor
    like: Tensor

    def __init__(self, form: Format, shape: tuple[int, int], dtype: torch.dtype, packed: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.form, self.shape = form, shape
        bytes_ = torch.empty(form.packed_shape(shape), dtype=torch.uint8) if packed is None else packed
        self.weight = nn.Parameter(bytes_, requires_grad=False)
        self.register_buffer("like", torch.empty(0, dtype=dtype, device=bytes_.device), persistent=False)
        self.origin: Origin | None = None

    def unpacked(self, dtype: torch.dtype | None = None) -> Tensor:
        """The weight in numbers: a new tensor of `shape`."""
        return dequantise(self.form, self.weight.detach(), self.shape, dtype or self.like.dtype)


class QuantizedLinear(Packed):
    """`nn.Linear` with a packed weight."""

    bias: nn.Parameter | None

    def __init__(
        self,
        form: Format,
        in_features: int,
        out_features: int,
        *,
        bias: bool = False,
        dtype: torch.dtype,
        packed: Tensor | None = None,
    ) -> None:
        """
        Args:
            packed: the weight; None leaves the memory as it comes.
        """
        super().__init__(form, (out_features, in_features), dtype, packed)
        self.in_features, self.out_features = in_features, out_features
        self.register_parameter(
            "bias", nn.Parameter(torch.zeros(out_features, dtype=dtype), requires_grad=False) if bias else None
        )

    def forward(self, x: Tensor) -> Tensor:
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if torch.is_grad_enabled() and x.requires_grad:
            y = cast(Tensor, _Product.apply(x, self.weight, self.form, self.shape))
            return y if bias is None else y + bias
        return _product(x, self.weight, self.form, self.shape, bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self.form.name}"


class QuantizedEmbedding(Packed, nn.Embedding):
    """`nn.Embedding` with a weight packed row by row. It is one, for all that only asks whether ids go in."""

    inner: ClassVar[type[nn.Embedding]] = nn.Embedding
    """The class it stands for."""

    def __init__(self, form: FileFormat, layer: nn.Embedding) -> None:
        """
        Args:
            layer: the embedding it stands for, whose settings and buffers it takes; the bytes are still to come.
        """
        Packed.__init__(self, form, (layer.num_embeddings, layer.embedding_dim), layer.weight.dtype, None)
        for name, value in layer.__dict__.items():
            if not name.startswith("_") and name not in self.__dict__:
                self.__dict__[name] = value
        for name, buffer in layer.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name not in layer._non_persistent_buffers_set)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.weight.index_select(0, input.reshape(-1))
        values = dequantise(self.form, rows, (rows.shape[0], self.embedding_dim), self.like.dtype)
        if self.inner is nn.Embedding:
            return values.view(*input.shape, self.embedding_dim)
        places = torch.arange(rows.shape[0], device=input.device).view(input.shape)
        return self.look_up(places, values, padding_idx=None)

    def look_up(self, ids: Tensor, table: Tensor, *, padding_idx: int | None) -> Tensor:
        """What the class it stands for makes of these ids and this table."""
        own, padding = self.__dict__, self.padding_idx
        own["weight"], own["padding_idx"] = table, padding_idx
        try:
            return super(Packed, self).forward(ids)
        finally:
            own["padding_idx"] = padding
            del own["weight"]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.form.name}"


class _Made(type):
    """The type of classes that `embedding_class` makes, by which pickle knows how to make them again."""


@functools.cache
def embedding_class(inner: type[nn.Embedding]) -> type[QuantizedEmbedding]:
    """The packed layer for embeddings of this class. One with a forward of its own (Gemma's scales what it looked up) keeps it: it is shown the
    rows asked for as a table of their own, and their places in it."""
    if inner is nn.Embedding:
        return QuantizedEmbedding
    names = {"inner": inner, "__module__": inner.__module__, "__qualname__": inner.__qualname__}
    return _Made(inner.__name__, (QuantizedEmbedding, inner), names)  # type: ignore[return-value]


copyreg.pickle(_Made, lambda cls: (embedding_class, (cls.inner,)))  # type: ignore[arg-type,attr-defined]


def quantised(layer: nn.Linear, form: Quantiser) -> QuantizedLinear:
    """A linear layer with its weight packed; the original is left as it is, the bias shared."""
    packed, dtype = form.quantise(layer.weight), layer.weight.dtype
    made = QuantizedLinear(form, layer.in_features, layer.out_features, dtype=dtype, packed=packed)
    made.bias = cast("nn.Parameter | None", layer.bias)
    made.origin = Origin(shape=tuple(layer.weight.shape), sample=sampled(layer.weight))
    return made.train(layer.training)


def _product(x: Tensor, packed: Tensor, form: Format, shape: tuple[int, int], bias: Tensor | None) -> Tensor:
    """x Wᵀ + b, W unpacked piece by piece."""
    if x.device.type == "cpu" and x.numel() <= FEW * shape[1] and x.dtype != torch.float32:
        wide = None if bias is None else bias.float()
        return _product(x.float(), packed, form, shape, wide).to(x.dtype)
    if shape[0] * shape[1] <= PIECE:
        return F.linear(x, dequantise(form, packed, shape, x.dtype), bias)
    y = torch.empty(*x.shape[:-1], shape[0], dtype=x.dtype, device=x.device)
    for start, stop in pieces(shape, PIECE):
        rows = form.values(packed, shape, start, stop).to(x.dtype)
        y[..., start:stop] = F.linear(x, rows, None if bias is None else bias[start:stop])
    return y


class _Product(torch.autograd.Function):
    """`_product` with a gradient to x, for which the weight is unpacked again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packed: Tensor, form: Format, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.form, ctx.shape, ctx.dtype = form, shape, x.dtype
        return _product(x, packed, form, shape, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        return grads[0] @ dequantise(ctx.form, packed, ctx.shape, ctx.dtype), None, None, None
