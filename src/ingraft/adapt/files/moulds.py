"""What was learned of an adapter's file, for the next one like it.

Adapters that meet in one model are mostly alike: one method, the same options, tensors of the same names and shapes. Nearly all that loading works
out (which modules are meant, whether the method can sit there, which tensor goes where) follows from config, header and model, so it is the same for
the next such file. What is kept of the first is a mould: every part without its tensors, and the places of the file's tensors in them. A file whose
config and header are the same bytes is cast from it, with no part drawn at random before.

A mould is used only while nothing is merged and the model is what it was: the same modules, of the same classes, with the very parameters on the same
devices at the sites, and no hook or wrapper on these. Digests, values and the base's fingerprint belong to a file and are checked each time. Wherever
anything is not as it was, or not as it should be, the long way is taken, which works it out or says what is wrong.

Only parts that are nothing but the file's tensors and plain numbers have a mould: a part with tensors of its own (frozen banks, ties, values that follow
from the seed), one module for all sites, or tensors that a file keeps in another form is made anew each time.

The numbers are not copied: the tensors lie in the memory into which the file was read. Each has a storage of its own over its part of it, because
programs that look at storages to find tied tensors (accelerate's `save_model`) would keep one of those that share one and drop the others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.building import BESIDE
from ingraft.adapt.control import Adapter, Control
from ingraft.adapt.files.peft_tensors import Entry
from ingraft.adapt.files.tensors import KINDS, TensorFile, all_finite
from ingraft.adapt.swap import original_class, replaced_forward
from ingraft.adapt.walk import Walk, walked
from ingraft.methods.contract import MethodConfig, Part

Key = tuple[bytes, bytes, int, str | None]
"""What a file must be like: the bytes of its config and of its header, how many bytes of numbers follow, and the method that wrote it."""

KEPT = 8
"""Moulds of a model, the last used first."""

PLAIN = (bool, int, float, str, type(None), torch.dtype, MethodConfig, FunctionType, BuiltinFunctionType)
"""What a part may hold beside tensors and children, and tuples of these: nothing that could change."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blank:
    """A part, or a module inside one, without its tensors.

    Attributes:
        plain, containers: what is in its `__dict__`: values that are shared with what is cast, and collections that are copied.
        tensors: collection, name, and number of the tensor in the file.
    """

    cls: type[nn.Module]
    plain: Mapping[str, Any]
    containers: Sequence[tuple[str, Any]]
    tensors: Sequence[tuple[str, str, int]]
    children: Sequence[tuple[str, Blank]]

    def cast(self, values: Sequence[Tensor], training: bool) -> Any:
        module = self.cls.__new__(self.cls)
        inside = module.__dict__
        inside.update(self.plain)
        for name, collection in self.containers:
            inside[name] = collection.copy()
        for collection, name, number in self.tensors:
            inside[collection][name] = values[number]
        for name, child in self.children:
            inside["_modules"][name] = child.cast(values, training)
        inside["training"] = training
        return module


@dataclass(frozen=True, kw_only=True, eq=False)
class Mould:
    """See the file's docstring.

    Attributes:
        key: what a file must be like.
        sites: what the sites looked like.
        blanks: by path.
        targets: of each tensor in the file's order: its key, shape, dtype and device in the part, and whether it is a parameter.
        alike: dtype in the file, dtype and device in the parts, where they are the same for all tensors.
    """

    key: Key
    adapter: Adapter
    walk: Walk
    sites: Sequence[Any]
    blanks: Mapping[str, Blank]
    targets: Sequence[tuple[str, torch.Size, torch.dtype, torch.device, bool]]
    alike: tuple[torch.dtype, torch.dtype, torch.device] | None

    def cast(self, file: TensorFile, trainable: bool) -> dict[str, Part] | None:
        """The parts of an adapter, None if there are values that are not finite."""
        values = list(self._values(file))
        if len(values) != len(self.targets):
            return None
        tensors = [
            nn.Parameter(value, requires_grad=trainable) if target[-1] else value
            for value, target in zip(values, self.targets, strict=True)
        ]
        modules = self.walk.modules
        return {path: blank.cast(tensors, modules[path].training) for path, blank in self.blanks.items()}

    def _values(self, file: TensorFile) -> Iterator[Tensor]:
        """The file's tensors as the parts have them, none if there are values that are not finite."""
        if self.alike is None:
            pieces = [file.tensor(key) for key, *_ in self.targets]
            if all(map(all_finite, pieces)):
                for piece, (_, _, dtype, device, _) in zip(pieces, self.targets, strict=True):
                    yield piece.to(device, dtype, copy=True)
            return
        stored, dtype, device = self.alike
        numbers = file.data.view(stored)
        if not all_finite(numbers):
            return
        numbers, done = numbers.to(device, dtype), 0  # in one go; a view where nothing is to be done
        array = numbers.numpy() if device.type == "cpu" else None
        for _, shape, *_ in self.targets:
            end = done + shape.numel()
            # By way of numpy each tensor gets a storage of its own over its part of the memory.
            yield (
                numbers[done:end].clone().view(shape)
                if array is None
                else torch.from_numpy(array[done:end].reshape(shape))
            )
            done = end


