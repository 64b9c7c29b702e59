"""The tensors of an adapter's file: names and shapes in Hugging Face PEFT's grammar, as a method's `PeftLayout` describes them.

A tensor is called `base_model.model.<module path>.<suffix>`; a module trained in full keeps its parameters' names; soft prompts are one
tensor for the whole adapter. `entries` gives the file's side and the adapter's side of each, so that saving, loading and checking walk
one list.

What PEFT throws away (the encoder behind a projected prefix) is kept under `base_model.shared.`, which PEFT passes over: the adapter can
then be trained further.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ingraft.adapt.building import BESIDE, TOKENS_ROLE, WHOLE_ROLE, facts_of
from ingraft.adapt.roles import sites_of_role
from ingraft.adapt.stacked import Stack, matrices, reads
from ingraft.adapt.swap import original_class
from ingraft.adapt.walk import walked
from ingraft.adapt.weights import CONVOLUTIONS, kind_of
from ingraft.methods import registry
from ingraft.methods.contract import (
    AttentionPart,
    InputPart,
    Method,
    MethodConfig,
    Part,
    PeftLayout,
    RowsAtHand,
)

PREFIX = "base_model.model."
SOFT_PREFIX = "base_model."
"""Around a soft prompt PEFT does not wrap the model once more."""
SHARED_PREFIX = "base_model.shared."


@dataclass(frozen=True, kw_only=True, eq=False)
class Entry:
    """One tensor of a file.

    Attributes:
        key, shape: as in the file.
        take: the adapter's values in that shape.
        put: write the file's values into the adapter.
        copies: other names under which PEFT repeats it, where the base ties two of its sites.
        each_copy: PEFT misses these in a file that lacks them, since it gives each of the modules a tensor of its own.
        spare_rows: a file may hold as many rows again behind those that count.
        used_in: the dtype in which the adapter computes with it, where that is not the base's (indices: integers).
        tensor: the adapter's tensor of which the file has the very values, in another shape at most; None where it keeps something else.
    """

    key: str
    shape: tuple[int, ...]
    take: Callable[[], Tensor]
    put: Callable[[Tensor], None]
    used_in: torch.dtype | None = None
    copies: tuple[str, ...] = ()
    each_copy: bool = False
    spare_rows: bool = False
    tensor: Tensor | None = None

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape holds its values."""
        return shape == self.shape or (self.spare_rows and shape == (2 * self.shape[0], *self.shape[1:]))

    @property
    def indices(self) -> bool:
        """Whether it holds whole numbers, which no file may round."""
        return self.used_in is not None and not self.used_in.is_floating_point


def layout_of(model: nn.Module, method: Method, config: MethodConfig, sites: Mapping[str, str]) -> PeftLayout | None:
    """The PEFT layout to write, or None where PEFT lacks the method with these options, or means something else by it at one of the sites."""
    layout = method.peft
    if layout is None or any(getattr(config, option) != value for option, value in layout.only.items()):
        return None
    return None if uncovered(layout, model, method, config, sites) else layout


def entries(
    model: nn.Module,
    method: Method,
    sites: Mapping[str, str],
    parts: Mapping[str, Part],
    shared: nn.Module | None,
    layout: PeftLayout | None,
) -> list[Entry]:
    """Every tensor of an adapter's file, each once. Tensors that the base's ties make one are kept under the first name."""
    modules = walked(model).modules
    stacked: dict[str, Part] = {}
    found: list[Entry] = []
    seen: dict[int, int] = {}
    for path, part in parts.items():
        if layout is not None and layout.stacked and sites[path] not in BESIDE:
            stacked[path] = part
            for name, key in layout.beside.items():
                parameter = part.get_parameter(name)
                found.append(_plain(key, parameter, tuple(parameter.shape)))
            continue
        start = (SOFT_PREFIX if layout is not None and layout.stacked else PREFIX) + (f"{path}." if path else "")
        if isinstance(part, Stack) and layout is not None:
            found += _experts(start, layout, part)
            continue
        inside = "token_adapter.trainable_tokens_delta" if sites[path] == TOKENS_ROLE else None
        for name, parameter in saved_tensors(part):
            if (first := seen.setdefault(id(parameter), len(found))) < len(found):
                whole = sites[path] == WHOLE_ROLE
                suffix = inside or (name if layout is None or whole else layout.tensors.get(name, name))
                found[first] = replace(found[first], copies=(*found[first].copies, start + suffix), each_copy=whole)
                continue
            if layout is None or sites[path] in BESIDE:
                found.append(_plain(start + (inside or name), parameter, tuple(parameter.shape)))
            else:
                module = modules[path]
                parent, _, leaf = path.rpartition(".")
                factor = 1.0
                if path and leaf in reads(
                    modules[parent]
                ):  # they wrap the attention, and the layer it reads inside the wrapper
                    start = f"{PREFIX}{parent}.base_layer.{leaf}." if parent else f"{PREFIX}base_layer.{leaf}."
                    factor = 0.5 if name in layout.twice else 1.0
                suffixes = layout.embedding_tensors if isinstance(module, nn.Embedding) else {}
                suffix = suffixes.get(name) or layout.tensors.get(name, name)
                template = _template(layout, name, module, sites[path])
                assert template is not None, "layout_of has asked"
                found.append(_plain(start + suffix, parameter, _shape(template, parameter, module), factor))
    if stacked and layout is not None:
        found.append(_stack(layout, stacked, shared))
    theirs = layout.shared_tensors if layout is not None else {}
    soft = issubclass(method.part, AttentionPart | InputPart)
    for name, parameter in saved_tensors(shared) if shared is not None else ():
        key = SOFT_PREFIX + theirs[name] if name in theirs else SHARED_PREFIX + name
        plain = _plain(key, parameter, tuple(parameter.shape))
        found.append(replace(plain, used_in=torch.float32) if soft else plain)
    return found


