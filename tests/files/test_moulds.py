"""Loading is one reading of each file, and what was learned of one file serves the next like it, never another."""

from __future__ import annotations

import builtins
import copy
import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ingraft
from ingraft import IngraftError, _disk
from ingraft.adapt import building, select
from ingraft.adapt.control import require_control
from ingraft.adapt.files import loading, moulds
from ingraft.adapt.files.tensors import KINDS, open_tensors, read_header
from ingraft.methods.registry import make_config
from ingraft.testing.table import METHODS, row

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "ingraft.json"

CAST = ["lora", "ia3", "houlsby", "loha", "dora"]
"""Methods of four families whose parts are nothing but their file's tensors."""


def saved(tiny: SimpleNamespace, folder: Path, method: str = "lora", seed: int = 3, **options: Any) -> Path:
    """An adapter with values of its own, in a folder."""
    model = tiny.make("llama")
    own = row(method).config.options() if method in METHODS else {}
    ingraft.attach(model, make_config(method, {**own, **options}), seed=seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for parameter in ingraft.parameters(model, "default").values():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return ingraft.save(model, folder)


def resealed(folder: Path, change: Any) -> None:
    """Change the tensors of a folder of ours as if they had been saved so."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][WEIGHTS] = {
        "size": (folder / WEIGHTS).stat().st_size,
        "sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest(),
    }
    from ingraft.durable import to_json

    del manifest["digest"]
    manifest["digest"] = hashlib.sha256(to_json(manifest)).hexdigest()
    (folder / MANIFEST).write_bytes(to_json(manifest))


class Counted:
    """How often each file was opened and how many bytes were read from it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.bytes = Counter[str](), Counter[str]()
        real, counted = io.open, self

        def opening(file: Any, *args: Any, **kwargs: Any) -> Any:
            stream = real(file, *args, **kwargs)
            name = Path(os.fspath(file)).name if isinstance(file, str | os.PathLike) else ""
            counted.opened[name] += 1
            return _Stream(stream, name, counted) if name == WEIGHTS else stream

        monkeypatch.setattr(io, "open", opening)
        monkeypatch.setattr(builtins, "open", opening)


class _Stream:
    def __init__(self, stream: Any, name: str, counted: Counted) -> None:
        self._stream, self._name, self._counted = stream, name, counted

    def read(self, *args: int) -> bytes:
        found = self._stream.read(*args)
        self._counted.bytes[self._name] += len(found)
        return found

    def readinto(self, buffer: Any) -> int:
        count = self._stream.readinto(buffer)
        self._counted.bytes[self._name] += count
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def test_each_file_is_opened_once_and_read_once(
    tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny.make("llama")
    folders = [saved(tiny, tmp_path / str(n), seed=n) for n in (1, 2)]
    for n, folder in enumerate(folders):  # the long way, then from the mould
        with monkeypatch.context() as patched:
            counted = Counted(patched)
            ingraft.load(model, folder, str(n))
        assert {name: counted.opened[name] for name in (CONFIG, WEIGHTS, MANIFEST)} == dict.fromkeys(
            (CONFIG, WEIGHTS, MANIFEST), 1
        )
        assert counted.bytes[WEIGHTS] == (folder / WEIGHTS).stat().st_size


def test_the_next_like_it_is_not_worked_out_again(
    tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Counter[str]()

    def count(where: Any, name: str) -> None:
        real = getattr(where, name)

        def counting(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(where, name, counting)

    for where, name in ((building, "facts_of"), (select, "_targets"), (loading, "entries"), (loading, "fingerprint")):
        count(where, name)
    model = tiny.make("llama")
    folders = [saved(tiny, tmp_path / str(n), seed=n) for n in range(4)]
    calls.clear()
    ingraft.load(model, folders[0], "0")
    first = dict(calls)
    assert min(first[name] for name in ("facts_of", "_targets", "entries", "fingerprint")) > 0
    for n in (1, 2, 3):
        calls.clear()
        ingraft.load(model, folders[n], str(n))
        assert calls == {"fingerprint": 1}


@pytest.mark.parametrize("method", CAST)
def test_an_adapter_from_a_mould_is_the_one_that_was_saved(
    method: str, tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model = tiny.example("llama"), tiny.make("llama")
    folders = [saved(tiny, tmp_path / str(n), method, seed=n) for n in (1, 2)]
    ingraft.load(model, folders[0], "a")
    worked_out = Counter[str]()
    monkeypatch.setattr(loading, "_load", lambda *_: worked_out.update(["_load"]))
    ingraft.load(model, folders[1], "b", trainable=True)
    assert not worked_out
    monkeypatch.undo()
    alone = tiny.make("llama")
    ingraft.load(alone, folders[1], "b", trainable=True)
    mine, theirs = ingraft.parameters(model, "b"), ingraft.parameters(alone, "b")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    assert all(p.requires_grad and isinstance(p, nn.Parameter) for p in mine.values())
    assert not any(p.requires_grad for p in ingraft.parameters(model, "a").values())
    assert torch.equal(tiny.output(model, batch), tiny.output(alone, batch))
    ingraft.activate(model, "a")
    first = tiny.make("llama")
    ingraft.load(first, folders[0], "a")
    assert torch.equal(tiny.output(model, batch), tiny.output(first, batch))
    for one in (model, copy.deepcopy(model)):
        assert ingraft.save(one, tmp_path / "again", "b", overwrite=True)
        assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folders[1] / WEIGHTS).read_bytes()


def test_every_tensor_has_a_storage_of_its_own(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Savers that look for tied tensors by storage would drop all but one of those that share it."""
    model = tiny.make("llama")
    for n in (1, 2):
        ingraft.load(model, saved(tiny, tmp_path / str(n), seed=n), str(n))
    tensors = list(ingraft.parameters(model, "2").values())
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)
    with torch.no_grad():
        tensors[0].add_(1.0)
    assert [tensor._version for tensor in tensors[1:]] == [0] * (len(tensors) - 1)


@pytest.mark.parametrize("change", ["module", "shape", "value", "merged", "wrapped"])
def test_a_changed_model_is_looked_at_again(change: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    folders = [saved(tiny, tmp_path / str(n), seed=n) for n in (1, 2)]
    ingraft.load(model, folders[0], "a")
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    before = set(require_control(model).adapters)
    if change == "module":
        mlp.down_proj = nn.Linear(3, 3)
    elif change == "shape":
        mlp.down_proj.weight = nn.Parameter(torch.zeros(3, 3))
    elif change == "value":
        mlp.down_proj.weight.data.mul_(2.0)  # no version counts this
    elif change == "merged":
        ingraft.merge(model)
    else:
        mlp.down_proj.forward = lambda x: x
    words = {
        "module": "another base|shape",
        "shape": "another base|shape",
        "value": "another base",
        "merged": "Call `unmerge` first",
        "wrapped": "replaced `forward`",
    }
    with pytest.raises(IngraftError, match=words[change]):
        ingraft.load(model, folders[1], "b")
    assert set(require_control(model).adapters) == before


@pytest.mark.parametrize("what", ["damaged", "infinite", "name"])
def test_a_mould_spares_no_check_of_the_file(what: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    folders = [saved(tiny, tmp_path / str(n), seed=n) for n in (1, 2)]
    ingraft.load(model, folders[0], "a")
    name, weights = "b", folders[1] / WEIGHTS
    if what == "damaged":
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x7f")
    elif what == "infinite":
        resealed(folders[1], lambda tensors: next(iter(tensors.values())).view(-1)[3:4].fill_(float("inf")))
    else:
        name = "a"
    before = {key: value.clone() for key, value in model.state_dict().items()}
    words = {"damaged": f"{WEIGHTS}: damaged or changed", "infinite": "lora_A.weight holds values", "name": "attached"}
    with pytest.raises(IngraftError, match=words[what]):
        ingraft.load(model, folders[1], name)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def test_methods_with_more_than_their_files_tensors_have_no_mould(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Frozen banks, prefixes in one tensor, modules trained whole beside the sites: made anew each time."""
    for method, options in (("vera", {}), ("prefix", {}), ("lora", {"modules_to_save": ["lm_head"]})):
        model = tiny.make("llama")
        ingraft.load(model, saved(tiny, tmp_path / method, method, **options))
        assert require_control(model).moulds == []
    assert moulds.KEPT > 0


def test_a_folder_that_lay_aside_is_put_back(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """A replacement took it away and was cut short."""
    folder = saved(tiny, tmp_path / "a")
    folder.rename(_disk.temporary(folder, "old"))
    assert not folder.exists()
    assert ingraft.load(tiny.make("llama"), folder) == "default"


def test_a_tie_is_said_each_time(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.warns(UserWarning, match="shares its weight"):
        ingraft.attach(model, ingraft.LoraConfig(r=2, target_modules=["embed_tokens"]))
    folder = ingraft.save(model, tmp_path / "a")
    for name in ("b", "c"):
        with pytest.warns(UserWarning, match="shares its weight"):
            ingraft.load(model, folder, name)


# ------------------------------------------------------------------------------------------------------------ the model's own modules


def test_detaching_and_loading_touch_what_is_theirs_alone(
    tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The work is the same with two adapters held as with twenty: parts are looked up, never walked over."""
    folder, model = saved(tiny, tmp_path / "a"), tiny.make("llama")
    looked: list[int] = []
    real = nn.Module.named_modules

    def counting(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for found in real(self, *args, **kwargs):
            looked[-1] += 1
            yield found

    for n in range(20):
        looked.append(0)
        with monkeypatch.context() as patched:
            patched.setattr(nn.Module, "named_modules", counting)
            ingraft.load(model, folder, str(n))
            if n in (3, 19):
                ingraft.detach(model, str(n))
    assert len({*looked[1:3], *looked[4:19]}) == 1
    assert looked[3] == looked[19]


def test_the_models_own_modules_are_seen_whatever_hangs_in_them(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    plain = list(select.base_modules(model))
    ingraft.attach(model, ingraft.LoraConfig(r=2), "a")
    ingraft.attach(model, ingraft.LoraConfig(r=2), "b")
    assert list(select.base_modules(model)) == plain
    mlp: Any = model.get_submodule("model.layers.0.mlp")
    mlp.down_proj.added = nn.Linear(2, 2)  # behind the parts
    assert "model.layers.0.mlp.down_proj.added" in select.base_modules(model)
    ingraft.attach(model, ingraft.LoraConfig(r=2), "c")
    assert "model.layers.0.mlp.down_proj.added" in select.base_modules(model)
    del mlp.down_proj.added
    assert list(select.base_modules(model)) == plain
    other = nn.Linear(2, 2)
    mlp.up_proj = other
    assert select.base_modules(model)["model.layers.0.mlp.up_proj"] is other
    twin = copy.deepcopy(model)
    assert select.base_modules(twin)["model.layers.0.mlp"] is twin.get_submodule("model.layers.0.mlp")


# ------------------------------------------------------------------------------------------------------------------ the file itself


def test_tensors_are_the_librarys(tmp_path: Path) -> None:
    """Every dtype and shape, numbers that lie across their boundaries among them."""
    torch.manual_seed(0)
    tensors = {
        f"{kind}.{n}": torch.randint(0, 100, (3, n + 1)).to(dtype) for kind, dtype in KINDS.items() for n in (0, 1)
    }
    tensors |= {"none": torch.zeros(0, 4), "one": torch.tensor(1.5)}
    save_file(tensors, tmp_path / "t.safetensors")
    with open_tensors(tmp_path / "t.safetensors") as file:
        assert set(file.header) == set(tensors)
        for key, tensor in tensors.items():
            own = file.tensor(key)
            assert own.shape == tensor.shape and own.dtype == tensor.dtype
            assert torch.equal(own.contiguous().view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        assert file.digest()() == hashlib.sha256((tmp_path / "t.safetensors").read_bytes()).hexdigest()


WRONG = {
    "hole": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
    "overlap": {
        "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    },
    "size": {"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
    "short": {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}},
    "backwards": {"a": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}},
    "negative": {"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}},
    "dtype": {"a": {"dtype": "F31", "shape": [2], "data_offsets": [0, 8]}},
    "fields": {"a": {"dtype": "F32", "shape": [2]}},
    "list": {"a": [0, 8]},
    "meta": {"__metadata__": {"n": 1}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
    "fine": {"__metadata__": {"n": "1"}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}},
}


@pytest.mark.parametrize("case", [*WRONG, "no JSON", "long header", "empty", "no object"])
def test_a_file_is_refused_where_the_library_refuses_it(case: str, tmp_path: Path) -> None:
    head = json.dumps(WRONG[case]).encode() if case in WRONG else {"no object": b"[1, 2]"}.get(case, b"{'")
    length = len(head) + 10_000 * (case == "long header")
    content = b"" if case == "empty" else length.to_bytes(8, "little") + head + bytes(8)
    path = tmp_path / "t.safetensors"
    path.write_bytes(content)
    try:
        safetensors.deserialize(content)
        fine = True
    except Exception:  # whatever it raises
        fine = False
    assert fine == (case == "fine")
    if fine:
        assert read_header(path) == {"a": ((2,), "F32")}
    else:
        with pytest.raises(IngraftError, match="not a readable safetensors file"):
            read_header(path)
