"""Adapters in one file of tensors and no config: kohya-ss' scripts, LyCORIS, diffusers.

What the file is follows from the names of its tensors, never from its own name. A tensor is `<where>.<what>`. kohya-ss and LyCORIS write *where*
as a component and a path whose dots are underscores (`lora_unet_mid_block_attentions_0_proj_in`), diffusers as a component and the path
(`unet.mid_block.attentions.0.proj_in`). *What* has several spellings, which `ENDINGS` brings to LyCORIS' names; the methods say what those mean
(`layout.Foreign`).

Such a file may hold several components, a UNet and its text encoders, and a model may be one of them or have all inside. A component belongs to
this model if every module it names is there; one that does not is left alone, and said. Anything else that is not understood is refused
by name: left out, it would change what the adapter computes.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ingraft.adapt.files.peft_format import names_for
from ingraft.adapt.select import base_modules
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import Method, MethodConfig, Part

log = logging.getLogger(__name__)

ENDINGS: tuple[tuple[str, str, str], ...] = (
    (r"\.(lora_down|lora_up|lora_mid)\.weight", "", r"\1"),
    (r"\.lora_A(\.default)?\.weight", "", "lora_down"),
    (r"\.lora_B(\.default)?\.weight", "", "lora_up"),
    (r"\.processor\.(to_[a-z]+)_lora\.(down|up)\.weight", r".\1", r"lora_\2"),
    (r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight", "", r"lora_\1"),
    (r"\.(?:dora_scale|lora_magnitude_vector(?:\.default)?(?:\.weight)?)", "", "dora_scale"),
    (r"\.(alpha|hada_\w+|lokr_\w+)", "", r"\1"),
)
"""Pattern of an ending -> what of it belongs to the path, and LyCORIS' name of the tensor."""

UNDERSCORED = re.compile(r"(lora_unet|lora_te\d?|lora_transformer|lora_prior_unet|lora_prior_te|lora|lycoris)_(.+)")
DOTTED = re.compile(r"(unet|text_encoder(?:_\d)?|transformer|prior)\.(.+)")

INSIDE = {"lora_unet": "unet", "lora_te": "text_encoder", "lora_te1": "text_encoder", "lora_te2": "text_encoder_2"}
"""Where a component lies in a model that holds several, if not under its own name."""

METADATA = "lora_adapter_metadata"
"""diffusers' settings, as JSON in the file's metadata."""

MOST_NAMED = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Opened:
    """A file that was understood.

    Attributes:
        config, tensors: the adapter, its tensors by path and name.
        found: in words, what it is.
        elsewhere: modules of other components, by component.
        reshape: take values of another shape and the same size.
    """

    config: MethodConfig
    tensors: Mapping[str, Mapping[str, Tensor]]
    found: str
    elsewhere: Mapping[str, int]
    reshape: bool = False

    def fill(self, parts: Mapping[str, Part], where: Path) -> None:
        """Put the tensors in place, once all of them are known to fit."""
        problems: list[str] = []
        for path, values in self.tensors.items():
            own = dict(parts[path].named_parameters())
            problems += [f"{where}: {path}: {name} is missing." for name in own if name not in values]
            for name, value in values.items():
                if name not in own:
                    problems.append(f"{where}: {path}: {name} has no place in this layer.")
                elif value.shape != own[name].shape and not (self.reshape and value.numel() == own[name].numel()):
                    problems.append(
                        f"{where}: {path}: {name} has shape {list(value.shape)}; this layer needs {list(own[name].shape)}."
                    )
                elif not torch.isfinite(value).all():
                    problems.append(
                        f"{where}: {path}: {name} holds values that are not finite; the adapter is damaged."
                    )
        if problems:
            raise IngraftError(
                *problems[:MOST_NAMED],
                *([f"... and {len(problems) - MOST_NAMED} more."] if len(problems) > MOST_NAMED else []),
            )
        with torch.no_grad():
            for path, values in self.tensors.items():
                for name, parameter in parts[path].named_parameters():
                    parameter.copy_(values[name].reshape(parameter.shape))


