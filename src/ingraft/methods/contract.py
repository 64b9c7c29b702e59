"""What a tuning method has to say, and nothing more.

A method is one file: a frozen config (hyperparameters, inert data), one small `nn.Module` per site (a *part*: the trained tensors of one
adapter at one place), and a `Method` record of facts. Everything that is the same for every method - injection, activation, merge,
unmerge, mixed batches, dtype policy, saving, counting - is written once, in `ingraft.adapt`, against the classes below.

Five kinds of part cover the field, named after what they act on:

* `WeightPart` states how the layer's matrix changes: `weight(W, b) -> (W', b')`. That is the definition and the only obligatory maths.
  A `ShortcutPart` adds a cheaper way round the base's own product: `before(x)` ahead of it and `after(x, y, site)` behind it. Both act on
  rows independently, which is what lets one base call serve a batch whose rows belong to different adapters.
* `ParameterPart` (full tuning, extra heads) states values for a module's own parameters by name, matrix or not.
* `OutputPart` (bottleneck adapters) changes what a module returns: `after(x, y, site)`. It has no weight form, so it cannot be merged.
* `AttentionPart` (prefix tuning and kin) gives keys and values that the attention of a layer sees ahead of the real tokens.
* `InputPart` (prompt tuning and kin) gives virtual embeddings in front of the input.

Why abstract classes and not flags: the host asks `isinstance(part, ShortcutPart)`, a declaration, and never `hasattr`, a guess. A part
class is final; to vary one, import its maths (a variant is another method).

Numerics: parameters are float32 (the optimiser's copy) and are *used* in the dtype of the tensor they meet: `self.lora_A.to(x.dtype)`.
A file saved in the base's dtype therefore gives the same bits as the adapter in memory.

Legend for suffixes: O out features, I in features, R rank, B rows, T positions, P virtual positions, H key-value heads, D width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ingraft.methods.config import MethodConfig as MethodConfig
from ingraft.methods.config import tuple_of_names as tuple_of_names
from ingraft.methods.layout import Foreign as Foreign
from ingraft.methods.layout import HubLayout as HubLayout
from ingraft.methods.layout import PeftLayout as PeftLayout

Composition = Literal["add", "chain"]


class Site(ABC):
    """What a part may ask of the place it sits in. The host makes one for each call; a part never keeps it."""

    @property
    @abstractmethod
    def role(self) -> str:
        """The site's, as in `SiteFacts`."""

    @abstractmethod
    def op(self, x: Tensor, matrix_KI: Tensor, dropout: float = 0.0) -> Tensor:
        """Apply a matrix the way this layer applies its own weight (product, convolution, lookup), without bias.

        Args:
            dropout: of entries of x, as `dropout` does; a product keeps x for backward then, not what is left of it.
        """

    @abstractmethod
    def mix(self, u: Tensor, matrix_OK: Tensor) -> Tensor:
        """Apply a matrix pointwise to the output channels of `op`."""

    @abstractmethod
    def plus(self, y: Tensor, u: Tensor, matrix_OK: Tensor) -> Tensor:
        """y + `mix` of u, in the dtype of y; where that is a plain product, rounded once, as a sum."""

    @abstractmethod
    def own(self, u: Tensor) -> Tensor:
        """Hidden units (..., K) with those of other rows' adapters at zero (`Part.stacks`); u itself where one adapter is served."""

    @abstractmethod
    def low_rank(
        self, x: Tensor, y: Tensor, A_RI: Tensor, B_OR: Tensor, scale: float = 1.0, dropout: float = 0.0
    ) -> Tensor:
        """y + scale B A x, both products in this layer's way (`mix` of `op`); where that is a plain product, at the least memory and time.

        Args:
            y: what the layer returned so far; it may be changed in place, so only the result is to be used from then on.
            A_RI, B_OR: as they are trained; they are used in the dtype of x.
            dropout: of entries of x, as in `op`.
        """

    @abstractmethod
    def weight(self) -> Tensor:
        """The layer's weight as this part finds it, dense, (out, in), without gradient."""

    @abstractmethod
    def base(self, x: Tensor) -> Tensor:
        """Run the module's own forward again on another first input."""

    @abstractmethod
    def out(self, v_O: Tensor) -> Tensor:
        """Reshape a vector over output channels so that it broadcasts against the layer's output."""

    @abstractmethod
    def inp(self, v_I: Tensor) -> Tensor:
        """Reshape a vector over input channels so that it broadcasts against the layer's input."""

    @abstractmethod
    def drops(self, x: Tensor, p: float) -> bool:
        """Whether `dropout` does anything now: only while training, and never to tokens."""

    @abstractmethod
    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Zero entries with probability p while training, as a function of (adapter seed, step, site, row, position) alone."""

    @abstractmethod
    def others(self, names: Sequence[str], x: Tensor, y: Tensor) -> list[Tensor]:
        """What the parts of these adapters (such that `adds`) would add here. For methods that act on other adapters (`Method.over`)."""

    @abstractmethod
    def prompt_mask(self, y: Tensor) -> Tensor:
        """Which tokens of the layer's input or output y (B, T, ...) belong to the prompt: (B, T) bool. For parts with `reads_context`."""

    @abstractmethod
    def tasks(self) -> Tensor | None:
        """(B,) the task of each row at hand, as `adapt.context` told it; None if nobody did. For parts with `reads_context`."""


