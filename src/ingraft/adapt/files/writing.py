"""`save`: one adapter to a folder.

Tensors are saved in the base's dtype unless asked otherwise: adapters compute in that dtype, so nothing is lost for use; float32 keeps what
the optimiser sees.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from ingraft import durable
from ingraft.adapt.building import base_parameters, parameters
from ingraft.adapt.control import STEP, Adapter, part_of, require_control, shared_of
from ingraft.adapt.files import peft_format
from ingraft.adapt.files.fingerprint import fingerprint, main_dtype
from ingraft.adapt.files.folders import (
    COMMON,
    CONFIG,
    MEMBERS,
    RESUMABLE,
    STORED,
    WEIGHTS,
)
from ingraft.adapt.files.peft_heads import frozen_heads, inside_of, written_task
from ingraft.adapt.files.peft_tensors import (
    Entry,
    entries,
    layout_of,
)
from ingraft.adapt.hooks import parts_of
from ingraft.adapt.merging import unmerged
from ingraft.adapt.stacked import Stack
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import Part, PeftLayout


def save(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    extra: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Save one adapter to a folder, as one step: afterwards it is there whole, or nothing has changed.

    Args:
        name: which; may be left out if only one is attached, or one is called "default".
        dtype: of the tensors; the base's by default (with which an adapter computes), `torch.float32` for the optimiser's values.
        extra: JSON data to keep in the manifest, under `extra`.
        overwrite: replace an adapter that is there. Other files in the folder stay.

    Returns:
        The folder.

    Raises:
        IngraftError: no such adapter, values that are not finite, a folder that is occupied, a disk that refuses.
    """
    folder = Path(folder)
    name = _the_name(model, name)
    config, weights, facts = serialised(model, name, dtype=dtype)
    if ground := facts.get("stands_on"):
        warnings.warn(
            f"{folder}: {name} acts on the base with {', '.join(ground)} merged into it. Ingraft asks for that base when it loads the adapter; other "
            "readers of the format do not.",
            stacklevel=2,
        )
    if extra:
        facts["extra"] = dict(extra)
    written = _written_members(folder)
    ours = {CONFIG, WEIGHTS, durable.MANIFEST, *([MEMBERS] if written else [])}
    others = folder.is_dir() and any(item.name not in ours for item in folder.iterdir())
    if facts.get("members") and overwrite and not written and (folder / MEMBERS).exists():
        raise IngraftError(
            f"{folder / MEMBERS} is in the way of the adapters that {name!r} acts over; choose another folder."
        )
    with ExitStack() as stack:
        if overwrite and others:  # replacing the folder would take the other files with it
            if (folder / durable.MANIFEST).exists():
                durable.remove(folder / durable.MANIFEST)
            if written:
                durable.remove(folder / MEMBERS)
            staging = stack.enter_context(durable.completion(folder, facts, only=(CONFIG, WEIGHTS)))
        else:
            staging = stack.enter_context(durable.folder(folder, overwrite, facts))
        durable.write_file(staging / CONFIG, config)
        durable.write_file(staging / WEIGHTS, weights)
        save_members(model, name, staging, dtype=dtype)
    return folder


def _written_members(folder: Path) -> bool:
    """Whether `adapters/` in this folder is what an earlier save put there, and nothing else: only then may a save replace it."""
    inside = {item.name for item in (folder / MEMBERS).iterdir()} if (folder / MEMBERS).is_dir() else set[str]()
    if not inside or not (folder / durable.MANIFEST).is_file():
        return False
    try:
        listed = durable.read_manifest(folder)["facts"].get("members") or []
    except IngraftError:
        return False
    return inside <= set(listed)


def save_members(model: nn.Module, name: str, folder: Path, *, dtype: torch.dtype | None = None) -> None:
    """Save the adapters that this one acts over into its folder, so that it can be loaded by itself."""
    for member in require_control(model).acted_on_by(name):
        save(model, folder / MEMBERS / durable.check_name(member), member, dtype=dtype)


