"""Layers whose weight is kept in packed blocks: our own, bitsandbytes' and torchao's.

Each is a row of the table in `weights.py`, and nothing outside that table asks which library packed a weight. What such a layer cannot have is
another weight put in the place of its packed one for the length of a call, so its kind computes the product with a changed weight itself
(`run`). A layer into which an adapter is merged is for that time one with a dense weight: its class below the mixins is `dense_class`, and the
packed tensor is set aside, to be put back as it was.

bitsandbytes and torchao are recognised by name and imported only when a layer of theirs is at hand.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.adapt.swap import rebase
from ingraft.adapt.weights import KINDS, EmbeddingKind, Kind, LinearKind, kind_of
from ingraft.quant.layers import Packed, QuantizedEmbedding, QuantizedLinear


def class_named(layer: nn.Module, package: str, name: str) -> bool:
    """Whether a layer is of a class of this name in a package that need not be installed."""
    return any(c.__name__ == name and c.__module__.split(".")[0] == package for c in type(layer).__mro__)


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


class PackedLinearKind(LinearKind):
    """A linear layer with a packed weight. Abstract."""

    dense_class = nn.Linear

    def shape_of(self, layer: Any) -> tuple[int, ...]:
        return layer.out_features, layer.in_features

    def bare(self, layer: Any, base: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return Kind.bare(self, layer, base, x)  # only its own forward reads the packed weight

    def run(
        self,
        layer: Any,
        base: Callable[..., Any],
        values: Mapping[str, Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        W_OI = values.get("weight")
        if W_OI is None:
            return super().run(layer, base, values, args, kwargs)
        x, b = _first(args, kwargs), values.get("bias", layer.bias)
        return F.linear(x, W_OI.to(x.dtype), None if b is None else b.to(x.dtype))


class OwnLinearKind(PackedLinearKind):
    """`QuantizedLinear`."""

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, QuantizedLinear)

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is QuantizedLinear.forward

    def weight_of(self, layer: Any) -> Tensor:
        return layer.unpacked()

    def origin_of(self, layer: Any) -> Any:
        return layer.origin


class OwnEmbeddingKind(EmbeddingKind):
    """`QuantizedEmbedding`."""

    dense_class = nn.Embedding

    def claims(self, layer: nn.Module) -> bool:
        return isinstance(layer, QuantizedEmbedding)

    def knows_forward(self, cls: type[nn.Module], layer: Any) -> bool:
        return cls.forward is QuantizedEmbedding.forward and layer.inner is nn.Embedding

    def dense_class_of(self, layer: Any) -> type[nn.Module]:
        return layer.inner

    def weight_of(self, layer: Any) -> Tensor:
        return layer.unpacked()

    def shape_of(self, layer: Any) -> tuple[int, ...]:
        return layer.embedding_dim, layer.num_embeddings

    def origin_of(self, layer: Any) -> Any:
        return layer.origin

    def run(
        self,
        layer: Any,
        base: Callable[..., Any],
        values: Mapping[str, Tensor | None],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        W_ND = values.get("weight")
        if W_ND is None:
            return super().run(layer, base, values, args, kwargs)
        return layer.look_up(_first(args, kwargs), W_ND, padding_idx=layer.padding_idx)


class FourBitKind(PackedLinearKind):
    """bitsandbytes' `Linear4bit`, nf4 or fp4.

    On processors with bfloat16 products it packs its weight anew at its first forward in evaluation mode, in an order whose product has no
    gradient (version 0.50; gradients are then wrong without an error, also in later training). A layer of an adapted model keeps the order
    it was made with.
    """

    def claims(self, layer: nn.Module) -> bool:
        return class_named(layer, "bitsandbytes", "Linear4bit")

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is importlib.import_module("bitsandbytes").nn.Linear4bit.forward

    def weight_of(self, layer: Any) -> Tensor:
        functional = importlib.import_module("bitsandbytes.functional")
        self.settle(layer)
        weight = layer._parameters["weight"]
        return functional.dequantize_4bit(weight.data, weight.quant_state).view(self.shape_of(layer))

    def settle(self, layer: Any) -> None:
        weight = layer._parameters["weight"]
        layer.support_avx512bf16_for_cpu = False
        if getattr(weight.quant_state, "packing_format_for_cpu", False):
            undo = importlib.import_module("bitsandbytes.functional")._convert_weight_packed_for_cpu_inverse
            weight.data, weight.quant_state = undo(weight.data, weight.quant_state)


class EightBitKind(PackedLinearKind):
    """bitsandbytes' `Linear8bitLt`."""

    def claims(self, layer: nn.Module) -> bool:
        return class_named(layer, "bitsandbytes", "Linear8bitLt")

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is importlib.import_module("bitsandbytes").nn.Linear8bitLt.forward

    def weight_of(self, layer: Any) -> Tensor:
        weight = layer._parameters["weight"]
        # The scales move from the weight to the layer's state with the first forward.
        scales = layer.state.SCB if layer.state.SCB is not None else weight.SCB
        return weight.data.float().mul_(scales[:, None] / 127.0)


class TorchAoKind(PackedLinearKind):
    """`nn.Linear` with one of torchao's weight tensors."""

    def claims(self, layer: nn.Module) -> bool:
        weight = layer._parameters.get("weight")
        if (
            not isinstance(layer, nn.Linear) or type(weight) is nn.Parameter
        ):  # asked inside compiled code too, which cannot take names apart
            return False
        return type(weight).__module__.split(".")[0] == "torchao"

    def knows_forward(self, cls: type[nn.Module], layer: nn.Module) -> bool:
        return cls.forward is nn.Linear.forward

    def weight_of(self, layer: Any) -> Tensor:
        return layer._parameters["weight"].dequantize()


OWN: tuple[Kind, ...] = (OwnLinearKind(), OwnEmbeddingKind(), FourBitKind(), EightBitKind(), TorchAoKind())
KINDS[:0] = OWN


@torch.no_grad()
def make_dense(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Unpack every packed weight of a model, for good. Tied ones stay tied. Returns how many layers changed.

    Args:
        dtype: of the dense weights; None takes what each unpacks to.
    """
    made: dict[int, nn.Parameter] = {}
    changed = 0
    for module in model.modules():
        kind = kind_of(module)
        dense = kind.dense_class_of(module) if kind is not None else None
        if kind is None or dense is None:
            continue
        packed = module._parameters["weight"]
        if id(packed) not in made:
            weight = kind.weight_of(module)
            assert weight is not None
            made[id(packed)] = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
        module._parameters["weight"] = made[id(packed)]
        rebase(module, dense)
        changed += 1
    return changed


def packed_bytes(model: nn.Module) -> int:
    """How many bytes a model's packed weights take, tied ones once."""
    packed = {id(module.weight): module.weight for module in model.modules() if isinstance(module, Packed)}
    return sum(p.numel() for p in packed.values())
