"""The seam between the core and what is particular to a kind of model.

The core asks the questions below; for a plain `nn.Module` the answers stand here, for a transformers model in `hf.py`, which is imported only
when such a model turns up. Nothing else in the core knows transformers.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from ingraft.adapt.control import HOST_ATTRIBUTE, Control, HostState, host_state
from ingraft.adapt.root import Root, SequentialRoot
from ingraft.adapt.stacked import reads
from ingraft.adapt.swap import Forward, Mixin, is_swapped, original_class, swap, unswap
from ingraft.adapt.walk import path_of
from ingraft.adapt.weights import Kind, kind_of
from ingraft.errors import IngraftError
from ingraft.methods.contract import AttentionPart, InputPart, Method, SiteFacts


def _hf(model: nn.Module) -> ModuleType | None:
    """`hf.py`, if this is a transformers model."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None or not isinstance(model, transformers.PreTrainedModel):
        return None
    from ingraft.adapt import hf

    return hf


def root_mixin(model: nn.Module) -> type[Mixin]:
    """The mixin laid over the root."""
    hf = _hf(model)
    return hf.ModelRoot if hf else SequentialRoot if isinstance(model, nn.Sequential) else Root


def check_method(model: nn.Module, method: Method) -> None:
    """Refuse a method that this model has no place for.

    Raises:
        IngraftError: with what to use instead.
    """
    hf = _hf(model)
    if hf:
        hf.check_method(model, method)
    elif issubclass(method.part, AttentionPart | InputPart):
        raise IngraftError(
            f"{method.name} acts on a transformers model's attention or input; {original_class(model).__name__} is none. Choose a weight method or a bottleneck."
        )


def settle(model: nn.Module) -> None:
    """Bring the model in line with what is attached now; called after every attach and detach."""
    hf = _hf(model)
    if hf:
        hf.settle(model)


def why_no_packing(model: nn.Module) -> str | None:
    """Why rows of this model cannot be laid end to end, as a sentence; None if nothing is seen that speaks against it."""
    hf = _hf(model)
    return hf.why_no_packing(model) if hf else f"{original_class(model).__name__} is no transformers model."


def in_use(model: nn.Module, module: nn.Module) -> bool:
    """Whether a module of the model needs its host state although no part lies in it."""
    state = host_state(module)
    if state is not None and (is_swapped(module, (Unfused,)) or reads(module)):
        sites = {path for adapter in state.control.adapters.values() for path in adapter.sites}
        if any(lies_in(path, state.path) for path in sites):
            return True
    hf = _hf(model)
    return bool(hf and hf.in_use(module))


def input_path(model: nn.Module) -> str:
    """Path of the module that embeds tokens."""
    hf = _hf(model)
    return hf.inner_path(model) if hf else ""


def text_path(model: nn.Module) -> str:
    """Path of the part that reads text, in a model that also sees or hears; "" elsewhere."""
    hf = _hf(model)
    return hf.text_path(model) if hf else ""


def token_path(model: nn.Module) -> str:
    """Path of the embedding of a model's tokens.

    Raises:
        IngraftError: if it names none.
    """
    try:
        tokens = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:  # transformers' answer for a model of pictures
        tokens = None
    if not isinstance(tokens, nn.Embedding):
        raise IngraftError(
            f"{original_class(model).__name__} names no embedding of tokens; name one in target_modules."
        )
    path = path_of(model, tokens)
    assert path is not None, "it was reached from the model"
    return path


FUSED = {nn.TransformerEncoder: "use_nested_tensor", nn.TransformerEncoderLayer: "activation_relu_or_gelu"}
"""Modules of torch that pass over their children in evaluation, and an attribute that keeps them from it where it is false."""


class Unfused(Mixin):
    """A module that would pass over its children does not while an adapter acts inside it. Where none does it is left alone, to the bit."""

    @staticmethod
    def around(module: nn.Module, base: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = host_state(module)
        assert state is not None
        control = state.control
        names = {name for group in state.current().groups for name in group.names} - set(control.merged)
        inside = any(lies_in(path, state.path) for name in names for path in control.adapters[name].sites)
        switch = next(attribute for cls, attribute in FUSED.items() if isinstance(module, cls))
        if not inside or switch not in module.__dict__:
            return base(*args, **kwargs)
        before = module.__dict__[switch]
        module.__dict__[switch] = 0
        try:
            return base(*args, **kwargs)
        finally:
            module.__dict__[switch] = before


def lies_in(path: str, ancestor: str) -> bool:
    """Whether a module is another one or lies inside it."""
    return not ancestor or path == ancestor or path.startswith(ancestor + ".")


def enter_host(model: nn.Module, control: Control, path: str) -> None:
    """Keep frameworks from passing over a host."""
    parts = path.split(".") if path else []
    for depth in range(len(parts)):
        above = ".".join(parts[:depth])
        module = model.get_submodule(above)
        if not isinstance(module, tuple(FUSED)) or is_swapped(module, (Unfused,)):
            continue
        if host_state(module) is None:
            module.__dict__[HOST_ATTRIBUTE] = HostState(
                control=control,
                path=above,
                kind=None,
                known_forward=False,
                carries_rows=carries_rows(model, above),
            )
        swap(module, Unfused)


def leave_host(module: nn.Module) -> None:
    """Undo `enter_host`."""
    if is_swapped(module, (Unfused,)):
        unswap(module, Unfused)


def site_facts(model: nn.Module, path: str, module: nn.Module, role: str) -> SiteFacts:
    """What a part at the attention or the input may look at."""
    hf = _hf(model)
    assert hf is not None, "check_method refuses these roles on plain modules"
    return hf.site_facts(model, path, module, role)


def output_head(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits, which "all-linear" leaves alone; None where the model names none."""
    hf = _hf(model)
    return hf.output_head(model) if hf else None


def width_of(model: nn.Module, module: nn.Module, kind: Kind | None) -> int:
    """Width of what a module of this kind returns: of its own weight, of the config, or of the last layer inside it."""
    if kind is not None and (shape := kind.shape_of(module)):
        return shape[0]
    hidden = getattr(getattr(model, "config", None), "hidden_size", None)
    if isinstance(hidden, int):
        return hidden
    inner = [child for child in module.modules() if (k := kind_of(child)) and k.name in ("linear", "conv1d-transposed")]
    if not inner:
        return 0
    last = kind_of(inner[-1])
    assert last is not None
    return next(iter(last.shape_of(inner[-1])), 0)  # a computed weight has no shape of its own


def check_sizes(model: nn.Module) -> None:
    """Refuse a model with layers that do not know their sizes yet (torch's lazy ones)."""
    lazy = [
        path
        for path, module in model.named_modules()
        if any(p is not None and is_lazy(p) for p in module._parameters.values())
    ]
    if lazy:
        raise IngraftError(
            f"{', '.join(lazy)}: no weights yet (a lazy layer). Run the base once, which gives them their sizes, and attach then."
        )


def carries_rows(model: nn.Module, path: str) -> bool:
    """Whether dimension 0 of this module's input goes with the rows of the batch."""
    hf = _hf(model)
    module = model.get_submodule(path)
    parts = path.split(".") if path else []
    for depth in range(len(parts) + 1):
        ancestor = model.get_submodule(".".join(parts[:depth]))
        if getattr(ancestor, "batch_first", True) is False:
            return False
    return hf.carries_rows(module, path) if hf else True
