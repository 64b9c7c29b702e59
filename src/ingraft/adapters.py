"""AdapterHub's habits over the same objects: `init`, `AdapterConfig.load`, `add_adapter`, `train_adapter`, `set_active_adapters`, `Stack`, `Fuse`.

Thin on purpose: every name here calls a verb of `ingraft.adapt`. `init` lays a mixin over the model's class, as everywhere in this package, so
the model stays what it is. AdapterHub's names for configs ("pfeiffer", "seq_bn", "houlsby", "double_seq_bn", "par_bn", ...) and its flags
(`mh_adapter`, `output_adapter`, `reduction_factor`) are translated; a flag that would change the maths in a way no method here covers is
refused by name. A fusion of adapters is an adapter of its own here (method `fusion`), named after those it fuses. `Parallel` is refused:
several adapters on one batch are `ingraft.rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from ingraft import adapt
from ingraft.adapt.control import control_of, require_control
from ingraft.adapt.files import load, save
from ingraft.adapt.swap import Mixin, is_swapped, swap
from ingraft.errors import IngraftError, nearest
from ingraft.methods.contract import MethodConfig
from ingraft.methods.fusion import FusionConfig
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
    "compacter": "compacter",
    "compacter++": "compacter",
    "loreft": "reft",
    "noreft": "reft",
    "direft": "reft",
}
"""AdapterHub's config names and the methods they mean."""

PRESETS: dict[str, dict[str, Any]] = {
    "compacter++": {"target_modules": ("block",)},
    "loreft": {"r": 1, "positions": "f3", "dropout": 0.05},
    "noreft": {"r": 1, "positions": "f3", "dropout": 0.05, "orthogonality": False},
    "direft": {"r": 1, "positions": "f3", "dropout": 0.05, "orthogonality": False, "subtract_projection": False},
}
"""Options that such a name stands for, where they are not our defaults."""

FUSIONS = {"dynamic": FusionConfig(), "static": FusionConfig(value=False, regularization=False)}
"""AdapterHub's names for fusions."""

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
        if method == "reft":
            options = _edited(options)
        ours = {**PRESETS.get(config, {}), **{OPTIONS.get(name, name): value for name, value in options.items()}}
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


def _edited(options: dict[str, Any]) -> dict[str, Any]:
    """AdapterHub's options of ReFT as ours."""
    first, last = options.pop("prefix_positions", None), options.pop("suffix_positions", None)
    tied, layers = options.pop("tied_weights", False), options.pop("layers", "all")
    if first is not None or last is not None:
        first, last = 3 if first is None else first, last or 0
        options["positions"] = "+".join(f"{side}{count}" for side, count in (("f", first), ("l", last)) if count)
        if first and last and not tied:
            raise IngraftError(
                "AdapterConfig.load: here first and last tokens share one edit; say tied_weights=True, or attach two adapters, one with "
                "positions='f...' and one with positions='l...'."
            )
    return options if layers == "all" else {**options, "layers_to_transform": layers}


@dataclass(frozen=True)
class Stack:
    """Adapters that act one after the other, in this order."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)


@dataclass(frozen=True)
class Fuse:
    """Adapters that a fusion weighs against one another."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)

    @property
    def adapter(self) -> str:
        """The name under which `add_adapter_fusion` attaches the fusion."""
        return "fusion." + ".".join(self.names)


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

    def add_adapter_fusion(
        self: Any,
        adapter_names: Fuse | list[str],
        config: str | FusionConfig = "dynamic",
        name: str | None = None,
        set_active: bool = False,
    ) -> None:
        """Attach a fusion of adapters that are attached already; it acts only if `set_active`.

        Args:
            config: "dynamic", "static", or a config whose `adapters` are left empty.
        """
        fuse = adapter_names if isinstance(adapter_names, Fuse) else Fuse(*adapter_names)
        if isinstance(config, str) and config not in FUSIONS:
            raise IngraftError(f"add_adapter_fusion: there is no fusion named {config!r}{nearest(config, FUSIONS)}.")
        before = require_control(self).call.active
        chosen = FUSIONS[config] if isinstance(config, str) else config
        adapter = name or fuse.adapter
        adapt.attach(self, replace(chosen, adapters=fuse.names), adapter)
        adapt.activate(self, *((adapter,) if set_active else before))

    def train_adapter_fusion(self: Any, adapter_setup: Fuse | list[str]) -> None:
        """Let this fusion act and be trained; the adapters in it stay as they are."""
        fuse = adapter_setup if isinstance(adapter_setup, Fuse) else Fuse(*adapter_setup)
        AdapterMethods.train_adapter(self, fuse)

    def save_adapter_fusion(self: Any, save_directory: str | Path, adapter_names: Fuse | list[str]) -> None:
        """Write one fusion to a folder, the adapters in it beside it."""
        fuse = adapter_names if isinstance(adapter_names, Fuse) else Fuse(*adapter_names)
        save(self, save_directory, _fusion(self, fuse), overwrite=True)

    def load_adapter_fusion(
        self: Any, adapter_fusion_name_or_path: str | Path, load_as: str | None = None, set_active: bool = False
    ) -> str:
        """Load a fusion, and of the adapters in it those that are not attached yet; returns its name."""
        return AdapterMethods.load_adapter(self, adapter_fusion_name_or_path, load_as, set_active)

    def train_adapter(self: Any, adapter_setup: str | list[str] | Stack | Fuse) -> None:
        """Let these adapters act and be trained, and nothing else be trained."""
        names = _names(self, adapter_setup)
        adapt.trainable(self, *names)
        adapt.activate(self, *names)

    def set_active_adapters(self: Any, adapter_setup: str | list[str] | Stack | Fuse | None) -> None:
        """Let these adapters act; None lets the base answer alone."""
        adapt.activate(self, *_names(self, adapter_setup))

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


def _names(model: nn.Module, setup: str | list[str] | Stack | Fuse | None) -> tuple[str, ...]:
    if setup is None:
        return ()
    if isinstance(setup, Fuse):
        return (_fusion(model, setup),)
    return (setup,) if isinstance(setup, str) else tuple(setup)


def _fusion(model: nn.Module, fuse: Fuse) -> str:
    """The attached fusion of these adapters.

    Raises:
        IngraftError: if there is none.
    """
    control = require_control(model)
    found = [name for name in control.adapters if control.acted_on_by(name) == fuse.names]
    if not found:
        raise IngraftError(
            f"Fuse({', '.join(fuse.names)}): no fusion of these adapters is attached; call add_adapter_fusion or load_adapter_fusion first."
        )
    return found[-1]


def init(model: M) -> M:
    """Give a model AdapterHub's methods, in place. Returns the same object."""
    if not is_swapped(model, (AdapterMethods,)):
        swap(model, AdapterMethods)
    return model
