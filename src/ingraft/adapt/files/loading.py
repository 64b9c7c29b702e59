"""`load`: an adapter from its folder.

Loading trusts nothing. Everything a file says is compared with what the model needs before the model is touched: fields by name and type,
tensors by name, shape, dtype and finiteness, the base by its fingerprint. A file from elsewhere (no manifest) gets the same checks but for
digests and fingerprint. Only safetensors is read: the older `.bin` is a pickle, which runs code when it is opened. No socket is opened.
"""

from __future__ import annotations

import functools
import hashlib
import math
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft import durable
from ingraft.adapt.building import base_tensors, expected_count, make_parts
from ingraft.adapt.control import Adapter, control_of, require_control
from ingraft.adapt.files import foreign, peft_format
from ingraft.adapt.files.fingerprint import differences, fingerprint
from ingraft.adapt.files.folders import (
    COMMON,
    CONFIG,
    CONFIG_LIMIT,
    DTYPES,
    INDICES,
    LARGEST_OPTION,
    MEMBERS,
    PICKLED,
    WEIGHTS,
    Header,
)
from ingraft.adapt.files.hub import is_hub
from ingraft.adapt.files.moulds import Key, Mould, fitting, learn
from ingraft.adapt.files.peft_heads import inside_of, with_heads
from ingraft.adapt.files.peft_tensors import (
    PREFIX,
    SHARED_PREFIX,
    SOFT_PREFIX,
    Entry,
    entries,
    saved_tensors,
    uncovered,
)
from ingraft.adapt.files.reading import attach_read, free_name, load_foreign, load_hub
from ingraft.adapt.files.tensors import Mended, TensorFile, Tensors, all_finite, open_tensors
from ingraft.adapt.lifecycle import activate, check_adapter_name, detach, put
from ingraft.adapt.stacked import each_alone
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import MethodConfig, Part