@dataclass(frozen=True, kw_only=True)
class RowsAtHand:
    """The rows that an attention or input part serves in one call: those that carry its adapter.

    Attributes:
        count: B; each row as often as the model repeats it (beams).
        dtype: of use: what the model computes in.
        tasks: (B,) the task of each, as `adapt.context` told it; None if nobody did.
        project: what the attention's own projections make of hidden states (P, width): keys and values, each (H, P, D), without position
            (attention parts whose site `projects`).
    """

    count: int
    dtype: torch.dtype = torch.float32
    tasks: Tensor | None = None
    project: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


class Part(nn.Module, ABC):
    """The trained tensors of one adapter at one site.

    Frozen tensors that a part needs are buffers. A persistent one is saved with the adapter; one that follows from the seed, the base or the
    config is registered with `persistent=False`.
    """

    bank: tuple[nn.Module, ...] = ()
    """The module that all sites of the adapter share, if the part uses it: `self.bank = (facts.shared,)`. In a tuple, because it is
    registered once, at the root, and not again in every part."""

    training_state: ClassVar[tuple[str, ...]] = ()
    """Names of persistent buffers that `Method.update` keeps book in: checkpoints hold them, an adapter's file does not."""

    stacks: ClassVar[Mapping[str, int | None] | None] = None
    """For a part whose code can serve rows of several adapters at once: all its tensors, each with the dimension that runs over hidden units
    (a rank, a bottleneck), or None where it has none and is given row by row; and its numbers that may differ, as a factor on hidden units.
    Such code sends hidden units through `site.own` (or `mix`, or `low_rank`) before they mix, and row vectors through `site.out` or `inp`."""

    neutral: ClassVar[float] = 0.0
    """What a tensor that is given row by row holds for rows without such an adapter."""

    reads_context: ClassVar[bool] = False
    """Whether the part asks what the rows are about: which tokens are the prompt, which task a row has."""


class ObservingPart(ABC):
    """A part that is shown the layer's inputs before training (`ingraft.adapt.prepare`), to start from data. Mixed into a part class."""

    @abstractmethod
    def observe(self, x: Tensor, site: Site) -> None:
        """Take note of one batch of the layer's inputs, real rows and tokens only: (N, in). The base answers alone meanwhile."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Factors:
    """A change of low rank: W' = W + scale B A, b' = b + bias, whatever W and b are. Float32, not rounded to a dtype of use."""

    B_OR: Tensor
    A_RI: Tensor
    scale: float = 1.0
    bias: Tensor | None = None


class WeightPart(Part):
    """A part defined by how it changes a weight. Abstract."""

    composition: ClassVar[Composition] = "add"
    needs_matrix: ClassVar[bool] = True
    """False for methods that act on vectors too (norms)."""

    @abstractmethod
    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The definition: the layer's weight and bias as this adapter wants them.

        Args:
            W: (out, in) for layers with a matrix, the stored shape otherwise (a norm's (width,)). Not to be changed in place.
            b: (out,) or None where the layer has no bias.
        """

    def low_rank(self) -> Factors | None:
        """The change as a product of two thin matrices, for a method whose change always is one; combining adapters is then exact and cheap."""
        return None


class ShortcutPart(WeightPart):
    """A weight part that also knows a way round the weight. Abstract."""

    additive: ClassVar[bool] = False
    """True if `after` only adds to y and `before` changes nothing: the host then leaves the bias fused in the base's product."""
    kinds: ClassVar[frozenset[str]] = frozenset()
    """Kinds of layer where the shortcut holds; empty for all. Elsewhere the definition is used."""

    def holds(self, kind: str) -> bool:
        """Whether the shortcut holds on this kind of layer, and pays with this part's sizes."""
        return not self.kinds or kind in self.kinds

    def before(self, x: Tensor, site: Site) -> Tensor:
        """What the base is to see instead of x."""
        del site
        return x

    @abstractmethod
    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What the layer returns (without bias), given this part's own `before(x)` and the base's product y of it."""

    def bias(self, b: Tensor | None) -> Tensor | None:
        """The bias that the host adds behind a non-additive `after`."""
        return b


class ParameterPart(Part):
    """A part that gives new values to parameters, whatever their names and shapes. Abstract.

    Its own trained tensors carry the names of the parameters they stand for. Where the base ties two parameters into one, the host makes
    the parts at both ends share their tensor as well.
    """

    composition: Composition = "add"
    copies: ClassVar[bool] = True
    """Whether the values are the part's own tensors as they are, which costs nothing to compute again."""

    @abstractmethod
    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """New values for some or all of the module's parameters, in the module's own layout."""


