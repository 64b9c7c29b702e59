"""The merged model's files, written shard by shard: in memory lies what one layer needs, whatever the size of the model.

A base that is read from safetensors files in the dtype they are in takes next to no memory of its own: its parameters are views of the mapped
files, whose pages the system reads when they are touched and drops when it is short. A merge in memory makes new tensors of everything that is
adapted and holds them until the last one is written. Here each tensor of a shard goes from the mapping into the new file, and one that an adapter
changes is computed on the way, by the function that every merge computes with (`merging.merged_values`), and let go. The new folder has the base's
shards under their names, each with the header it had, since neither shapes nor dtypes change; bit for bit it is what `merge` and
`save_pretrained` would have written.

What the files do not hold as the model does cannot be copied so: a dtype converted while loading, packed weights, experts that transformers put
together, a fresh head, a bias where there was none, a tie to be broken. `unfit` says which it is, and the merge in memory remains.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ingraft import durable
from ingraft.adapt.files.folders import DTYPES, INDICES
from ingraft.adapt.lifecycle import detach
from ingraft.adapt.merging import check_ties, merged_values, refuse_not_finite, to_merge
from ingraft.adapt.select import base_modules
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

INDEX = "model.safetensors.index.json"

_DTYPES = DTYPES | INDICES | {"I8": torch.int8, "BOOL": torch.bool, "F64": torch.float64}

Entry = tuple[str, torch.dtype | None, tuple[int, ...], int, int]
"""A tensor of a shard: name, dtype (None: one that is not known here), shape, and where its bytes begin and end."""


class NotStreamed(Exception):
    """The adapter makes a tensor that the base's files have no place for; nothing can be said against the merge in memory."""


def is_sharded(source: Path) -> bool:
    """Whether a folder holds a model in several safetensors files."""
    return (source / INDEX).is_file()


def unfit(model: nn.Module, source: Path) -> str | None:
    """Why the files of a base cannot be copied tensor by tensor, as the end of a sentence; None if they can.

    Args:
        model: as it was read from `source`, whatever is attached.
    """
    own = _own(model)
    found: set[str] = set()
    for shard in shards(source):
        for name, dtype, shape, begin, end in header(source / shard):
            tensor = own.get(name)
            if tensor is None:
                return f"{name} of its files is no tensor of the model"
            if tensor.device.type != "cpu":
                return "the model does not lie in the machine's own memory"
            if tensor.dtype != dtype or tuple(tensor.shape) != shape or end - begin != tensor.nbytes:
                return f"{name} is not in memory as it is in its file"
            found.add(name)
    tied = {id(own[name]) for name in found}
    for name, tensor in own.items():
        if name not in found and id(tensor) not in tied:
            return f"its files do not hold {name}"
    return None


@torch.no_grad()
def write_merged(model: nn.Module, source: Path, target: Path, *names: str, untie: bool = False) -> None:
    """Write a base with adapters merged into it, without touching the model. Weights and their index only; config and tokenizer are the caller's.

    Args:
        model: with the adapters attached, fit for it (`unfit`); source: the folder it was read from.
        target: an empty folder.
        names: which adapters, in this order; none means those that act.
        untie: as in `merge`.

    Raises:
        IngraftError: as `merge`. Files written by then are left, so `target` should be a folder in the making.
        NotStreamed: a tensor would have to be added to the files; those written by then are gone.
    """
    adapters = to_merge(model, *names)
    acting = tuple(adapter.name for adapter in adapters)
    modules, own = base_modules(model), _own(model)
    sites = {path for adapter in adapters for path in adapter.sites}
    if (loose := check_ties(modules, sorted(sites), acting, untie)) is not None:
        raise NotStreamed(f"{loose} is given a tensor of its own")
    written: list[Path] = []
    try:
        for shard in shards(source):
            written.append(target / shard)
            with written[-1].open("wb") as file:
                file.write(_prefix(source / shard))
                last, new = "", dict[str, Tensor]()
                for name, *_ in header(source / shard):
                    path, _, leaf = name.rpartition(".")
                    if path not in sites:
                        _put(file, own[name])
                        continue
                    if path != last:
                        new.clear()  # before the next layer's are made
                        last, new = path, merged_values(modules[path], acting)
                        if added := [leaf for leaf in new if f"{path}.{leaf}" not in own]:
                            raise NotStreamed(f"{path}.{added[0]} is new")
                    value = new.pop(leaf, own[name])
                    refuse_not_finite(path, leaf, value)
                    _put(file, value)
                    del value
    except NotStreamed:
        for path in written:
            path.unlink()
        raise
    index = durable.read_json(source / INDEX)
    (target / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_folder(model: PreTrainedModel, source: Path, target: Path, *, untie: bool = False) -> None:
    """All of the merged model but its tokenizer, from the adapters that act. Afterwards the model is the bare base.

    Args, Raises: as `write_merged`, when the model is unchanged.
    """
    weights = target / "weights"
    weights.mkdir()
    try:
        write_merged(model, source, weights, untie=untie)
    except NotStreamed:
        weights.rmdir()
        raise
    detach(model)
    model.save_pretrained(target, state_dict={})  # which takes away all shards that it finds
    for file in weights.iterdir():
        file.rename(target / file.name)
    weights.rmdir()


def shards(source: Path) -> list[str]:
    """The names of a sharded model's files.

    Raises:
        IngraftError: the index is not one, or names files elsewhere.
    """
    index = durable.read_json(source / INDEX)
    places: Any = index.get("weight_map") if isinstance(index, dict) else None
    files = sorted({str(file) for file in places.values()}) if isinstance(places, Mapping) else []
    if not files or any(Path(file).name != file for file in files):
        raise IngraftError(f"{source / INDEX}: is no index of a sharded model.")
    return files


def header(file: Path) -> list[Entry]:
    """The tensors of a safetensors file in the order of their bytes.

    Raises:
        IngraftError: it is none.
    """
    try:
        read = json.loads(_prefix(file)[8:])
        read.pop("__metadata__", None)
        found = [
            (name, _DTYPES.get(one["dtype"]), tuple(one["shape"]), *one["data_offsets"]) for name, one in read.items()
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise IngraftError(f"{file}: is no safetensors file ({error!r}).") from error
    return sorted(found, key=lambda entry: entry[3])


def _prefix(file: Path) -> bytes:
    """What stands ahead of the tensors."""
    with file.open("rb") as opened:
        size = opened.read(8)
        return size + opened.read(min(int.from_bytes(size, "little"), 100_000_000))


def _put(file: IO[bytes], tensor: Tensor) -> None:
    """A tensor's bytes as they lie, without a copy of them all."""
    if tensor.numel():
        file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _own(model: nn.Module) -> dict[str, Tensor]:
    """What a model's files hold: its own parameters and lasting buffers, by name, tied ones by each of theirs."""
    found: dict[str, Tensor] = {}
    for path, module in base_modules(model).items():
        kept = {name: b for name, b in module._buffers.items() if name not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **kept}.items():
            if tensor is not None:
                found[f"{path}.{name}" if path else name] = tensor
    return found
