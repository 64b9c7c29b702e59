"""Laws of saved adapters."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch

import ingraft.adapt as adapt
from ingraft.adapt.files import WEIGHTS
from ingraft.testing.cases import Case, Snapshot, differs, refused, run, same
from ingraft.testing.suite import law


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@law(6)
def saved_and_loaded_is_the_same(case: Case) -> None:
    """Saved in float32 and loaded, every tensor has its bits; the file is the same bytes each time, and after a load too."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("error")
        first, second, third = (Path(scratch) / name for name in ("first", "second", "third"))
        model = case.adapted("a", "b")
        expected = run(model, case.batch())
        adapt.save(model, first, "a", dtype=torch.float32)
        adapt.save(model, second, "a", dtype=torch.float32)
        assert _bytes(first) == _bytes(second), "the same adapter saved twice gives different bytes"
        other = case.base()
        adapt.load(other, first, "a")
        own = adapt.parameters(model, "a")
        back = adapt.parameters(other, "a")
        assert set(own) == set(back)
        for key, p in own.items():
            same(back[key].detach(), p.detach(), key)
            assert not back[key].requires_grad, f"{key} is trainable though `trainable` was not asked for"
        same(run(other, case.batch()), expected, "loaded and saved")
        adapt.save(other, third, "a", dtype=torch.float32)
        assert _bytes(first)[WEIGHTS] == _bytes(third)[WEIGHTS]


@law(6)
def saved_in_the_dtype_of_use_loses_nothing(case: Case) -> None:
    """Saved in the dtype the base computes in (the default), bfloat16 here, the loaded adapter gives the same bits."""
    with tempfile.TemporaryDirectory() as scratch:
        model = case.adapted("a", dtype=torch.bfloat16)
        batch = case.batch(dtype=torch.bfloat16)
        expected = run(model, batch)
        adapt.save(model, Path(scratch) / "a", "a")
        other = case.base(torch.bfloat16)
        differs(run(other, batch), expected, "base and adapter")
        adapt.load(other, Path(scratch) / "a", "a")
        same(run(other, batch), expected, "loaded and saved, in bfloat16")
        assert all(p.dtype == torch.float32 for p in adapt.parameters(other, "a").values())


@law(6)
def a_damaged_file_is_refused(case: Case) -> None:
    """A file with a changed byte, and one that was cut short, are refused, and the model is what it was."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "a"
        adapt.save(case.adapted("a"), folder, "a")
        whole = (folder / WEIGHTS).read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
            (folder / WEIGHTS).write_bytes(damaged)
            model = case.base()
            before = Snapshot.of(model)
            refused(lambda model=model: adapt.load(model, folder, "a"))
            before.assert_restored(model)
