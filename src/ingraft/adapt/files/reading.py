"""What every kind of file has in common once it is understood: a free name, and an adapter attached with the file's values."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ingraft.adapt.control import Adapter, control_of, require_control
from ingraft.adapt.files import foreign, hub
from ingraft.adapt.lifecycle import NAME, attach
from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig, Part

Fill = Callable[[Adapter, dict[str, Part], nn.Module | None], None]


def free_name(model: nn.Module, name: str) -> str:
    """The name, if no adapter has it.

    Raises:
        IngraftError: one has.
    """
    control = control_of(model)
    if control is not None and name in control.adapters:
        raise IngraftError(
            f"load: an adapter named {name!r} is attached already; give another name (name=...) or detach it first."
        )
    return name


def attach_read(model: nn.Module, config: MethodConfig, name: str, seed: int, fill: Fill, *, trainable: bool) -> None:
    """Attach what was read; unless it is to be trained, trainability of everything else stays as it is."""
    attach(model, config, name, seed=seed, strict=False, train=trainable, fill=fill)


def load_foreign(model: nn.Module, file: Path, name: str, *, trainable: bool) -> str:
    """Load a file that has tensors and no config (`foreign.py`)."""
    opened = foreign.open_file(model, file)
    if opened.elsewhere:
        others = ", ".join(f"{count} modules under {part!r}" for part, count in opened.elsewhere.items())
        warnings.warn(f"{file}: {others} are for another model; load the file into that one too.", stacklevel=3)

    return _attach_opened(model, opened, file, name, trainable=trainable)


def load_hub(model: nn.Module, folder: Path, raw: Mapping[str, Any], name: str | None, *, trainable: bool) -> str:
    """Load a folder of AdapterHub's (`hub.py`)."""
    said = raw.get("name")
    name = free_name(model, name or (said if isinstance(said, str) and NAME.fullmatch(said) else "default"))
    opened = hub.open_folder(model, folder, raw)
    if (folder / hub.HEAD).is_file():
        warnings.warn(
            f"{folder}: the prediction head beside the adapter is not read; the model keeps the head it has.",
            stacklevel=3,
        )
    return _attach_opened(model, opened, folder, name, trainable=trainable)


def _attach_opened(model: nn.Module, opened: foreign.Opened, where: Path, name: str, *, trainable: bool) -> str:
    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        del adapter, shared
        opened.fill(parts, where)

    attach_read(model, opened.config, name, 0, fill, trainable=trainable)
    require_control(model).adapters[name].facts = {"found": opened.found, "file": where.name}
    return name