def serialised(model: nn.Module, name: str, *, dtype: torch.dtype | None = None) -> tuple[bytes, bytes, dict[str, Any]]:
    """One adapter as the bytes of its two files, and the facts for a manifest.

    Raises:
        IngraftError: no such adapter, or values that are not finite.
    """
    adapter = require_control(model).require(name)
    own = main_dtype(base_parameters(model).values())
    usual = dtype or (getattr(torch, own) if own in STORED else torch.float32)
    if str(usual).removeprefix("torch.") not in STORED:
        raise IngraftError(f"save: dtype must be one of {', '.join(STORED)}, got {usual}; nothing else is read again.")
    written, parts = _as_written(model, adapter)
    layout = layout_of(model, written.method, written.config, adapter.sites)
    tensors: dict[str, Tensor] = {}
    for entry in _entries(model, written, layout, parts):
        for key in (entry.key, *(entry.copies if layout is not None and entry.each_copy else ())):
            tensors[key] = entry.take().to(_stored_in(entry, dtype, usual)).cpu().contiguous().clone()
    tensors |= _untrained_heads(model, written, layout)
    bad = [key for key, tensor in sorted(tensors.items()) if not torch.isfinite(tensor).all()]
    if bad:
        raise IngraftError(
            *(
                f"save: {key} of adapter {name!r} holds values that are not finite. The training diverged; nothing was saved."
                for key in bad
            )
        )
    config = durable.to_json(peft_format.write_config(model, written, layout))
    facts: dict[str, Any] = {
        "name": name,
        "method": adapter.method.name,
        "seed": adapter.seed,
        "dtype": str(usual).removeprefix("torch."),
        "sites": sorted(adapter.sites),
        "parameters": sum(parameter.numel() for parameter in parameters(model, name).values()),
        "base": fingerprint(model, adapter.saved_whole, as_merged=bool(adapter.ground)),
        **({"stands_on": list(adapter.ground)} if adapter.ground else {}),
        **({"members": list(members)} if (members := require_control(model).acted_on_by(name)) else {}),
        "versions": {package: _version(package) for package in ("ingraft", "torch", "transformers")}
        | {"python": platform.python_version()},
    }
    if written.method is not adapter.method:
        facts["options"] = {
            key: peft_format.plain_value(value) for key, value in adapter.config.options().items() if key not in COMMON
        }
    return config, to_bytes(tensors, metadata={"format": "pt"}), facts


def _untrained_heads(model: nn.Module, adapter: Adapter, layout: PeftLayout | None) -> dict[str, Tensor]:
    """Copies of what PEFT misses in a file of this task, and the adapter does not train: the base's head."""
    heads = frozen_heads(model, adapter, layout, written_task(model, adapter, layout))
    start = inside_of(layout)
    with nullcontext() if adapter.ground else unmerged(model):
        return {
            f"{start}{path}.{name}": value.detach().cpu().contiguous().clone()
            for path in sorted(heads)
            for name, value in model.get_submodule(path)._parameters.items()
            if value is not None
        }


def _stored_in(entry: Entry, asked: torch.dtype | None, usual: torch.dtype) -> torch.dtype:
    if entry.indices and entry.used_in is not None:
        return entry.used_in
    return asked or entry.used_in or usual


def save_resumable(model: nn.Module, folder: Path) -> None:
    """Leave all adapters in float32, and the step that dropout has come to, under the name by which transformers' Trainer looks for a
    checkpoint of the model."""
    tensors = {
        key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items() if "adapter:" in key
    }
    tensors[STEP] = require_control(model).call.step.cpu()
    durable.write_file(folder / RESUMABLE, to_bytes(tensors, metadata={"format": "pt"}))


def _the_name(model: nn.Module, name: str | None) -> str:
    attached = list(require_control(model).adapters)
    if name is None and len(attached) > 1 and "default" not in attached:
        raise IngraftError(f"save: several adapters are attached ({', '.join(attached)}); say which one by name.")
    return name if name is not None else "default" if "default" in attached else attached[0]


class _Values(Part):
    """Tensors that stand for a part in a file."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor.detach())


def _as_written(model: nn.Module, adapter: Adapter) -> tuple[Adapter, dict[str, Part]]:
    """The adapter that the file is to hold, of the same function (`Method.compact`), and its parts."""
    parts = {
        path: part for path in adapter.sites if (part := part_of(model.get_submodule(path), adapter.name)) is not None
    }
    if adapter.method.compact is None:
        return adapter, parts
    config, tensors = adapter.method.compact(adapter.config, parts_of(model, adapter))
    values: dict[str, Part] = {}
    for path, part in parts.items():
        if isinstance(part, Stack):
            values[path] = Stack({m: _Values(tensors[f"{path}.{m.key}"]) for m in part.matrices})
        elif path in tensors:
            values[path] = _Values(tensors[path])
    return replace(adapter, config=config, method=registry.load(config.method)), {**parts, **values}


def _entries(model: nn.Module, adapter: Adapter, layout: PeftLayout | None, parts: Mapping[str, Part]) -> list[Entry]:
    return entries(model, adapter.method, adapter.sites, parts, shared_of(model, adapter.name), layout)


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