def _experts(start: str, layout: PeftLayout, part: Stack) -> Iterator[Entry]:
    """The tensors of a module's matrices: those of one parameter side by side. The parameter's name is in no key; the wrappers of a module's
    parameters lie inside one another, the first one innermost."""
    groups: dict[str, list[Part]] = {}
    for matrix, inner in part.parts():
        groups.setdefault(matrix.parameter, []).append(inner)
    for depth, inners in enumerate(reversed(groups.values())):
        for name, first in saved_tensors(inners[0]):
            pieces = [dict(saved_tensors(inner))[name] for inner in inners]
            key = start + "base_layer." * depth + layout.tensors.get(name, name)
            yield (
                _plain(key, first, tuple(first.shape))
                if len(pieces) == 1
                else _side_by_side(key, pieces, layout.experts[name])
            )


def _side_by_side(key: str, pieces: Sequence[Tensor], dim: int) -> Entry:
    """Tensors of one shape, set side by side along a new dimension that is folded into the one before it (or, as the first, behind it)."""
    dim = dim % (pieces[0].dim() + 1)
    fold = max(dim - 1, 0)

    def take() -> Tensor:
        return torch.stack([piece.detach() for piece in pieces], dim).flatten(fold, fold + 1)

    @torch.no_grad()
    def put(value: Tensor) -> None:
        sizes = [*pieces[0].shape]
        sizes.insert(dim, len(pieces))
        for piece, own in zip(pieces, value.reshape(sizes).unbind(dim), strict=True):
            piece.copy_(own)

    return Entry(key=key, shape=tuple(take().shape), take=take, put=put)


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a part or shared module that its file holds: what is trained, and frozen ones that nothing else tells."""
    yield from module.named_parameters()
    for path, inner in module.named_modules():
        for name, buffer in inner._buffers.items():
            book = isinstance(inner, Part) and name in inner.training_state
            if buffer is not None and name not in inner._non_persistent_buffers_set and not book:
                yield f"{path}.{name}" if path else name, buffer


def _plain(key: str, parameter: Tensor, shape: tuple[int, ...], factor: float = 1.0) -> Entry:
    """A tensor as it is, or times a power of two in the file."""

    def put(value: Tensor) -> None:
        with torch.no_grad():
            parameter.copy_(
                value.reshape(parameter.shape) / factor if factor != 1.0 else value.reshape(parameter.shape)
            )

    def take() -> Tensor:
        own = parameter.detach().reshape(shape)
        return own * factor if factor != 1.0 else own

    whole_numbers = None if parameter.is_floating_point() else parameter.dtype
    same = parameter if factor == 1.0 else None
    return Entry(key=key, shape=shape, take=take, put=put, used_in=whole_numbers, tensor=same)


def _stack(layout: PeftLayout, parts: Mapping[str, Part], shared: nn.Module | None) -> Entry:
    """The one tensor (P, everything else) in which PEFT keeps a soft prompt: for each site in order its tensors in order, heads inside."""
    assert layout.stacked is not None

    def tensors() -> list[Tensor]:
        """Each site's tensors, computed by the shared module where there is one."""
        made = shared() if shared is not None else None
        if made is None:
            return [getattr(part, name) for part in parts.values() for name in layout.tensors]
        found: list[Tensor] = []
        for part in parts.values():
            if isinstance(part, AttentionPart):
                found += part.keys_values(made, RowsAtHand(count=1))
            elif isinstance(part, InputPart):
                found.append(part.embeddings(made, RowsAtHand(count=1)))
        return found

    @torch.no_grad()
    def take() -> Tensor:
        return torch.cat([_rows(tensor).flatten(1) for tensor in tensors()], dim=1)

    @torch.no_grad()
    def put(value: Tensor) -> None:
        if shared is not None:
            return  # computed from tensors that the file holds as well
        own = tensors()
        pieces = value.split([_rows(tensor).flatten(1).shape[1] for tensor in own], dim=1)
        for tensor, piece in zip(own, pieces, strict=True):
            _rows(tensor).copy_(piece.reshape(_rows(tensor).shape))

    return Entry(key=layout.stacked, shape=tuple(take().shape), take=take, put=put, spare_rows=layout.spare_rows)