def load(
    model: nn.Module,
    folder: str | os.PathLike[str],
    name: str | None = None,
    *,
    trainable: bool = False,
    allow_base_mismatch: bool = False,
) -> str:
    """Load an adapter and let it alone act.

    Args:
        folder: written here or by Hugging Face PEFT; or a safetensors file of kohya-ss, LyCORIS or diffusers (`foreign.py`), recognised by its
            tensors' names; or a folder of AdapterHub's (`hub.py`). What such a file was found to be stands in the adapter's facts.
        name: to give it; by default the one it was saved under, or "default".
        trainable: make it (and no other) trainable; otherwise trainability of what is attached stays as it is, and this one is frozen.
        allow_base_mismatch: load it although it was trained on another base. The difference is then recorded in the adapter's facts.

    Returns:
        The adapter's name.

    Raises:
        IngraftError: everything in which the files and the model differ. The model is then unchanged.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file() and (file := foreign.the_file(folder)) is not None:
        return load_foreign(model, file, free_name(model, name or "default"), trainable=trainable)
    found = _read(folder)
    if found.facts is None and is_hub(found.raw):
        return load_hub(model, folder, found.raw, name, trainable=trainable)
    _need_weights(folder)
    with open_tensors(folder / WEIGHTS) as file:
        check = found.check(file)
        kept: dict[str, Any] = dict(found.facts or {})
        said = kept.get("method")
        key = (found.config, file.head, file.size, said if isinstance(said, str) else None)
        if found.facts is not None and (mould := fitting(model, control_of(model), key)) is not None:
            parts = mould.cast(file, trainable)
            check()
            if parts is not None:
                return _cast(model, mould, parts, found, name, allow_base_mismatch, trainable)
        check()
        return _load(model, found, file, key, name, allow_base_mismatch, trainable)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Folder:
    """What was read of a folder so far.

    Attributes:
        config: the bytes of its config.
        facts: the manifest's, None where another program wrote the folder; digests: what it says of the two files.
    """

    path: Path
    config: bytes
    facts: dict[str, Any] | None
    digests: Mapping[str, str]

    @functools.cached_property
    def raw(self) -> dict[str, Any]:
        """The config's fields; of a file with a digest not to be asked for before that was compared.

        Raises:
            IngraftError: it has none.
        """
        raw = durable.parse_json(self.config, self.path / CONFIG)
        if not isinstance(raw, dict):
            raise IngraftError(f"{self.path / CONFIG}: not an object with fields.")
        return cast(dict[str, Any], raw)

    def check(self, weights: TensorFile) -> Callable[[], None]:
        """Begin to compare the files with their digests; what is returned finishes.

        Raises:
            IngraftError: (by what is returned) files that are not what was saved.
        """
        if self.facts is None:
            return lambda: None
        wait = weights.digest()

        def finish() -> None:
            found = {CONFIG: hashlib.sha256(self.config).hexdigest(), WEIGHTS: wait()}
            if problems := [
                f"{self.path / file}: damaged or changed: its sha256 is {digest}, {durable.MANIFEST} says otherwise."
                for file, digest in found.items()
                if digest != self.digests.get(file)
            ]:
                raise IngraftError(*problems)

        return finish

    def named(self, model: nn.Module, name: str | None) -> tuple[str, int]:
        """The name that the adapter gets, which is free, and its seed.

        Raises:
            IngraftError: facts that cannot be, or a name that is taken.
        """
        facts = self.facts or {}
        seed, own = facts.get("seed", 0), facts.get("name", "default")
        if not isinstance(seed, int) or not isinstance(own, str):
            raise IngraftError(
                f"{self.path / durable.MANIFEST}: its facts are not well-formed: seed {seed!r}, name {facts.get('name')!r}."
            )
        return free_name(model, own if name is None else name), seed

    def told(self, more: Mapping[str, Any]) -> dict[str, Any]:
        """The adapter's facts: the manifest's, what was found in loading, and the task."""
        task = self.raw.get("task_type")
        return {**(self.facts or {}), **more, **({"task_type": task} if task else {})}


def _cast(
    model: nn.Module,
    mould: Mould,
    parts: Mapping[str, Part],
    found: _Folder,
    name: str | None,
    allow_base_mismatch: bool,
    trainable: bool,
) -> str:
    """Put an adapter into the model whose parts were cast from a mould."""
    name, seed = found.named(model, name)
    check_adapter_name(name)
    adapter = replace(mould.adapter, name=name, seed=seed, sites=dict(mould.adapter.sites))
    adapter.facts = found.told(_check_base(model, adapter, found.raw, found.facts, found.path, allow_base_mismatch))
    put(model, require_control(model), adapter, parts, None, trainable)
    return name


def _load(
    model: nn.Module,
    found: _Folder,
    file: TensorFile,
    key: Key,
    name: str | None,
    allow_base_mismatch: bool,
    trainable: bool,
) -> str:
    """Work out what a folder means for this model, and attach it. What was learned is kept for the next one like it."""
    folder, raw, ours, read = found.path, found.raw, found.facts is not None, file
    name, seed = found.named(model, name)
    if not ours:
        raw, read = _mended(raw, file, folder / CONFIG, trainable=trainable)
    header = read.header
    shared_too = any(key.startswith(SHARED_PREFIX) for key in header)
    config, layout = peft_format.read_config(
        model,
        raw if ours else with_heads(model, raw, header),
        shared=shared_too,
        ours=ours,
        where=str(folder / CONFIG),
        method=key[-1],
    )
    own = _reopened(config, found.facts or {}, folder)
    told: dict[str, Any] = {}
    made: dict[str, Part] = {}
    wanted: list[Entry] = []

    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        mine = parts
        if own is not config:
            adapter = replace(adapter, config=config, method=registry.load(config.method))
            parts, shared = make_parts(model, adapter, finished=True)
            parts |= {path: mine[path] for path in adapter.beside}
        if layout is not None and (reason := uncovered(layout, model, adapter.method, adapter.config, adapter.sites)):
            raise IngraftError(
                f"{folder}: {reason}, so the file cannot be read as it is meant. {peft_format.remedy(adapter.method)}"
            )
        _untie(read, adapter, parts, inside_of(layout))
        wanted.extend(entries(model, adapter.method, adapter.sites, parts, shared, layout))
        told.update(_check_base(model, adapter, raw, found.facts, folder, allow_base_mismatch))
        _fill(model, read, wanted, tuple(inside_of(layout) + path for path in adapter.saved_whole))
        if own is not config:
            _put_back(own, mine, config, parts, folder)
        elif shared is None:
            made.update(parts)

    with ExitStack() as undo:
        _load_members(model, own, folder, allow_base_mismatch, undo)
        _check_size(model, config, header, folder / CONFIG)
        attach_read(model, own, name, seed, fill, trainable=trainable)
        undo.pop_all()
    control = require_control(model)
    adapter = control.adapters[name]
    adapter.facts = found.told(told)
    if ours and made:
        learn(model, control, key, adapter, made, wanted, file)
    return name


def _mended(raw: dict[str, Any], file: TensorFile, where: Path, *, trainable: bool) -> tuple[dict[str, Any], Tensors]:
    """The fields and tensors of a file of the incumbent's, or what they would be if it held what its config says (`PeftLayout.reread`)."""
    layouts = (method.peft for method in registry.methods())
    rereads = (own.reread for own in layouts if own is not None and own.peft_type == raw.get("peft_type"))
    reread = next((one for one in rereads if one is not None), None)
    if reread is None:
        return raw, file
    try:
        fields, tensors, words = reread(raw, {key: file.tensor(key) for key in file.header})
    except IngraftError as error:
        raise IngraftError(*(f"{file.path}: {text}" for text in error.problems)) from None
    if words is not None and trainable:
        warnings.warn(f"{where}: {words}", stacklevel=4)
    return dict(fields), Mended(path=file.path, tensors=tensors)


