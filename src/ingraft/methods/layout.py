"""Where others keep a method's config and tensors, as data.

Each method's record carries these; `adapt/files/peft_format.py` and `adapt/files/peft_tensors.py` interpret `PeftLayout`, `adapt/files/foreign.py` interprets
`Foreign`. Little in the first is code: `otherwise` answers a question about one site, `reread` mends what a file says of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ingraft.methods.contract import MethodConfig, SiteFacts

Modules = Mapping[str, Mapping[str, "Tensor"]]
"""Tensors by path and name."""

Tensors = Mapping[str, "Tensor"]
"""Tensors by their keys in a file."""


@dataclass(frozen=True, kw_only=True)
class PeftLayout:
    """Where Hugging Face PEFT keeps this method's config and tensors, as data that `peft_format` interprets.

    Config fields:
        peft_type: their upper-case name.
        kinds: the kinds of layer on which they have the method ("linear", "conv2d", ...); empty for all.
        fields: our field -> theirs, where the names differ; None where they have none (it concerns the start of training alone).
        constants: their fields that must have these values for the adapter to be of this method (`use_dora: True`); a tuple: any of these.
        accepted: their fields with the values at which they change nothing; any other value is refused by name.
        off: their fields that must be empty (null, false, nothing in them), likewise.
        written: their fields that we always write so, and do not read.
        changed_in: their fields that, where set, meant something else in files of versions before one (a version, or none, stands in each file):
            that version, and what was otherwise, in words to end a warning.
        ignored: their fields that say nothing about what a trained adapter computes.
        aliases: values of theirs that mean one of ours, by our field.
        nearly: their fields -> a regular expression of values that mean one of the constants but for what a file does not hold, that constant, and
            what to say.
        unreadable: values of their fields that cannot be honoured -> why, and what to do.
        role_fields: our field that lists sites by name -> the role of those sites.
        transposed_field: their field that is true where the adapted layers store (in, out).
        ties: their field with which modules that share a parameter with a named one are adapted, or trained in full, unnamed.
        experts: our tensor name -> the dimension along which they set the tensors of stacked experts side by side before folding it away; empty
            where they have the method neither there nor in `nn.MultiheadAttention`.
        twice: our tensors of which they keep half in the layer that an `nn.MultiheadAttention` reads: they add its change two times.
        unshared: values of our fields where a file lacks the tensors of the adapter's shared module, which they do not keep.
        bare: their config names neither target_modules nor modules_to_save: the sites are the topmost of their role, as many as its field
            `site_count` says, and nothing is trained in full beside them.
        site_count: their field that holds the number of sites.
        only: values of our options at which they have the method; with any other the adapter is kept under a name of ours.
        encode, decode: values of their fields from all that are about to be written, and of ours from all that were read, where no rule above
            does (a rank that they keep as a mask).
        reread: fields, tensors and a warning for who trains it further, of a file that does not hold what its config says, as they would be of one
            that does; by fields and tensors as they are.
        tokens: their field for tokens trained beside the method, where it has one.
        otherwise: what they compute otherwise at a site (a kernel that is not square) with the options that hold there, in words to follow its
            path; None where they agree.

    Tensors:
        tensors: our tensor name -> their suffix behind the module path.
        embedding_tensors: the same for embedding layers, where it differs.
        shapes: our tensor name -> shape on disk by "<kind> <role>", kind or role of the site ("conv" for every convolution that has no rule of
            its own, "" for all others): 0 keeps the dimension, -1 is inferred, "kernel" stands for a convolution's inputs and kernel, "ones"
            for a one in place of each dimension of its kernel. None: they do something else there.
        spare_rows: the stacked tensor may hold as many rows again, which they save and never read (for the decoder of an encoder-decoder).
        stacked: the one method-wide tensor that holds every site's tensors side by side, (P, ...), or None.
        beside: tensors that stand beside the stacked one -> their name in the file, by itself.
        shared_tensors: tensor of the shared module -> their name behind `base_model.`; one that is not listed is kept under a name of ours.
    """

    peft_type: str
    kinds: frozenset[str] = frozenset()
    fields: Mapping[str, str | None] = field(default_factory=dict[str, "str | None"])
    constants: Mapping[str, object] = field(default_factory=dict[str, object])
    accepted: Mapping[str, tuple[object, ...]] = field(default_factory=dict[str, tuple[object, ...]])
    off: tuple[str, ...] = ()
    written: Mapping[str, object] = field(default_factory=dict[str, object])
    changed_in: Mapping[str, tuple[str, str]] = field(default_factory=dict[str, tuple[str, str]])
    ignored: tuple[str, ...] = ()
    aliases: Mapping[str, Mapping[str, object]] = field(default_factory=dict[str, Mapping[str, object]])
    nearly: Mapping[str, tuple[str, str, str]] = field(default_factory=dict[str, tuple[str, str, str]])
    unreadable: Mapping[str, Mapping[str, str]] = field(default_factory=dict[str, Mapping[str, str]])
    role_fields: Mapping[str, str] = field(default_factory=dict[str, str])
    transposed_field: str | None = None
    ties: str | None = None
    experts: Mapping[str, int] = field(default_factory=dict[str, int])
    twice: tuple[str, ...] = ()
    unshared: Mapping[str, object] = field(default_factory=dict[str, object])
    bare: bool = False
    site_count: str | None = None
    only: Mapping[str, object] = field(default_factory=dict[str, object])
    tokens: str | None = None
    otherwise: Callable[[Any, SiteFacts], str | None] | None = None
    encode: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    decode: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None
    reread: Callable[[Mapping[str, Any], Tensors], tuple[Mapping[str, Any], Tensors, str | None]] | None = None
    tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    embedding_tensors: Mapping[str, str] = field(default_factory=dict[str, str])
    shapes: Mapping[str, Mapping[str, tuple[int | str, ...] | None]] = field(
        default_factory=dict[str, Mapping[str, "tuple[int | str, ...] | None"]]
    )
    stacked: str | None = None
    spare_rows: bool = False
    beside: Mapping[str, str] = field(default_factory=dict[str, str])
    shared_tensors: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """How a method looks in files that hold tensors and no config (kohya-ss, LyCORIS, diffusers).

    Attributes:
        names: the tensors that a module of this method may have, by LyCORIS' names (diffusers' are translated), `alpha` aside.
        marks: those among them by which it is recognised.
        read: the config (targets are set by the caller) and our tensors by path and name, from theirs; `alpha`, where it is there, is one of
            them and a scalar. Shapes are checked afterwards.
    """

    names: frozenset[str]
    marks: frozenset[str]
    read: Callable[[Modules], tuple[MethodConfig, Modules]]


@dataclass(frozen=True, kw_only=True)
class HubLayout:
    """How a method looks in AdapterHub's folders.

    Attributes:
        read: our config from their settings; None if these are another method's.
        tensors: the end of their names -> our tensor. A value of another shape and the same size is reshaped.
        by_module: the file names the modules that are adapted; otherwise it names blocks, and the config's own places are theirs in order.
        post_norm: whether they compute the same only where a norm ends the block.
    """

    read: Callable[[Mapping[str, object]], MethodConfig | None]
    tensors: Mapping[str, str]
    by_module: bool = False
    post_norm: bool = False
