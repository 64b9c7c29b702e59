"""AdapterHub's habits over the same objects: `init`, `AdapterConfig.load`, `add_adapter`, `train_adapter`, `set_active_adapters`, `Stack`.

Thin on purpose: every name here calls a verb of `ingraft.adapt`. `init` lays a mixin over the model's class, as everywhere in this package, so
the model stays what it is. AdapterHub's names for configs ("pfeiffer", "seq_bn", "houlsby", "double_seq_bn", "par_bn", ...) and its flags
(`mh_adapter`, `output_adapter`, `reduction_factor`) are translated; a flag that would change the maths in a way no method here covers is
refused by name. `Fuse` and `Parallel` are refused as well: fusion trains a part of its own, which the catalogue does not have yet, and
several adapters on one batch are `ingraft.rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ingraft import adapt
from ingraft.adapt.control import control_of, require_control
from ingraft.adapt.files import load, save
from ingraft.adapt.swap import Mixin, is_swapped, swap
from ingraft.errors import IngraftError, nearest
from ingraft.methods.contract import MethodConfig
from ingraft.methods.registry import make_config

M = TypeVar("M", bound=nn.Module)

NAMES = {
    "pfeiffer": "pfeiffer",
    "seq_bn": "pfeiffer",
    "houlsby": "houlsby",
    "double_seq_bn": "houlsby",
    "parallel": "parallel",
    "par_bn": "parallel",
    "prefix_tuning": "prefix",
    "prompt_tuning": "prompt",
    "lora": "lora",
    "ia3": "ia3",
}
"""AdapterHub's config names and the methods they mean."""

OPTIONS = {
    "alpha": "lora_alpha",
    "dropout": "dropout",
    "prefix_length": "num_virtual_tokens",
    "prompt_length": "num_virtual_tokens",
}
"""AdapterHub's option names where ours differ."""


class AdapterConfig:
    """A namespace: `AdapterConfig.load(name, **options)` gives a method's config."""

    @staticmethod
    def load(config: str, **options: Any) -> MethodConfig:
        """A config by AdapterHub's name.

        Args:
            config: one of `NAMES`.
            options: AdapterHub's or our own option names. `mh_adapter` and `output_adapter` choose where a bottleneck sits.

        Raises:
            IngraftError: for names and options that are not known, with the nearest.
        """
        if config not in NAMES:
            raise IngraftError(
                f"AdapterConfig.load: there is no config named {config!r}{nearest(config, NAMES)}. Known: {', '.join(NAMES)}."
            )
        method = NAMES[config]
        attention = options.pop("mh_adapter", None)
        output = options.pop("output_adapter", None)
        ours = {OPTIONS.get(name, name): value for name, value in options.items()}
        if attention is not None or output is not None:
            ours["target_modules"] = _places(method, attention, output)
        return make_config("houlsby" if method == "pfeiffer" and attention else method, ours)


def _places(method: str, attention: bool | None, output: bool | None) -> tuple[str, ...]:
    """Roles that AdapterHub's two flags name."""
    if method not in ("houlsby", "pfeiffer"):
        raise IngraftError(
            f"AdapterConfig.load: mh_adapter and output_adapter belong to sequential bottlenecks, not to {method}."
        )
    attention = method == "houlsby" if attention is None else attention
    output = True if output is None else output
    if not attention and not output:
        raise IngraftError(
            "AdapterConfig.load: mh_adapter and output_adapter are both false, so there would be no adapter."
        )
    if method == "pfeiffer" and not attention:
        return ("block",)
    return (*(("attention-out",) if attention else ()), *(("mlp-out",) if output else ()))


@dataclass(frozen=True)
class Stack:
    """Adapters that act one after the other, in this order."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


def Fuse(*names: str) -> Stack:
    """Refused: AdapterFusion trains a part of its own."""
    raise IngraftError(
        f"Fuse({', '.join(names)}): fusion is not in the catalogue. `ingraft.combine` mixes adapters of one method; `Stack` lets several act."
    )


def Parallel(*names: str) -> Stack:
    """Refused: several adapters on one batch are `ingraft.rows`."""
    raise IngraftError(
        f"Parallel({', '.join(names)}): give each row its adapter with `ingraft.rows(model, [...])` instead."
    )


class AdapterMethods(Mixin):
    """AdapterHub's methods on a model. Copied into the generated class (see `swap.Mixin`)."""

    @staticmethod
    def around(module: Any, base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return base(*args, **kwargs)

    def add_adapter(
        self: Any, adapter_name: str, config: str | MethodConfig = "seq_bn", set_active: bool = False
    ) -> None:
        """Attach an adapter; it acts only if `set_active`."""
        before = control_of(self).call.active if control_of(self) is not None else ()  # type: ignore[union-attr]
        adapt.attach(self, AdapterConfig.load(config) if isinstance(config, str) else config, adapter_name)
        adapt.activate(self, *((adapter_name,) if set_active else before))

    def train_adapter(self: Any, adapter_setup: str | list[str] | Stack) -> None:
        """Let these adapters act and be trained, and nothing else be trained."""
        names = _names(adapter_setup)
        adapt.trainable(self, *names)
        adapt.activate(self, *names)

    def set_active_adapters(self: Any, adapter_setup: str | list[str] | Stack | None) -> None:
        """Let these adapters act; None lets the base answer alone."""
        adapt.activate(self, *_names(adapter_setup))

    def save_adapter(self: Any, save_directory: str | Path, adapter_name: str) -> None:
        """Write one adapter to a folder."""
        save(self, save_directory, adapter_name, overwrite=True)

    def load_adapter(
        self: Any, adapter_name_or_path: str | Path, load_as: str | None = None, set_active: bool = False
    ) -> str:
        """Load an adapter folder; returns the adapter's name."""
        before = control_of(self).call.active if control_of(self) is not None else ()  # type: ignore[union-attr]
        name = load(self, adapter_name_or_path, load_as)
        adapt.activate(self, *((name,) if set_active else before))
        return name

    def delete_adapter(self: Any, adapter_name: str) -> None:
        """Take an adapter off."""
        adapt.detach(self, adapter_name)

    def adapter_summary(self: Any) -> str:
        """The table of `ingraft.status`."""
        return str(adapt.status(self))

    def adapters_config(self: Any) -> dict[str, MethodConfig]:
        """Configs of the attached adapters by name."""
        return {name: adapter.config for name, adapter in require_control(self).adapters.items()}


def _names(setup: str | list[str] | Stack | None) -> tuple[str, ...]:
    if setup is None:
        return ()
    return (setup,) if isinstance(setup, str) else tuple(setup)


def init(model: M) -> M:
    """Give a model AdapterHub's methods, in place. Returns the same object."""
    if not is_swapped(model, (AdapterMethods,)):
        swap(model, AdapterMethods)
    return model