def _load_members(
    model: nn.Module, config: MethodConfig, folder: Path, allow_base_mismatch: bool, undo: ExitStack
) -> None:
    """Load, frozen, the adapters that this one acts over, where they lie in its folder and their names are free.

    Args:
        undo: is told how to take them off again.
    """
    over = registry.load(config.method).over
    control = control_of(model)
    attached = tuple(control.adapters) if control is not None else ()
    here = [
        member
        for member in (() if over is None else over(config))
        if member not in attached and (folder / MEMBERS / durable.check_name(member)).is_dir()
    ]
    if here and control is not None:
        undo.callback(activate, model, *control.call.active)
    for member in here:
        load(model, folder / MEMBERS / member, member, allow_base_mismatch=allow_base_mismatch)
        undo.callback(detach, model, member)


def _read(folder: Path) -> _Folder:
    """The bytes of the config, and the manifest's facts if Ingraft wrote the folder."""
    if not (folder / CONFIG).is_file():
        durable.recover(folder)  # a replacement that was cut short
    if not folder.is_dir():
        raise IngraftError(f"load: {folder} is no folder.")
    if not (folder / CONFIG).is_file():
        raise IngraftError(f"load: {folder} holds no {CONFIG}, so it is not an adapter.")
    facts, digests = None, dict[str, str]()
    if (folder / durable.MANIFEST).is_file():
        manifest = durable.read_manifest(folder)
        facts, digests = manifest["facts"], {name: entry["sha256"] for name, entry in manifest["files"].items()}
    config = durable.read_bytes(folder / CONFIG, limit=CONFIG_LIMIT)
    return _Folder(path=folder, config=config, facts=facts, digests=digests)


def _need_weights(folder: Path) -> None:
    if (folder / WEIGHTS).is_file():
        return
    pickled = (
        f" {PICKLED} is not read: it is a pickle, which can run code. Convert it with safetensors' convert script."
        * (folder / PICKLED).is_file()
    )
    raise IngraftError(f"load: {folder} holds no {WEIGHTS}.{pickled}")


