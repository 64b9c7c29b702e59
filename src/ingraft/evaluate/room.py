"""Room in a row: the places that a base has (`bases.places`), less those that virtual tokens take.

Whoever knows the model asks it (`room`); before it is loaded, the recipe tells (`virtual_tokens`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from ingraft.adapt.control import control_of
from ingraft.adapt.virtual import longest
from ingraft.bases.places import ENDLESS as ENDLESS
from ingraft.bases.places import places
from ingraft.methods.contract import AttentionPart, InputPart

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader


def room(model: nn.Module) -> int:
    """How many tokens a row may have, its answer counted, with the adapters that act now; `ENDLESS` where the base declares no number."""
    found = places(model.config)
    control = control_of(model)
    if control is None or found == ENDLESS:
        return found
    return found - longest(control, control.call, InputPart) - longest(control, control.call, AttentionPart)


def hold(tokenizer: Reader, model: nn.Module) -> None:
    """Let the tokenizer declare no more than the model, as it stands, has room for: data are then cut to it."""
    tokenizer.model_max_length = min(tokenizer.model_max_length, max(2, room(model)))


def virtual_tokens(method: str, options: Mapping[str, Any], init_adapter: str | Path | None = None) -> int:
    """How many virtual tokens an adapter is going to put into every row, known before a model is loaded.

    Args:
        method, options: as in a recipe.
        init_adapter: the folder that the adapter comes from instead, if it does.

    Raises:
        IngraftError: options that the method refuses; a folder whose config cannot be read.
    """
    if init_adapter is not None:
        from ingraft import durable

        found = durable.read_json(Path(init_adapter) / "adapter_config.json").get("num_virtual_tokens")
    else:
        from ingraft.methods import registry

        found = getattr(registry.make_config(method, options), "num_virtual_tokens", 0)
    return found if isinstance(found, int) else 0
