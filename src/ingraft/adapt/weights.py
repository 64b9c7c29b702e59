"""How each kind of layer stores its matrix, and how it applies one.

Methods think in one matrix W of shape (out, in). Layers store it in their own ways: `Linear` as (out, in), GPT-2's `Conv1D` as (in, out),
`Embedding` as (number, width), convolutions with the dimensions of the kernel behind (out, in). A `Kind` is one row of that table; it is the only layer knowledge in
the package. A layer whose `forward` is not the one its kind knows (a scaled embedding, say) still has a matrix, but no shortcut: the host
then computes with a shadowed weight and lets the layer's own code run.

A weight of two dimensions or more that no kind claims is not guessed at. Norms have no matrix; their vectors are handed over as they are.

Legend: O out, I in, K the rows of a matrix applied in place of W, N number of embeddings, B rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.quant.layers import Origin


@contextmanager
def shadowed(layer: nn.Module, values: Mapping[str, Tensor | None]) -> Iterator[None]:
    """For the length of the block, let the layer's own code find these values under its parameters' names (dotted for a child's).

    The values go into the instance's `__dict__`, which attribute look-up prefers to the registered parameters; those stay where they
    are, so names, ties and optimisers never notice. Written to the dictionary itself, because `nn.Module`'s own `__setattr__` would register
    them and torch.compile cannot follow `object.__delattr__`.
    """
    places: list[tuple[dict[str, Any], str, Tensor | None]] = []
    for path, value in values.items():
        child, _, name = path.rpartition(".")
        places.append(((layer.get_submodule(child) if child else layer).__dict__, name, value))
    for owner, name, value in places:
        owner[name] = value
    try:
        yield
    finally:
        for owner, name, _ in places:
            del owner[name]


class Kind(ABC):
    """One kind of layer. Stateless; see the module docstring."""

    name: str
    matrix: ClassVar[bool] = True
    channel_dim: ClassVar[int] = -1
    """The dimension of the input and output that W's columns and rows run along."""
    multiplies: ClassVar[bool] = False
    """Whether `op` is the matrix product with the last dimension of its input."""
    dense_class: ClassVar[type[nn.Module] | None] = None
    """For a layer whose weight is kept in packed blocks: the class that computes the same with a dense weight."""

    @abstractmethod
    def claims(self, layer: nn.Module) -> bool:
        """Whether this layer stores its weight in this way."""

    @abstractmethod
    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        """Whether `cls.forward` is the product that `op` computes, so that shortcuts hold."""

    def weight_of(self, layer: Any) -> Tensor | None:
        """The layer's weight in numbers, as stored: its parameter or, where that is packed, a new tensor."""
        return layer._parameters.get("weight")

    def shape_of(self, layer: Any) -> tuple[int, ...]:
        """The shape of the dense weight; () where there is none."""
        weight = layer._parameters.get("weight")
        return () if weight is None else tuple(self.dense(weight).shape)

    def settle(self, layer: Any) -> None:
        """Called for every layer of a model that gets its first adapter: see that gradients will pass through it."""
        del layer

    def dense_class_of(self, layer: Any) -> type[nn.Module] | None:
        """`dense_class`, as it is for this layer."""
        del layer
        return self.dense_class

    def origin_of(self, layer: Any) -> Origin | None:
        """What a packed weight was before it was packed, where that is known."""
        del layer
        return None

    def run(
        self,
        layer: Any,
        base: Callable[..., Any],
        values: Mapping[str, Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """The layer's own forward with these values in place of its parameters."""
        with shadowed(layer, values):
            return base(*args, **kwargs)

    def dense(self, stored: Tensor) -> Tensor:
        """A stored weight as (out, in); a view."""
        return stored

    def stored(self, W_OI: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `dense`: the matrix in the stored shape."""
        return W_OI.reshape(shape)

    def op(self, layer: Any, x: Tensor, matrix_KI: Tensor) -> Tensor:
        """Apply a (K, I) matrix the way the layer applies its weight, without bias."""
        del layer
        return F.linear(x, matrix_KI)

    def bare(self, layer: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """The base's own product without its bias. Asked only where `knows_forward`; a shadow, which other threads would see, is the last resort."""
        if bias_of(layer) is None:
            return base(x)
        with shadowed(layer, {"bias": None}):
            return base(x)

    def mix(self, layer: Any, u: Tensor, matrix_OK: Tensor) -> Tensor:
        """Apply a (O, K) matrix pointwise to the channels of what `op` returned."""
        del layer
        return F.linear(u, matrix_OK)

    def along_out(self, layer: Any, v_O: Tensor) -> Tensor:
        """Shape a vector over output channels to broadcast against the output."""
        del layer
        return v_O

    def along_in(self, layer: Any, v_I: Tensor) -> Tensor:
        """Shape a vector over input channels to broadcast against the input."""
        del layer
        return v_I


class LinearKind(Kind):
    name = "linear"
    multiplies = True

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Linear)

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is nn.Linear.forward

    def bare(self, layer: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return base(x) if layer.bias is None else F.linear(x, layer.weight)


class TransposedLinearKind(Kind):
    """transformers' `Conv1D` (GPT-2): a linear layer whose weight is stored (in, out)."""

    name = "conv1d-transposed"
    multiplies = True

    def claims(self, layer: nn.Module) -> bool:
        return any(c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils" for c in type(layer).__mro__)

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        from transformers.pytorch_utils import Conv1D

        return cls.forward is Conv1D.forward

    def dense(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, W_OI: Tensor, shape: torch.Size) -> Tensor:
        return W_OI.T.reshape(shape)

    def bare(self, layer: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        del base  # its forward adds the bias inside one fused call
        return F.linear(x, layer.weight.T)


class EmbeddingKind(Kind):
    """`op` is a lookup: the rows of the transposed matrix, picked by id."""

    name = "embedding"

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Embedding)

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        # max_norm rewrites the weight inside forward; no shortcut can follow that.
        return cls.forward is nn.Embedding.forward and isinstance(layer, nn.Embedding) and layer.max_norm is None

    def dense(self, stored: Tensor) -> Tensor:
        return stored.T

    def stored(self, W_OI: Tensor, shape: torch.Size) -> Tensor:
        return W_OI.T.reshape(shape)

    def op(self, layer: Any, x: Tensor, matrix_KI: Tensor) -> Tensor:
        return F.embedding(x, matrix_KI.T, padding_idx=layer.padding_idx)

    def along_in(self, layer: Any, v_I: Tensor) -> Tensor:
        raise NotImplementedError("an embedding has no input channels")


class ConvKind(Kind):
    """Convolutions of one number of dimensions. W's columns run over the inputs of a group, then over the kernel; in a grouped one every
    group sees its own inputs through the same small matrix."""

    channel_dim = 1

    def __init__(self, cls: type[nn.Module], convolve: Callable[..., Tensor]) -> None:
        self.name, self._cls, self._convolve = cls.__name__.lower(), cls, convolve

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, self._cls)

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is self._cls.forward

    def bare(self, layer: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return base(x) if layer.bias is None else layer._conv_forward(x, layer.weight, None)

    def dense(self, stored: Tensor) -> Tensor:
        return stored.flatten(1)

    def op(self, layer: Any, x: Tensor, matrix_KI: Tensor) -> Tensor:
        kernel_K = matrix_KI.reshape(-1, *layer.weight.shape[1:])
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding: Any = 0
        else:
            padding = layer.padding
        kernel_K = kernel_K.repeat(layer.groups, *[1] * (kernel_K.dim() - 1))
        return self._convolve(x, kernel_K, None, layer.stride, padding, layer.dilation, layer.groups)

    def mix(self, layer: Any, u: Tensor, matrix_OK: Tensor) -> Tensor:
        return self._convolve(u, self._pointwise(layer, matrix_OK), groups=layer.groups)

    def along_out(self, layer: Any, v_O: Tensor) -> Tensor:
        return self._pointwise(layer, v_O)

    def along_in(self, layer: Any, v_I: Tensor) -> Tensor:
        return self._pointwise(layer, v_I)

    def _pointwise(self, layer: Any, value: Tensor) -> Tensor:
        """The same with a dimension of one for each of the kernel's."""
        return value.reshape(*value.shape, *[1] * len(layer.kernel_size))


class NormKind(Kind):
    """Normalisation layers: vectors over the last dimension, handed over as stored. Recognised by shape, so that any RMSNorm is one."""

    name = "norm"
    matrix = False

    def claims(self, layer: nn.Module) -> bool:
        own = dict(layer.named_parameters(recurse=False))
        return "weight" in own and own["weight"].dim() == 1 and set(own) <= {"weight", "bias"}

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is nn.LayerNorm.forward

    def op(self, layer: Any, x: Tensor, matrix_KI: Tensor) -> Tensor:
        raise NotImplementedError("a norm has no matrix")

    def mix(self, layer: Any, u: Tensor, matrix_OK: Tensor) -> Tensor:
        raise NotImplementedError("a norm has no matrix")


CONVOLUTIONS = tuple(
    ConvKind(cls, convolve) for cls, convolve in ((nn.Conv1d, F.conv1d), (nn.Conv2d, F.conv2d), (nn.Conv3d, F.conv3d))
)

KINDS: list[Kind] = [LinearKind(), TransposedLinearKind(), EmbeddingKind(), *CONVOLUTIONS, NormKind()]
"""Asked in order; `packed.py` puts its kinds in front."""


def kind_of(layer: nn.Module) -> Kind | None:
    """The kind that claims this layer, or None."""
    return next((kind for kind in KINDS if kind.claims(layer)), None)


def bias_of(layer: nn.Module) -> Tensor | None:
    """The layer's bias, or None where it has none."""
    bias = getattr(layer, "bias", None)
    return bias if isinstance(bias, torch.Tensor) else None