def _reopened(config: MethodConfig, facts: Mapping[str, Any], folder: Path) -> MethodConfig:
    """The config of the method that wrote the file, where it was written as another one's (`Method.reopen`)."""
    name, options = facts.get("method"), facts.get("options")
    if name == config.method or not isinstance(options, dict) or name not in registry.records():
        return config
    method = registry.load(str(name))
    if method.reopen is None:
        return config
    sites = {key: getattr(config, key) for key in COMMON}
    try:
        return registry.make_config(method.name, {**options, **sites})
    except IngraftError as error:
        raise IngraftError(*(f"{folder / durable.MANIFEST}: {text}" for text in error.problems)) from None


def _put_back(
    own: MethodConfig, parts: dict[str, Part], config: MethodConfig, read: dict[str, Part], folder: Path
) -> None:
    """Give a method its values back from the adapter of another method that it was written as."""
    method = registry.load(own.method)
    assert method.compact is not None and method.reopen is not None
    mine = each_alone({path: part for path, part in parts.items() if path not in read or read[path] is not part})
    read = each_alone(read)
    again, tensors = method.compact(own, mine)
    theirs = {path: {name: t.shape for name, t in saved_tensors(read[path])} for path in mine}
    if again != config or theirs != {path: {name: t.shape for name, t in own.items()} for path, own in tensors.items()}:
        raise IngraftError(
            f"{folder / durable.MANIFEST}: its options do not fit the adapter in {CONFIG} and {WEIGHTS}."
        )
    with torch.no_grad():
        method.reopen({path: read[path] for path in mine}, mine)


def _check_size(model: nn.Module, config: MethodConfig, header: Header, where: Path) -> None:
    """Refuse sizes in a config that the tensors beside it cannot have, before memory is asked for."""
    limit = max([LARGEST_OPTION, *(size for shape, _ in header.values() for size in shape)])
    problems = [
        f"{where}: {name} = {value} is larger than any size in {WEIGHTS}."
        for name, value in config.options().items()
        if isinstance(value, int) and value > limit
    ]
    stored = sum(math.prod(shape) for shape, _ in header.values())
    if not problems and (wanted := expected_count(model, config, finished=True)) > 8 * stored + LARGEST_OPTION:
        problems.append(f"{where}: asks for {wanted:,} numbers, and {WEIGHTS} holds {stored:,}.")
    if problems:
        raise IngraftError(*problems)


def _check_base(
    model: nn.Module,
    adapter: Adapter,
    raw: Mapping[str, Any],
    facts: Mapping[str, Any] | None,
    folder: Path,
    allowed: bool,
) -> dict[str, Any]:
    """Compare the base with the one the adapter was trained on. Returns what to record about a difference that was allowed."""
    if facts is None or not isinstance(recorded := facts.get("base"), dict):
        theirs, here = raw.get("base_model_name_or_path"), peft_format.base_name(model)
        if theirs and here and Path(str(theirs)).name.lower() != Path(here).name.lower():
            warnings.warn(
                f"{folder}: the adapter was trained on {theirs!r} and is put into {here!r}; it has no fingerprint to compare.",
                stacklevel=2,
            )
        return {}
    differing = differences(recorded, fingerprint(model, adapter.saved_whole, as_merged=bool(adapter.ground)))
    if not differing:
        return {}
    if allowed:
        return {"base_mismatch": differing}
    ground, merged = facts.get("stands_on") or (), adapter.ground
    if tuple(ground) != merged:
        trained, here = (
            f"the base with {', '.join(names)} merged" if names else "the bare base" for names in (ground, merged)
        )
        raise IngraftError(
            f"{folder}: the adapter was trained on {trained}, and this is {here}. "
            + (f"Load {', '.join(ground)} and merge it first." if ground else "Call `unmerge` first.")
        )
    raise IngraftError(
        f"{folder}: the adapter was trained on another base ({recorded.get('name') or 'unnamed'}): this one differs in {' and '.join(differing)}. "
        "Load the base it was trained on (a head that starts at random belongs into modules_to_save), or accept the difference with "
        "allow_base_mismatch=True (--allow-base-mismatch)."
    )