def _rows(tensor: Tensor) -> Tensor:
    """A view with the virtual tokens first: keys and values are (H, P, D)."""
    return tensor.transpose(0, 1) if tensor.dim() == 3 else tensor


def _template(layout: PeftLayout, tensor: str, module: nn.Module, role: str) -> tuple[int | str, ...] | None:
    """The shape on disk by the most particular rule there is; (...) unchanged where there is none."""
    rules = layout.shapes.get(tensor, {})
    kind = kind_of(module)
    name = kind.name if kind is not None else ""
    family = "conv" if kind in CONVOLUTIONS else name
    for rule in (f"{name} {role}", name, f"{family} {role}", family, role, ""):
        if rule in rules:
            return rules[rule]
    return ("same",)


def _shape(template: tuple[int | str, ...], parameter: Tensor, module: nn.Module) -> tuple[int, ...]:
    if template == ("same",):
        return tuple(parameter.shape)
    sizes: list[int] = []
    for position, item in enumerate(template):
        if isinstance(item, str):
            weight = module.weight
            assert isinstance(weight, Tensor)
            sizes += weight.shape[1:] if item == "kernel" else [1] * len(weight.shape[2:])
        else:
            sizes.append(parameter.shape[position] if item == 0 else item)
    return tuple(torch.empty(parameter.shape, device="meta").reshape(sizes).shape)


def _keeps(
    layout: PeftLayout, modules: Mapping[str, nn.Module], sites: Mapping[str, str], path: str, role: str
) -> bool | None:
    """Whether PEFT has this method where a module keeps its matrices in tensors of its own; None of an ordinary layer."""
    if role == "parameters":
        return bool(layout.experts)
    parent, _, leaf = path.rpartition(".")
    read = bool(path) and leaf in reads(modules[parent])
    attention = parent if read else path
    module = modules[attention]
    if not read and not matrices(module):
        return None
    start = f"{attention}." if attention else ""
    whole = {attention, *(start + child for child in reads(module))}  # they adapt both projections, or neither
    return bool(layout.experts) and len(matrices(module)) == 1 and whole <= set(sites)


def _uncovered_tokens(model: nn.Module, config: MethodConfig, paths: Sequence[str]) -> str | None:
    """Where PEFT means something else by tokens trained beside a method."""
    tokens = registry.load(registry.TOKENS)
    sites = dict.fromkeys(paths, "weight")
    return None if tokens.peft is None else uncovered(tokens.peft, model, tokens, config, sites)


def uncovered(
    layout: PeftLayout, model: nn.Module, method: Method, config: MethodConfig, sites: Mapping[str, str]
) -> str | None:
    """Where PEFT means something else by this method, in words; None if nowhere."""
    if (
        layout.stacked
        and issubclass(method.part, AttentionPart)
        and getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    ):
        return f"{method.name} on an encoder-decoder: PEFT puts the prefix into the decoder alone"
    if issubclass(method.part, AttentionPart) and (layout.stacked or layout.bare):
        own = [path for path, role in sites.items() if role not in BESIDE]
        every = list(sites_of_role(model, "attention"))
        if own != (every if layout.stacked else every[-len(own) :]):
            return f"{method.name} in some of the blocks: PEFT has it in {'all' if layout.stacked else 'the topmost'} alone"
    if (layout.bare or layout.fields.get("modules_to_save", "") is None) and WHOLE_ROLE in sites.values():
        return f"{method.name} beside modules trained in full: PEFT has no such thing"
    beside = [path for path, role in sites.items() if role == TOKENS_ROLE]
    if beside and layout.tokens is None:
        return f"{method.name} beside trained tokens: PEFT has no such thing"
    if beside and (reason := _uncovered_tokens(model, config, beside)):
        return reason
    modules = walked(model).modules
    for path, role in sites.items():
        module = modules[path]
        if role in BESIDE:
            continue
        known = _keeps(layout, modules, sites, path, role)
        if known is False:
            return f"{path} ({original_class(module).__name__}): PEFT's {layout.peft_type} has no such layer"
        if known:
            continue
        if layout.otherwise is not None:
            reason = layout.otherwise(config.at(path), facts_of(model, path, module, role, values=False))
            if reason is not None:
                return f"{path}: {reason}"
        kind = kind_of(module)
        if layout.kinds and (kind is None or kind.name not in layout.kinds):
            return f"{path} ({original_class(module).__name__}): PEFT's {layout.peft_type} has no such layers"
        for tensor in layout.tensors:
            template = _template(layout, tensor, module, role)
            if template is None or ("kernel" in template and getattr(module, "groups", 1) > 1):
                return f"{path} ({original_class(module).__name__}): PEFT's {layout.peft_type} computes something else there"
    return None