def fitting(model: nn.Module, control: Control | None, key: Key) -> Mould | None:
    """The mould of files like this one, if there is one and the model is what it was."""
    if control is None or control.merged:
        return None
    mould = next((one for one in control.moulds if one.key == key), None)
    if mould is None:
        return None
    walk = walked(model)
    if walk is not mould.walk or _looks(walk, mould.adapter.sites) != mould.sites:
        control.moulds.remove(mould)
        return None
    return mould


def learn(
    model: nn.Module,
    control: Control,
    key: Key,
    adapter: Adapter,
    parts: Mapping[str, Part],
    entries: Sequence[Entry],
    file: TensorFile,
) -> None:
    """Keep a mould of an adapter that was just loaded, if its like can be cast."""
    walk = walked(model)
    looks = _looks(walk, adapter.sites)
    by_key = {entry.key: entry.tensor for entry in entries}
    if (
        adapter.ground
        or adapter.method.over is not None
        or set(adapter.sites.values()) & set(BESIDE)
        or None in looks
        or _shares(walk, adapter.sites)  # which is to be said each time
        or by_key.keys() != file.header.keys()
        or any(tensor is None for tensor in by_key.values())
    ):
        return
    tensors = [by_key[name] for name in file.header]
    numbers = {id(tensor): number for number, tensor in enumerate(tensors)}
    blanks = {path: _blank(part, numbers) for path, part in parts.items()}
    used = [number for blank in blanks.values() if blank is not None for number in _used(blank)]
    if None in blanks.values() or sorted(used) != list(range(len(tensors))):
        return
    targets = [
        (key, tensor.shape, tensor.dtype, tensor.device, isinstance(tensor, nn.Parameter))
        for key, tensor in zip(file.header, tensors, strict=True)
        if tensor is not None
    ]
    forms = {
        (KINDS[kind], dtype, device)
        for (_, kind), (_, _, dtype, device, _) in zip(file.header.values(), targets, strict=True)
    }
    form = forms.pop() if len(forms) == 1 else None
    mould = Mould(
        key=key,
        adapter=replace(adapter, facts={}),
        walk=walk,
        sites=looks,
        blanks={path: blank for path, blank in blanks.items() if blank is not None},
        targets=targets,
        alike=form if form is not None and form[1] is not torch.bfloat16 else None,  # which numpy does not have
    )
    control.moulds = [mould, *control.moulds][:KEPT]


def _looks(walk: Walk, sites: Mapping[str, str]) -> list[Any]:
    """What a part's making could depend on at each site; None for one that is not to be judged from here (hooked, wrapped)."""
    found: list[Any] = []
    for path in sites:
        module = walk.modules[path]
        own = [(name, id(p), p.shape, p.device) for name, p in module._parameters.items() if p is not None]
        plain = "_hf_hook" not in module.__dict__ and not replaced_forward(module)
        found.append((original_class(module), own) if plain else None)
    return found


def _shares(walk: Walk, sites: Mapping[str, str]) -> bool:
    """Whether a parameter of a site stands elsewhere in the model as well."""
    owners = Counter(id(p) for module in walk.modules.values() for p in module._parameters.values() if p is not None)
    return any(owners[id(p)] > 1 for path in sites for p in walk.modules[path]._parameters.values() if p is not None)


def _blank(module: nn.Module, numbers: Mapping[int, int]) -> Blank | None:
    """A module without its tensors, None if it is more than the file's tensors and plain values."""
    plain: dict[str, Any] = {}
    containers: list[tuple[str, Any]] = []
    tensors: list[tuple[str, str, int]] = []
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            for inner, tensor in value.items() if name != "_modules" else ():
                if tensor is not None and id(tensor) not in numbers:
                    return None
                if tensor is not None:
                    tensors.append((name, inner, numbers[id(tensor)]))
            containers.append((name, type(value)(dict.fromkeys(value))))
        elif isinstance(value, dict | set):
            if value and name != "_non_persistent_buffers_set":
                return None  # hooks
            containers.append((name, value.copy()))
        elif _is_plain(value):
            plain[name] = value
        else:
            return None
    children = [(name, _blank(child, numbers)) for name, child in module._modules.items() if child is not None]
    if any(child is None for _, child in children):
        return None
    return Blank(
        cls=type(module),
        plain=plain,
        containers=containers,
        tensors=tensors,
        children=[(name, child) for name, child in children if child is not None],
    )


def _is_plain(value: Any) -> bool:
    return isinstance(value, PLAIN) or (type(value) is tuple and all(map(_is_plain, value)))


def _used(blank: Blank) -> Iterator[int]:
    yield from (number for _, _, number in blank.tensors)
    for _, child in blank.children:
        yield from _used(child)