def _untie(file: Tensors, adapter: Adapter, parts: Mapping[str, Part], start: str) -> None:
    """Give a whole module that the base ties to another one a tensor of its own, where the file has other values for it: PEFT trains a copy of
    each, and they part."""
    first: dict[int, str] = {}
    for path in adapter.saved_whole:
        for name, own in list(parts[path]._parameters.items()):
            key = f"{start}{path}.{name}"
            before = first.setdefault(id(own), key)
            if own is None or before == key or not {before, key} <= set(file.header):
                continue
            if not torch.equal(file.tensor(before), file.tensor(key)):
                parts[path]._parameters[name] = nn.Parameter(own.detach().clone())


def _fill(model: nn.Module, file: Tensors, wanted: list[Entry], whole: tuple[str, ...]) -> None:
    """Copy a file's tensors into the parts, once everything about them is known to be right.

    Args:
        whole: the names of the modules that are trained in full, as the file begins them.
    """
    known = {entry.key: entry for entry in wanted}
    weights = file.path
    copies = {copy: entry.key for entry in wanted for copy in entry.copies}
    alone = {key: copy for copy, key in copies.items() if copy in file.header and key not in file.header}
    problems = [
        f"{weights}: {key} is missing (shape {list(entry.shape)})."
        if key not in alone
        else f"{weights}: {alone[key]} was trained alone, and in this base its module shares its weight with the one of {key}: what is trained of "
        "both stays one here. Use the adapter with the library that wrote it, or train it again here."
        for key, entry in known.items()
        if key not in file.header
    ]
    base: dict[str, Tensor] = {}
    for key, (shape, dtype) in file.header.items():
        entry = known.get(key)
        if entry is None:
            base = base or base_tensors(model)
            problems += _extra(file, key, base, known, copies)
        elif not entry.takes(shape) and key.rpartition(".")[0] in whole and shape[1:] == entry.shape[1:]:
            problems.append(
                f"{weights}: {key.rpartition('.')[0].removeprefix(PREFIX)} was trained in full with {shape[0]} outputs, and this base's has "
                f"{entry.shape[0]}. Load the base with as many (a classifier: num_labels={shape[0]}); the adapter brings their values."
            )
        elif not entry.takes(shape):
            problems.append(f"{weights}: {key} has shape {list(shape)}; this base needs {list(entry.shape)}.")
        elif dtype not in (known_dtypes := INDICES if entry.indices else DTYPES):
            problems.append(f"{weights}: {key} has dtype {dtype}; it is stored in {', '.join(known_dtypes)}.")
        elif not all_finite(file.tensor(key)):
            problems.append(f"{weights}: {key} holds values that are not finite; the adapter is damaged.")
    if problems:
        raise IngraftError(*dict.fromkeys(problems))
    for key, entry in known.items():
        value = file.tensor(key)
        value = value[: entry.shape[0]] if value.shape != entry.shape else value
        entry.put(value if entry.indices else value.float())


def _extra(
    file: Tensors, key: str, base: Mapping[str, Tensor], known: Mapping[str, Entry], copies: Mapping[str, str]
) -> list[str]:
    """PEFT stores copies beside some adapters: of base weights (a whole embedding), harmless if they are this base's, and of what all sites
    share, once for every site, harmless if they are the same."""
    weights = file.path
    once = copies.get(key, SOFT_PREFIX + key.rpartition(".")[2])
    if once in known and key != once:
        if key in copies and once not in file.header:
            return []  # which has been said
        same = torch.equal(file.tensor(key), file.tensor(once)) if once in file.header else False
        return [] if same else [f"{weights}: {key} is not the {once} that these sites share."]
    names = (key.removeprefix(start).replace("base_layer.", "") for start in (PREFIX, SOFT_PREFIX))
    name = next((name for name in names if name in base), None)
    if name is None:
        return [f"{weights}: {key} belongs to no module of this base that the adapter is to sit in."]
    mine, value = base[name].detach().cpu(), file.tensor(key)
    coarser = min(mine.dtype, value.dtype, key=lambda dtype: dtype.itemsize)
    if value.shape == mine.shape and torch.equal(value.to(coarser), mine.to(coarser)):
        return []
    return [
        f"{weights}: {key} is a copy of the base's {name} with other values (a trained or resized weight); the adapter is for another base."
    ]
