"""The state of one adapted model, shared by all its hosts.

A `Control` is a plain object, not a module: it holds names and decisions. Trained tensors belong to child modules of the hosts and the root; at
most it knows such a module by name (`encoders`).
There is one for each model, reachable from the root and from every host, so a copy of the model carries a copy of it.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.rows import Call
from ingraft.adapt.swap import Mixin, original_class
from ingraft.adapt.weights import Kind
from ingraft.errors import IngraftError
from ingraft.methods.contract import Method, MethodConfig, Part

ATTRIBUTE = "ingraft_control"
HOST_ATTRIBUTE = "ingraft_host"
STEP = "adapter:step"
"""The step of dropout, beside the adapters' tensors in a Trainer's checkpoint."""


CHILD = "adapter:"
"""How the names of modules that hold an adapter's tensors begin."""


def child_name(adapter: str) -> str:
    """The name under which an adapter's part is registered in its host.

    The colon keeps it apart from every attribute a module could have (an adapter may be called `mlp` or `forward`); dots are not
    allowed in child names.
    """
    return CHILD + adapter.replace(".", "%2E")


def shared_name(adapter: str) -> str:
    """The name under which what all sites of an adapter share is registered at the root, which may host a part of the adapter as well."""
    return child_name(adapter) + ":shared"


@dataclass(kw_only=True)
class Adapter:
    """One attached adapter.

    Attributes:
        config, method: what it is.
        sites: paths of its hosts in model order, with the role of each.
        saved_whole: paths of the modules that are trained in full beside the method's own sites (`modules_to_save`).
        tokens: modules some of whose rows are trained beside them, each with the tokens (`trainable_token_indices`).
        seed: of its initial values and its dropout.
        dropout: whether it has any.
        virtual: how many virtual tokens or prefix slots it gives a row.
        behind: how many of the virtual tokens stand behind the row's prompt rather than in front of the row.
        ground: the adapters that were merged into the base when it was attached: it acts on the base with them, and on no other.
        facts: what a loaded adapter's file said beyond its tensors (base fingerprint, metrics).
    """

    name: str
    config: MethodConfig
    method: Method
    sites: dict[str, str]
    saved_whole: tuple[str, ...]
    seed: int
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    dropout: bool = False
    virtual: int = 0
    ground: tuple[str, ...] = ()
    behind: int = 0
    facts: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def beside(self) -> frozenset[str]:
        """Paths of the sites that are not the method's own."""
        return frozenset((*self.saved_whole, *self.tokens))


@dataclass(kw_only=True, eq=False)
class Kept:
    """A base parameter set aside by a merge: the very tensor, to be put back.

    Attributes:
        cls: the module's own class, where that changed with the parameter.
    """

    path: str
    name: str
    parameter: nn.Parameter | None
    cls: type[nn.Module] | None = None


