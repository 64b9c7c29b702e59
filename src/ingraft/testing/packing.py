"""Modules packed as a quantised base is, and unpacked to the same numbers."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import nn

import ingraft.adapt as adapt
from ingraft.adapt.select import all_linear, base_modules
from ingraft.quant.blocks import FileFormat
from ingraft.quant.formats import FILE_FORMATS, QUANTISERS
from ingraft.quant.layers import Packed, QuantizedLinear, embedding_class, quantised


def packed(name: str, model: nn.Module) -> nn.Module:
    """A model with all its linear layers packed in a format; in a GGUF's, its embeddings too."""
    form = FILE_FORMATS.get(name)
    for path in all_linear(model, base_modules(model)):
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, quantised(layer, QUANTISERS[name]) if form is None else _as_in_file(layer, form))
    for path, module in list(model.named_modules()) if form is not None else ():
        if isinstance(module, nn.Embedding):
            made = embedding_class(type(module))(form, module)  # type: ignore[arg-type]
            made.weight.data.copy_(form.pack(_file_bytes(module.weight, form)))  # type: ignore[union-attr]
            model.set_submodule(path, made)
    assert any(isinstance(module, Packed) for module in model.modules())
    return model.eval()


def unpacked(name: str, model: nn.Module) -> nn.Module:
    """The same numbers in ordinary layers."""
    model = packed(name, model)
    adapt.make_dense(model)
    return model


def _as_in_file(layer: nn.Linear, form: FileFormat) -> QuantizedLinear:
    blocks = form.pack(_file_bytes(layer.weight, form))
    made = QuantizedLinear(form, layer.in_features, layer.out_features, dtype=layer.weight.dtype, packed=blocks)
    made.bias = cast("nn.Parameter | None", layer.bias)
    return made


def _file_bytes(weight: torch.Tensor, form: FileFormat) -> torch.Tensor:
    """A matrix as a GGUF file has it."""
    from gguf import GGMLQuantizationType, quants

    return torch.from_numpy(
        quants.quantize(weight.detach().float().numpy().astype(np.float32), GGMLQuantizationType[form.name])
    )