def the_file(place: Path) -> Path | None:
    """The safetensors file meant by a path: itself, or the only one in a folder without a config; None if there is none. A file under PEFT's own
    name, which needs its config, is left to others."""
    if place.is_file():
        return place
    inside = sorted(place.glob("*.safetensors")) if place.is_dir() else []
    return inside[0] if len(inside) == 1 and not inside[0].name.startswith("adapter_model") else None


def open_file(model: nn.Module, file: Path) -> Opened:
    """Understand a file, for this model.

    Raises:
        IngraftError: everything in it that is not understood or has no place in the model.
    """
    try:
        with safe_open(file, framework="pt") as handle:
            where, strange = _by_module(handle.keys())
            if strange:
                raise IngraftError(
                    f"{file}: {len(strange)} of its tensors belong to no form of adapter known here: {_some(strange)}."
                    + (
                        " They look like PEFT's: its adapter_config.json has to lie beside them."
                        if strange[0].startswith("base_model.")
                        else ""
                    )
                )
            modules, elsewhere, style = _placed(model, where, file)
            read = {
                path: {name: handle.get_tensor(key).float() for name, key in names.items()}
                for path, names in modules.items()
            }
            settings = _settings(handle.metadata() or {}, file)
    except (SafetensorError, OSError) as error:
        raise IngraftError(f"{file}: not a readable safetensors file: {error}.") from error
    if settings:
        _add_alphas(read, modules, settings)
    method = _method(read, file)
    assert method.foreign is not None
    config, tensors = method.foreign.read(read)
    config = replace(config, target_modules=tuple(names_for(tensors, base_modules(model))))
    found = f"{method.name} at {len(tensors)} modules, as {style} writes it"
    log.info("%s: %s.", file, found)
    return Opened(config=config, tensors=tensors, found=found, elsewhere=elsewhere)


# ------------------------------------------------------------------------------------------------------------ names to modules

Named = dict[tuple[str, str, bool], dict[str, str]]
"""Component, path as the file has it, whether its dots are underscores -> tensor's name -> key."""


def _by_module(keys: Iterable[str]) -> tuple[Named, list[str]]:
    """The file's tensors by module, and the keys that follow no known form."""
    found: Named = {}
    strange: list[str] = []
    for key in sorted(keys):
        split = _split(key)
        if split is None:
            strange.append(key)
            continue
        place, name = split
        found.setdefault(place, {})[name] = key
    return found, strange


def _split(key: str) -> tuple[tuple[str, str, bool], str] | None:
    for pattern, kept, name in ENDINGS:
        match = re.search(pattern + "$", key)
        if match is None or key.startswith("base_model."):
            continue
        path = key[: match.start()] + match.expand(kept)
        name = match.expand(name)
        if path.endswith(".to_out") and ".processor." in key:
            path += ".0"  # the projection is the first of a list
        if "." not in path and (hit := UNDERSCORED.fullmatch(path)):
            return (hit[1], hit[2], True), name
        if hit := DOTTED.fullmatch(path):
            return (hit[1], hit[2], False), name
        return ("", path, False), name
    return None


def _placed(model: nn.Module, found: Named, file: Path) -> tuple[dict[str, dict[str, str]], dict[str, int], str]:
    """The tensors of the components that belong to this model by path, the sizes of the others, and who writes files so."""
    paths = [path for path in base_modules(model) if path]
    components: dict[str, list[tuple[str, str, bool]]] = {}
    for place in found:
        components.setdefault(place[0], []).append(place)
    fitting: dict[str, dict[tuple[str, str, bool], str]] = {}
    missing: dict[str, list[str]] = {}
    for component, places in components.items():
        resolved = _resolved(places, paths, INSIDE.get(component, component))
        lost = [place[1] for place in places if place not in resolved]
        if lost:
            missing[component] = lost
        else:
            fitting[component] = resolved
    if not fitting:
        raise IngraftError(
            *(
                f"{file}: {len(lost)} of the {len(components[component])} modules under {component or 'no prefix'!r} are not in this model: {_some(lost)}."
                for component, lost in missing.items()
            ),
            "The adapter is for another model, or names its modules in a way that is not known here.",
        )
    taken = [path for resolved in fitting.values() for path in resolved.values()]
    if len(set(taken)) < len(taken):
        raise IngraftError(
            f"{file}: {' and '.join(fitting)} both fit this model; keep only the tensors that are meant for it."
        )
    modules = {path: found[place] for resolved in fitting.values() for place, path in resolved.items()}
    underscored = any(place[2] for resolved in fitting.values() for place in resolved)
    elsewhere = {component: len(components[component]) for component in missing}
    return modules, elsewhere, "kohya-ss or LyCORIS" if underscored else "diffusers"


