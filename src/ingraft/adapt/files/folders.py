"""An adapter's folder: the names in it and the dtypes of its tensors.

It holds `adapter_config.json` and `adapter_model.safetensors` in Hugging Face PEFT's format (`peft_format.py`) and `ingraft.json`, the
manifest: digests of both files, the base's fingerprint, method, seed and versions. The same adapter gives the same bytes every time.
An adapter that acts over others (a fusion) has them beside it, each a folder like this one in `adapters/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

import torch

from ingraft.methods.contract import MethodConfig

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
RESUMABLE = "model.safetensors"
MEMBERS = "adapters"
CONFIG_LIMIT = 1 << 22
LARGEST_OPTION = 1 << 16
"""Up to here a size in a config needs no tensor to vouch for it."""

COMMON = tuple(field.name for field in fields(MethodConfig))
"""Options of every method: which modules. The config file tells them."""

Header = Mapping[str, tuple[tuple[int, ...], str]]

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Safetensors' names of the dtypes an adapter's numbers may be stored in."""

STORED = tuple(str(dtype).removeprefix("torch.") for dtype in DTYPES.values())
"""Torch's names of the same."""

INDICES = {"U8": torch.uint8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64}
"""The same for its indices."""