@dataclass(kw_only=True, eq=False)
class Control:
    """Which adapters a model has, which act, and what a merge set aside.

    Attributes:
        call: what acts now.
        replaying: a checkpointed block is being run, forward or again, with the call it was first run with.
        merged, kept: the adapters written into the base, and the parameters they displaced.
        required_grad: which base parameters required gradients before the first attach.
        unchecked: the next forward verifies that no host is bypassed.
        rows_found: stacks whose hosts know whether what they see goes with rows (`probe.py`); watch: where they note it while that is found out.
        auto_step: dropout moves on with every forward; False once a trainer says where it stands.
        joined: what is kept of rows served together (`joint.Kept`); quick: the call that it may serve in the forward under way, None if there is none.
        causal: whether the model's tokens see only what comes before them, and the model has no encoder.
        keep_virtual: leave virtual positions in the output (PEFT's habit).
        packing: rows are laid end to end where they can be (`flat.py`); packs: the model was found to keep them apart then.
        spans: inputs remembered on the way through a span; empty between forwards.
        encoders: the modules at the root whose results the attention and input parts of an adapter are handed.
        shared: these results, as far as they were asked for in this forward; empty between forwards.
        walk: the model's own modules as they were last found (`walk.py`); moulds: what was learned of adapters' files (`files/mould.py`).
        running: a forward is under way, of the model or of a stack of it that was called from outside.
        restore: what to put back when adapters go.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict[str, Adapter])
    call: Call = field(default_factory=Call)
    replaying: bool = False
    merged: tuple[str, ...] = ()
    kept: list[Kept] = field(default_factory=list[Kept])
    required_grad: dict[str, bool] = field(default_factory=dict[str, bool])
    unchecked: bool = True
    rows_found: set[str] = field(default_factory=set[str])
    watch: Any = None
    joined: Any = None
    quick: Call | None = None
    causal: bool = False
    keep_virtual: bool = False
    packing: bool = False
    packs: bool = False
    auto_step: bool = True
    spans: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    encoders: dict[str, nn.Module] = field(default_factory=dict[str, nn.Module])
    shared: dict[str, Any] = field(default_factory=dict[str, Any])
    walk: Any = None
    moulds: list[Any] = field(default_factory=list[Any])
    running: bool = False
    restore: dict[str, Any] = field(default_factory=dict[str, Any])
    laid: list[type[Mixin]] = field(default_factory=list["type[Mixin]"])
    """Further mixins over the root (`ingraft.peft`'s), which come off with the last adapter."""

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which learn about themselves."""
        return {**self.__dict__, "walk": None, "moulds": []}

    def shared_of(self, name: str) -> Any:
        """What the adapter's shared module returns for this forward, None if it has none. Outside a forward nothing is kept of it."""
        if name in self.shared:
            return self.shared[name]
        if name not in self.encoders:
            return None
        made = self.encoders[name]()
        if self.running:
            self.shared[name] = made
        return made

    def acted_on_by(self, name: str) -> tuple[str, ...]:
        """The adapters that this one acts on (a fusion's)."""
        adapter = self.adapters[name]
        return () if adapter.method.over is None else adapter.method.over(adapter.config)

    def standing(self) -> list[str]:
        """The adapters that were attached on top of what is merged now."""
        return [name for name, adapter in self.adapters.items() if self.merged and adapter.ground == self.merged]

    def require(self, name: str) -> Adapter:
        """The adapter of that name.

        Raises:
            IngraftError: if there is none.
        """
        if name not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise IngraftError(f"No adapter named {name!r} is attached (attached: {known}).")
        return self.adapters[name]


@dataclass(kw_only=True, eq=False)
class HostState:
    """What a host knows about itself.

    Attributes:
        path: full name in the model; it salts dropout, so that no two sites share a mask.
        kind: how its weight is stored; None for modules that are no layer of their own.
        known_forward: whether the module's own forward is the product its kind knows, so that shortcuts hold.
        carries_rows: whether dimension 0 of its input goes with the rows of the batch, as far as its place in the model tells.
        by_row: the same, as found out by changing a row; None if nobody asked yet.
        projections: names of the layers within an attention that make its keys and values, where that is known.
        opens: exits of the spans that begin at this module's input (the MLP that a parallel adapter runs beside).
        seen: the acting sets of forward passes since the last backward, for recomputation outside transformers' checkpointing.
    """

    control: Control
    path: str
    kind: Kind | None
    known_forward: bool
    carries_rows: bool = True
    by_row: bool | None = None
    roles: dict[str, str] = field(default_factory=dict[str, str])
    projections: tuple[str, ...] = ()
    opens: dict[str, set[str]] = field(default_factory=dict[str, set[str]])
    ran: bool = False
    seen: list[Call] = field(default_factory=list[Call])
    seen_without_grad: Call | None = None
    replayed: bool = False
    salt: int = field(init=False)
    """A stable number for this site."""

    def __post_init__(self) -> None:
        self.salt = zlib.crc32(self.path.encode())

    def current(self) -> Call:
        """The call this forward belongs to.

        In a forward pass that is the control's. In a recomputation during backward it is the one the forward pass saw: transformers'
        own checkpointing restores it explicitly (`replaying`); other users of `torch.utils.checkpoint` get the last one seen here, and an
        error rather than a guess where two different ones are possible.
        """
        control = self.control
        if torch.compiler.is_compiling() or control.replaying:
            return control.call
        if torch._C._current_graph_task_id() == -1:  # not inside backward
            self._see(control.call)
            return control.call
        self.replayed = True
        candidates = self.seen or ([self.seen_without_grad] if self.seen_without_grad else [])
        if len(candidates) > 1:
            raise IngraftError(
                f"Gradient checkpointing recomputes {self.path}, which ran with different adapters since the last backward; which of them "
                "is meant cannot be told. Call backward after each forward, or let the model checkpoint itself "
                "(`model.gradient_checkpointing_enable()`), which records it."
            )
        return candidates[0] if candidates else control.call

    def _see(self, call: Call) -> None:
        if self.replayed:
            self.seen, self.seen_without_grad, self.replayed = [], None, False
        if not torch.is_grad_enabled():
            # Reentrant checkpointing runs its forward without grad, and so does a reference pass: believed only if nothing else is known.
            self.seen_without_grad = call
        elif not self.seen or self.seen[-1] is not call:
            # Two that differ are enough to know that it cannot be told.
            self.seen = [other for other in self.seen if other.acting != call.acting][-1:] + [call]


def control_of(model: nn.Module) -> Control | None:
    """The control of an adapted model, or None for a model that nothing is attached to."""
    return model.__dict__.get(ATTRIBUTE)


def require_control(model: nn.Module) -> Control:
    """The control of an adapted model.

    Raises:
        IngraftError: if nothing is attached to it.
    """
    control = control_of(model)
    if control is None:
        raise IngraftError(
            "Nothing is attached to this model; call `ingraft.attach(model, config)` or `ingraft.load(model, folder)` first."
        )
    return control


def host_state(module: nn.Module) -> HostState | None:
    """The host state of a module, or None if it hosts nothing."""
    return module.__dict__.get(HOST_ATTRIBUTE)


def release(module: nn.Module) -> None:
    """Take a module's host state away, if nothing lies in the module or over it."""
    state = host_state(module)
    if state is None or state.opens or original_class(module) is not type(module):
        return
    if not any(part_of(module, name) for name in state.control.adapters):
        del module.__dict__[HOST_ATTRIBUTE]


def shared_of(model: nn.Module, adapter: str) -> nn.Module | None:
    """What all sites of an adapter share, or None."""
    return model._modules.get(shared_name(adapter))


def part_of(host: nn.Module, adapter: str) -> Part | None:
    """The part that an adapter has in this host, or None."""
    part = host._modules.get(child_name(adapter))
    return part if isinstance(part, Part) else None


def holds_parts(host: nn.Module) -> bool:
    """Whether any adapter has a part in this host. Parts are registered last, so the first look finds one if there are any."""
    return any(name.startswith(CHILD) and isinstance(host._modules[name], Part) for name in reversed(host._modules))