def _resolved(
    places: Iterable[tuple[str, str, bool]], paths: list[str], inside: str
) -> dict[tuple[str, str, bool], str]:
    """The model's modules for a component's, by the one way of naming that finds most: as they stand, inside a model of several, or with the
    text model's own prefix, which releases of transformers have and have not."""
    places = list(places)
    best: dict[tuple[str, str, bool], str] = {}
    for there, gone in (
        ("", ""),
        (inside, ""),
        ("", "text_model"),
        ("text_model", ""),
        (f"{inside}.text_model", ""),
        (inside, "text_model"),
    ):
        if there == "" and gone == "" and best:
            continue
        found = {place: path for place in places if (path := _lookup(place, paths, there, gone)) is not None}
        if len(found) > len(best):
            best = found
    return best


def _lookup(place: tuple[str, str, bool], paths: list[str], there: str, gone: str) -> str | None:
    _, path, underscored = place
    dot = "_" if underscored else "."
    path = path.removeprefix(gone + dot) if gone else path
    wanted = f"{there.replace('.', dot)}{dot}{path}" if there else path
    if not underscored:
        return wanted if wanted in paths else None
    hits = [own for own in paths if own.replace(".", "_") == wanted]
    return hits[0] if len(hits) == 1 else None


# ------------------------------------------------------------------------------------------------------------- tensors to methods


def _method(modules: Mapping[str, Mapping[str, Tensor]], file: Path) -> Method:
    """The one method that all modules are of."""
    methods = [method for method in registry.methods() if method.foreign is not None]
    found: dict[str, list[str]] = {}
    for path, own in modules.items():
        names = set(own) - {"alpha"}
        fits = [m.name for m in methods if m.foreign is not None and m.foreign.marks <= names <= m.foreign.names]
        found.setdefault(fits[0] if fits and names else f"({', '.join(sorted(names)) or 'alpha alone'})", []).append(
            path
        )
    if strange := [name for name in found if name.startswith("(")]:
        raise IngraftError(
            *(f"{file}: no method here has the tensors {name[1:-1]} ({_some(found[name])})." for name in strange)
        )
    if len(found) > 1:
        held = ", ".join(f"{name} at {len(paths)} modules" for name, paths in found.items())
        raise IngraftError(
            f"{file}: holds several methods ({held}); an adapter is of one. Split the file by its tensors' names."
        )
    return registry.load(next(iter(found)))


def _settings(metadata: Mapping[str, str], file: Path) -> dict[str, Any]:
    """diffusers' settings by component and name ("unet.lora_alpha"); nothing where the file has none."""
    text = metadata.get(METADATA)
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError as error:
        raise IngraftError(f"{file}: its metadata {METADATA} is no JSON: {error}.") from error
    if not isinstance(found, dict):
        raise IngraftError(f"{file}: its metadata {METADATA} is no object with fields.")
    return found


def _add_alphas(
    read: dict[str, dict[str, Tensor]], modules: Mapping[str, Mapping[str, str]], settings: Mapping[str, Any]
) -> None:
    """Give each module the alpha that diffusers' settings mean for it, where it has none of its own."""
    for path, own in read.items():
        key = next(iter(modules[path].values()))
        hit = DOTTED.match(key)
        start = f"{hit[1]}." if hit else ""
        alpha = settings.get(f"{start}lora_alpha")
        for pattern, value in (settings.get(f"{start}alpha_pattern") or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                alpha = value
                break
        if "alpha" in own or not isinstance(alpha, int | float) or "lora_down" not in own:
            continue
        stabilised = math.sqrt(len(own["lora_down"])) if settings.get(f"{start}use_rslora") else 1.0
        own["alpha"] = torch.tensor(alpha * stabilised)


def _some(names: list[str]) -> str:
    return ", ".join(names[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
