"""A GGUF file as a model that keeps the file's own blocks.

Names come from the `gguf` package, whose table knows both sides; what a converter did to the numbers of an architecture (llama.cpp puts the rows
of queries and keys in another order, Gemma's norms are stored with one added) stands in `ARCHITECTURES`, and an architecture that is not there is
refused rather than guessed at. Tensors are read one at a time as the loader asks for them, from the mapped file; blocks are regrouped
(`FileFormat.pack`), reordered by whole rows, and never unpacked.

The tokenizer and the config are made by transformers, once, and kept beside the dense conversions.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ingraft.bases import dense_gguf
from ingraft.bases.heads import HEADS
from ingraft.errors import IngraftError
from ingraft.quant.blocks import dequantise
from ingraft.quant.formats import FILE_FORMATS
from ingraft.quant.layers import SAMPLES, Origin, Packed

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderTensor


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """What the GGUF of an architecture does to the numbers.

    Attributes:
        permuted: the rows of queries and keys stand pairwise, not by halves of a head.
        norms: this was added to the norms' weights.
    """

    permuted: bool = False
    norms: float = 0.0


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(permuted=True),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "gemma2": Architecture(norms=1.0),
    "gemma3": Architecture(norms=1.0),
}
"""By GGUF's `general.architecture`. Mistral and SmolLM2 are llama there."""

PLAIN = ("F32", "F16", "BF16")
"""Types of tensors that are numbers, not blocks."""


class Lazy:
    """One tensor of the file, as the loader takes it: read when it is sliced."""

    def __init__(self, found: ReaderTensor, rows: Tensor | None, added: float) -> None:
        self._found, self._rows, self._added = found, rows, added
        self.kind = found.tensor_type.name
        self.packed = self.kind in FILE_FORMATS
        """Whether it stays so; else it is unpacked as it is read."""
        self.shape = tuple(int(size) for size in reversed(found.shape))

    def get_dtype(self) -> str:
        """As safetensors names it; the loader casts floats to the model's dtype and leaves the rest."""
        return "U8" if self.packed else "F32"

    def __getitem__(self, index: Any) -> Tensor:
        raw = torch.from_numpy(self._found.data.copy())
        if self.kind in FILE_FORMATS:
            form = FILE_FORMATS[self.kind]
            value = form.pack(raw)
            if not self.packed:
                value = dequantise(form, value, (self.shape[0], self.shape[1]), torch.float32)
        else:
            value = raw.view(torch.bfloat16) if self.kind == "BF16" else raw
            value = value.reshape(self.shape).float() - self._added
        return (value if self._rows is None else value[self._rows])[index]


def check(gguf: Path | None, name: str, task: str | None = None) -> None:
    """Refuse a base whose blocks cannot be kept. Reads the file's head only.

    Args:
        gguf: the file that the base's name means; None if it means none.

    Raises:
        IngraftError: every reason.
    """
    if gguf is None:
        raise IngraftError(
            f"{name}: quantization keep holds a GGUF file's own blocks, and this base is no GGUF. Use nf4 or int8, "
            "which any base can be brought into."
        )
    reader = _read(gguf)
    found: list[str] = []
    head = HEADS.get(task or "")
    if head is not None and head.fresh:
        found.append(f"a GGUF kept in its blocks writes text; for the task {task!r} leave quantization out.")
    if (architecture := _architecture(reader)) not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        found.append(
            f"quantization keep knows the architectures {known}, not {architecture!r}. Leave quantization out."
        )
    kinds: dict[str, list[str]] = {}
    for tensor in reader.tensors:
        kinds.setdefault(tensor.tensor_type.name, []).append(tensor.name)
    known = ", ".join((*FILE_FORMATS, *PLAIN))
    for kind, names in kinds.items():
        if kind not in PLAIN and kind not in FILE_FORMATS:
            count = f"{len(names)} tensors ({names[0]}, ...) are" if len(names) > 1 else f"{names[0]} is"
            found.append(f"{count} of type {kind}; quantization keep reads {known}. Leave quantization out.")
    if found:
        raise IngraftError(*(f"{name} ({gguf.name}): {problem}" for problem in found))


