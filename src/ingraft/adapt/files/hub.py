"""AdapterHub's adapter folders: `adapter_config.json` with a `config` inside, and `adapter.safetensors`.

A tensor is `<place>.adapters.<name>.<tensor>` or `<module>.loras.<name>.<tensor>`. Places are AdapterHub's own modules: where they lie in a
model of transformers follows from the block they name, and from whether they stand behind its attention. Names may begin with the base's
prefix or not, depending on the class they were saved from.

The older `pytorch_adapter.bin` is a pickle, which runs code when it is opened, and is not read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ingraft.adapt.building import expected_count
from ingraft.adapt.files.foreign import Opened
from ingraft.adapt.files.peft_format import names_for
from ingraft.adapt.roles import blocks
from ingraft.adapt.select import base_modules, select
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import HubLayout, Method, MethodConfig

WEIGHTS = "adapter.safetensors"
PICKLED = "pytorch_adapter.bin"
HEAD = "head_config.json"
ROOM = 1 << 16
"""Up to here a config may ask for more numbers than the file holds."""

KEY = re.compile(r"(?P<place>.+)\.(?P<kind>adapters|loras)\.(?P<name>[^.]+)\.(?P<tensor>.+)")


def is_hub(raw: Mapping[str, Any]) -> bool:
    """Whether a folder's config is AdapterHub's."""
    return "peft_type" not in raw and isinstance(raw.get("config"), dict) and ("model_class" in raw or "version" in raw)


def open_folder(model: nn.Module, folder: Path, raw: Mapping[str, Any]) -> Opened:
    """Understand a folder, for this model.

    Raises:
        IngraftError: a pickle; settings or tensors that no method here has; places that are not in the model.
    """
    file = folder / WEIGHTS
    if not file.is_file():
        pickled = (
            f" {PICKLED} is not read: it is a pickle, which can run code. Write it again in AdapterHub with "
            "save_adapter(..., use_safetensors=True)."
        )
        raise IngraftError(f"load: {folder} holds no {WEIGHTS}.{pickled * (folder / PICKLED).is_file()}")
    method, layout, config = _method(raw["config"], folder)
    try:
        with safe_open(file, framework="pt") as handle:
            found, strange = _by_place(handle.keys(), layout)
            if strange:
                raise IngraftError(f"{file}: tensors that {method.name} does not have: {', '.join(strange[:8])}.")
            values = {
                place: {name: handle.get_tensor(key).float() for name, key in names.items()}
                for place, names in found.items()
            }
    except (SafetensorError, OSError) as error:
        raise IngraftError(f"{file}: not a readable safetensors file: {error}.") from error
    if layout.post_norm and any(block.norm is None for block in blocks(model)):
        raise IngraftError(
            f"{folder}: on blocks that begin with their norm, AdapterHub's {method.name} adapters see what is ahead of it, which no method here does."
        )
    sites = _by_module(model, list(values)) if layout.by_module else _by_block(model, config, method, list(values))
    lost = [place for place in values if place not in sites]
    if lost or len(set(sites.values())) < len(sites):
        raise IngraftError(
            f"{file}: {len(lost) or 'some'} of its {len(values)} places are not in this model: {', '.join(lost[:8])}."
        )
    if layout.by_module:
        config = replace(config, target_modules=tuple(names_for(sites.values(), base_modules(model))))
    elif unfilled := set(select(model, config, method)[0]) - set(sites.values()):
        raise IngraftError(f"{file}: holds nothing for {', '.join(sorted(unfilled)[:8])}.")
    tensors = {sites[place]: own for place, own in values.items()}
    stored = sum(value.numel() for own in tensors.values() for value in own.values())
    if (wanted := expected_count(model, config, finished=True)) > 8 * stored + ROOM:
        raise IngraftError(f"{folder}: asks for {wanted:,} numbers, and {WEIGHTS} holds {stored:,}.")
    return Opened(
        config=config,
        tensors=tensors,
        found=f"{method.name} at {len(tensors)} places, as AdapterHub writes it",
        elsewhere={},
        reshape=True,
    )


def _method(settings: Mapping[str, Any], folder: Path) -> tuple[Method, HubLayout, MethodConfig]:
    for method in registry.methods():
        try:
            config = method.hub.read(settings) if method.hub is not None else None
        except TypeError as error:
            raise IngraftError(f"{folder}: AdapterHub's config is not well-formed: {error}.") from error
        if method.hub is not None and config is not None:
            return method, method.hub, config
    raise IngraftError(
        f"{folder}: AdapterHub's config (architecture {settings.get('architecture')!r}) is of a method that is not read from its files."
    )


def _by_place(keys: Any, layout: HubLayout) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The file's keys by place and our tensor, and those of other forms."""
    found: dict[str, dict[str, str]] = {}
    strange: list[str] = []
    for key in sorted(keys):
        match = KEY.fullmatch(key)
        if match is None or match["tensor"] not in layout.tensors or (match["kind"] == "loras") != layout.by_module:
            strange.append(key)
        else:
            found.setdefault(match["place"], {})[layout.tensors[match["tensor"]]] = key
    return found, strange


def _here(model: nn.Module, path: str, known: Mapping[str, nn.Module]) -> str | None:
    """A path of theirs in this model, whose base may lie one level higher or lower."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((name for name in (path, prefix + path, path.removeprefix(prefix)) if name in known), None)


def _by_module(model: nn.Module, places: list[str]) -> dict[str, str]:
    known = base_modules(model)
    return {place: path for place in places if (path := _here(model, place, known)) is not None}


def _by_block(model: nn.Module, config: MethodConfig, method: Method, places: list[str]) -> dict[str, str]:
    """The site of each place: the one of ours inside the module it names, or the first (attention) or last (output) of the two."""
    known = base_modules(model)
    sites = list(select(model, config, method)[0])
    found: dict[str, str] = {}
    for place in places:
        container, inside = place, ""
        while container and (inside := _here(model, container, known) or "") == "":
            container = container.rpartition(".")[0]
        candidates = [path for path in sites if path == inside or path.startswith(f"{inside}.")] if inside else []
        if len(candidates) in (1, 2):
            found[place] = candidates[0 if "attention" in place.removeprefix(container) else -1]
    return found