class OutputPart(Part):
    """A part that changes what a module returns. Abstract."""

    @abstractmethod
    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """The new output, given the module's input x and its output y (bias included; element 0 where it returns a tuple)."""


class AddingPart(OutputPart):
    """An output part that adds something to what a block or projection returns. Abstract.

    What it adds is asked for by itself, so that others can act on it (`adds`).
    """

    @abstractmethod
    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        """What is added, given the module's input x and its output y."""

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return added(x, y, self.change(x, y, site), site)


def adds(part: type[Part]) -> bool:
    """Whether what parts of this class add can be asked for by itself (`addition`), so that methods over adapters can act on it."""
    return issubclass(part, AddingPart) or (issubclass(part, ShortcutPart) and part.additive)


def addition(part: Part, x: Tensor, y: Tensor, site: Site) -> Tensor:
    """What a part adds to a module's output y, given its input x."""
    if isinstance(part, AddingPart):
        return part.change(x, y, site)
    assert isinstance(part, ShortcutPart) and part.additive
    return part.after(x, torch.zeros_like(y), site)


def added(x: Tensor, y: Tensor, change: Tensor, site: Site) -> Tensor:
    """y with a change; at a norm that ends a block, the change goes into the sum it normalises."""
    return site.base(x + change) if site.role == "norm" else y + change


class AttentionPart(Part):
    """A part that gives the attention of one layer learned keys and values. Abstract."""

    length: int
    """P; the same at every site of an adapter."""

    @abstractmethod
    def keys_values(self, shared: Any, rows: RowsAtHand) -> tuple[Tensor, Tensor]:
        """Keys and values, each (H, P, D), or (B, H, P, D) where they differ from row to row, seen by every query ahead of the real tokens.

        Args:
            shared: what the adapter's shared module returned for this forward of the model, None if it has none.
        """


class GatedPart(AttentionPart):
    """An attention part whose keys and values get a softmax of their own, the result of which is added, times a gate, to what the attention
    computes without it. It stands at no position, so it moves none. Abstract."""

    @abstractmethod
    def gate(self) -> Tensor:
        """The factor: (1,), or (heads,) for each query head its own."""


class InputPart(Part):
    """A part that gives the model virtual tokens. Abstract."""

    length: int
    """P."""

    behind: int = 0
    """How many of them, the last ones, stand behind the row's prompt, just before the answer, rather than in front of the row."""

    @abstractmethod
    def embeddings(self, shared: Any, rows: RowsAtHand) -> Tensor:
        """Virtual embeddings (P, D), or (B, P, D) where they differ from row to row.

        Args:
            shared: as in `AttentionPart.keys_values`.
        """


@dataclass(frozen=True, kw_only=True)
class SiteFacts:
    """What a part's constructor may look at. Which entries are set depends on the kind of part.

    Attributes:
        path: the module's full name in the model.
        role: "weight", "attention-out", "mlp-out", "mlp", "block", "norm", "attention", "input".
        module: the module itself, for its constants only; parts keep no reference to it.
        kind: how the layer stores its weight ("linear", "conv1d-transposed", "embedding", "conv1d" to "conv3d", "norm", ...; "" if it is no such layer).
        shape: (out, in) of the dense weight, or the stored shape where there is no matrix; () for other kinds of site.
        W: the weight of that shape; None for other kinds of site, and where only sizes are asked for.
        original: reads the weight a packed one was made from, (out, in), from the base's files; None where W is all there is.
        b: its bias; takes_bias: whether its forward would add one.
        parameters: the parameters the module owns, by name.
        width: the width of the module's output (output and input sites).
        heads, head_width, tokens: key-value heads and their width (attention sites); the input embedding (input sites).
        projects: whether the attention's own projections to keys and values are known (attention sites).
        shared: the module that all sites of the adapter share, as `Method.shared` made it.
        finished: the part's values are about to come from a file; what only matters for a good start is no reason to refuse, and need not
            be computed.
    """

    path: str
    role: str
    module: nn.Module
    kind: str = ""
    shape: tuple[int, ...] = ()
    W: Tensor | None = None
    original: Callable[[], Tensor] | None = None
    b: Tensor | None = None
    takes_bias: bool = True
    parameters: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    width: int = 0
    heads: int = 0
    head_width: int = 0
    tokens: nn.Module | None = None
    projects: bool = False
    shared: nn.Module | None = None
    finished: bool = False

    def matrix(self) -> Tensor:
        """The dense weight of a weight site."""
        if self.W is None:
            raise AssertionError(f"{self.path} has no weight")
        return self.W