def _read(gguf: Path) -> GGUFReader:
    from gguf import GGUFReader

    dense_gguf.check_gguf(gguf)
    try:
        return GGUFReader(str(gguf))
    except (ValueError, IndexError, KeyError, OSError) as error:
        text = " ".join(str(error).split())
        raise IngraftError(f"{gguf}: cannot be read as a GGUF: {type(error).__name__}: {text[:300]}") from error


def load_kept(gguf: Path, name: str, dtype: torch.dtype) -> tuple[Any, Path]:
    """The model of a GGUF, its blocks kept, and the folder with its config and tokenizer.

    Raises:
        IngraftError: the file's architecture or one of its types is not known; every reason.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from ingraft.bases.packing import BlockConfig, can_be_packed, unmark

    check(gguf, name)
    folder = dense_gguf.skeleton_folder(gguf)
    config = AutoConfig.from_pretrained(str(folder))
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        shape = model_class(config)
    reader = _read(gguf)
    tensors = _by_our_names(reader, shape, config)
    for key, one in tensors.items():
        one.packed = one.packed and can_be_packed(shape.get_submodule(key.rpartition(".")[0]))
    paths = {key.removesuffix(".weight"): one.kind for key, one in tensors.items() if one.packed}
    for ours, theirs in (shape.all_tied_weights_keys or {}).items():  # both sides of a tie share the blocks
        if theirs.removesuffix(".weight") in paths:
            paths[ours.removesuffix(".weight")] = paths[theirs.removesuffix(".weight")]
    config.quantization_config = BlockConfig(plan=paths).to_dict()
    model, info = model_class.from_pretrained(
        None, config=config, state_dict=tensors, dtype=dtype, output_loading_info=True
    )
    unmark(model)
    missing = sorted({*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])})
    if missing:
        raise IngraftError(
            f"{name}: {gguf.name} lacks weights that a {model_class.__name__} needs: {', '.join(missing[:5])}. Either the "
            "file is not a whole model (fetch it again), or it says it is another model than it is."
        )
    for module in model.modules():
        if isinstance(module, Packed):
            module.origin = _origin(module)
    return model, folder


def _architecture(reader: GGUFReader) -> str:
    field = reader.fields.get("general.architecture")
    return str(field.contents()) if field is not None else ""


def _by_our_names(reader: GGUFReader, model: nn.Module, config: Any) -> dict[str, Lazy]:
    """The file's tensors under the model's names."""
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    name = _architecture(reader)
    arch, facts = next(key for key, value in MODEL_ARCH_NAMES.items() if value == name), ARCHITECTURES[name]
    names = get_tensor_name_map(arch, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    found: dict[str, Lazy] = {}
    for ours in model.state_dict():
        path, _, kind = ours.rpartition(".")
        theirs = names.get_name(path)
        tensor = stored.get(f"{theirs}.{kind}") if theirs is not None else None
        if tensor is None:
            continue  # tied, or missing: the loader says which
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(
            path.rpartition(".")[2]
        )
        rows = _by_halves(int(tensor.shape[-1]), heads) if facts.permuted and heads else None
        found[ours] = Lazy(tensor, rows, facts.norms if path.endswith("norm") else 0.0)
    return found


def _by_halves(rows: int, heads: int) -> Tensor:
    """Where each row of a model's queries or keys stands in a file that keeps the two halves of a head interleaved."""
    return torch.arange(rows).view(heads, rows // heads // 2, 2).transpose(1, 2).reshape(-1)


def _origin(layer: Packed) -> Origin:
    """What the blocks say, as it would be compared with the same base unpacked. Only rows that hold a compared value are unpacked."""
    rows, width = layer.shape
    places = torch.arange(0, rows * width, max(1, rows * width // SAMPLES))[:SAMPLES]
    picked = layer.weight.detach()[places // width]
    values = dequantise(layer.form, picked, (len(places), width), torch.float32)
    sample = values[torch.arange(len(places)), places % width].to(torch.bfloat16)
    return Origin(shape=(rows, width), sample=sample)
