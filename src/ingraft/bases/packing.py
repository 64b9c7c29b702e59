"""Models of transformers with packed weights, through transformers' own loader.

The loader reads tensor by tensor and knows every checkpoint's renamings; a quantiser of ours is registered with it that swaps layers while the
model is still without memory and packs each weight as it arrives. The dense model never exists as a whole. Afterwards the model carries no
mark of a quantised one: transformers and its Trainer attach their own conditions to that mark.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ingraft.adapt.select import all_linear, base_modules
from ingraft.adapt.weights import kind_of
from ingraft.quant.formats import FILE_FORMATS, QUANTISERS
from ingraft.quant.layers import Origin, Packed, QuantizedLinear, embedding_class, sampled

METHOD = "ingraft"


class BlockConfig(QuantizationConfigMixin):
    """How a model's weights are packed.

    Attributes:
        form: quantise every linear layer of the base into this format while loading.
        skip: but not these.
        plan: or keep these modules' weights, which arrive packed, in these formats.
    """

    def __init__(
        self,
        form: str = "",
        skip: Sequence[str] = (),
        plan: Mapping[str, str] | None = None,
        quant_method: str = METHOD,
    ) -> None:
        self.quant_method: Any = quant_method
        self.form, self.skip, self.plan = form, tuple(skip), dict(plan or {})


@dataclass(frozen=True, kw_only=True)
class Reread:
    """Reads a tensor of a safetensors file again, as (out, in)."""

    path: str
    key: str
    transposed: bool

    def __call__(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            weight = file.get_tensor(self.key)
        return weight.T if self.transposed else weight


class BlockQuantizer(HfQuantizer):
    """What transformers' loader asks while it loads."""

    requires_calibration = False

    def __init__(self, quantization_config: BlockConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.wanted = quantization_config
        self.files: dict[str, str] = {}
        self.transposed: set[str] = set()
        self.dtypes: dict[str, torch.dtype] = {}

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Iterable[str] | None = None, **kwargs: Any
    ) -> None:
        self.files = _where(checkpoint_files or ())
        wanted = self.wanted
        plan = wanted.plan or dict.fromkeys(_quantisable(model, wanted.skip), wanted.form)
        for path, name in plan.items():
            layer = model.get_submodule(path)
            self.dtypes[path] = layer.weight.dtype
            if isinstance(layer, nn.Embedding):
                made: Packed = embedding_class(type(layer))(FILE_FORMATS[name], layer)
            else:
                out, into = layer.weight.shape
                if not isinstance(layer, nn.Linear):  # transformers' Conv1D
                    self.transposed.add(path)
                    out, into = into, out
                made = QuantizedLinear(
                    {**QUANTISERS, **FILE_FORMATS}[name],
                    into,
                    out,
                    bias=layer.bias is not None,
                    dtype=layer.weight.dtype,
                )
            model.set_submodule(path, made)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), Packed)

    def get_quantize_ops(self) -> ConversionOps:
        return Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for path, dtype in self.dtypes.items():  # made without memory, like everything then
            layer = model.get_submodule(path)
            layer.like = torch.empty(0, dtype=dtype, device=layer.weight.device)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:  # type: ignore[override]
        del safe_serialization
        return False

    @property
    def is_trainable(self) -> bool:  # type: ignore[override]
        return True


register_quantization_config(METHOD)(BlockConfig)
register_quantizer(METHOD)(BlockQuantizer)


class Pack(ConversionOps):
    """Packs a weight on its way into the model."""

    def __init__(self, quantizer: BlockQuantizer) -> None:
        self.quantizer = quantizer

    @torch.no_grad()
    def convert(  # type: ignore[override]
        self, input_dict: dict[str, Any], source_patterns: list[str], model: Any = None, **kwargs: Any
    ) -> dict[str, Tensor]:
        packed: dict[str, Tensor] = {}
        for name, found in input_dict.items():
            weight = found[0] if isinstance(found, list) else found
            path = name.rpartition(".")[0]
            layer, transposed = model.get_submodule(path), path in self.quantizer.transposed
            key = source_patterns[0]
            file = self.quantizer.files.get(key)
            read = Reread(path=file, key=key, transposed=transposed) if file is not None else None
            layer.origin = Origin(shape=tuple(weight.shape), sample=sampled(weight), read=read)
            packed[name] = nn.Parameter(layer.form.quantise(weight.T if transposed else weight), requires_grad=False)
        return packed


def _quantisable(model: Any, skip: Iterable[str]) -> list[str]:
    """Linear layers of the base, its head and what must stay in float32 left out."""
    modules = base_modules(model)
    kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
    tied = {key.removesuffix(".weight") for pair in model.all_tied_weights_keys.items() for key in pair}
    left = {*skip, *tied}
    left.update(path for path in modules if kept.intersection(path.split(".")))
    return [path for path in all_linear(model, modules) if path not in left and can_be_packed(modules[path])]


def can_be_packed(layer: nn.Module) -> bool:
    """Whether a packed layer can stand for this one: it computes what its kind says, or looks rows up and does something with them."""
    kind = kind_of(layer)
    if isinstance(layer, nn.Embedding):
        return layer.max_norm is None
    return kind is not None and kind.name in ("linear", "conv1d-transposed") and kind.knows_forward(type(layer), layer)


def _where(files: Iterable[str]) -> dict[str, str]:
    """In which file each tensor of a checkpoint lies."""
    from safetensors import safe_open

    found: dict[str, str] = {}
    for path in files:
        if Path(path).suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), str(path)))
    return found


def unmark(model: Any) -> None:
    """Take transformers' marks of a quantised model off."""
    model.hf_quantizer.remove_quantization_config(model)
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_is_quantized"):
            del config._is_quantized
    del model.is_quantized


def let_go(model: nn.Module) -> None:
    """Give back what packing needed and the model does not: copy the numbers that are still part of a mapped file, and tell glibc to return what was freed.

    A file stays mapped as long as one tensor is a view of it, and all its pages that were read count as this process's memory.
    """
    for module in model.modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            if not (isinstance(module, Packed) and name == "weight"):
                value.data = value.data.clone()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def unread(model: nn.Module, missing: Iterable[str]) -> list[str]:
    """Of the tensors that a checkpoint lacks, the packed layers': what is drawn at random must not be packed."""
    paths = [key.rpartition(".")[0] for key in missing]
    return [path for path in paths if isinstance(model.get_submodule(path), Packed)]