def plain_role(config: MethodConfig, path: str) -> str:
    """The role of a module named in target_modules, for methods that treat all alike."""
    del config, path
    return "weight"


def everywhere(config: MethodConfig, facts: SiteFacts) -> str | None:
    """The answer of a method that adapts every site of its kind of part."""
    del config, facts
    return None


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Where training stands when `Method.update` is called: `step` optimiser steps of `total` are made (0 where the total is unknown)."""

    step: int
    total: int = 0


@dataclass(frozen=True, kw_only=True)
class Method:
    """The facts of a method. One record a file, named `METHOD`.

    Attributes:
        name: as in recipes.
        config, part: the two classes of the file. The part is built as `part(config, facts)`.
        sites: default target where the config names none: "all-linear", "biases", "norms", "parameters", "blocks" (whole), "tokens" (the input
            embedding), or roles of a transformer block.
        identity_at_init: whether a fresh adapter leaves every output unchanged.
        count: trained parameters at one site, the formula that law 21 holds against the real tensors.
        peft: the layout of the incumbent's files, None where it does not have the method.
        foreign: how it looks in files without a config, None where they do not have it; hub: in AdapterHub's folders.
        role: the role of a module that the config names itself, where it is not simply "weight".
        hint: what to do where the default sites do not exist in a model.
        follows_ties: whether a module whose weight the base ties to a site's becomes a site too (parameter parts share their tensor then).
        refuses: why this site cannot be adapted with these options (a rank above the layer's, a block size that does not divide, a kind of
            layer on which the method has no meaning) and what would work, as a sentence; None if it can. Sees sizes, not values.
        shared: makes the module that all sites of one adapter use together (a prefix encoder, a bank of frozen projections); None, or
            returning None, where there is none. Sees sizes, not values. That of attention and input parts is called once a forward and its
            result handed to them; others reach it through `facts.shared`.
        rates: factor on the learning rate by name of the trained tensor (LoRA+).
        over: the names of the adapters that one of this method acts on (a fusion): attached before it, and as long as it is. Its sites are
            theirs.
        penalty: what is added to the loss of the adapter that trains, from its parts by path (AdaLoRA's orthogonality); a scalar.
        update: called after each optimiser step, while the gradients are still there, with the parts by path (AdaLoRA's allocation).
        prepare: called once the parts (all `ObservingPart`s) have seen data, with the parts by path; returns the config from then on.
        compact: what to save instead, for a method whose trained tensors hold more than is used, or that no other library could read: the
            config of another adapter of the same function, which may be of another method, and its tensors by path and name. None saves
            what there is.
        reopen: takes the values back from the parts of that other method, by path, so that what `compact` wrote can be trained further as
            this method; the options come from the manifest. Without it, a file written as another method is of that method.
        of_factors: the adapter that makes these changes, by path: its config (targets are set by the caller) and its tensors by path and name.
            For the method that a change of low rank becomes when adapters are combined or converted (`registry.LOW_RANK`).
    """

    name: str
    config: type[MethodConfig]
    part: type[Part]
    sites: tuple[str, ...]
    identity_at_init: bool
    count: Callable[[Any, SiteFacts], int]
    peft: PeftLayout | None = None
    foreign: Foreign | None = None
    hub: HubLayout | None = None
    hint: str = ""
    follows_ties: bool = False
    role: Callable[[Any, str], str] = plain_role
    refuses: Callable[[Any, SiteFacts], str | None] = everywhere
    shared: Callable[[Any, tuple[SiteFacts, ...]], nn.Module | None] | None = None
    rates: Callable[[Any, str], float] | None = None
    over: Callable[[Any], tuple[str, ...]] | None = None
    penalty: Callable[[Any, Mapping[str, Any]], Tensor] | None = None
    update: Callable[[Any, Mapping[str, Any], Moment], None] | None = None
    prepare: Callable[[Any, Mapping[str, Any]], MethodConfig] | None = None
    compact: Callable[[Any, Mapping[str, Any]], tuple[MethodConfig, Mapping[str, Mapping[str, Tensor]]]] | None = None
    reopen: Callable[[Mapping[str, Any], Mapping[str, Any]], None] | None = None
    of_factors: Callable[[Mapping[str, Factors]], tuple[MethodConfig, Mapping[str, Mapping[str, Tensor]]]] | None = None

    @property
    def mergeable(self) -> bool:
        """Only what is defined as a weight can be written into one."""
        return issubclass(self.part, WeightPart | ParameterPart)


def fresh(*shape: int, like: Tensor | None = None) -> nn.Parameter:
    """An uninitialised float32 parameter on the device of `like`."""
    device = like.device if like is not None else None
    return nn.Parameter(torch.empty(*shape, dtype=torch.float32, device=device))
