"""Law 17: over a base whose weights are kept in packed blocks a method computes what it computes over the same numbers kept dense.

The yardstick is therefore a dense twin, unpacked from the very blocks: how well a format approximates a weight is no affair of a method.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import torch

import ingraft.adapt as adapt
from ingraft.adapt.select import select
from ingraft.adapt.weights import kind_of
from ingraft.methods.contract import ParameterPart
from ingraft.quant.formats import QUANTISERS
from ingraft.quant.layers import Packed
from ingraft.testing.cases import (
    Case,
    close,
    close_each,
    differs,
    force_general_path,
    gradients,
    merge,
    on_weights,
    refused,
    run,
    same,
    shared_over_rows,
)
from ingraft.testing.suite import law


def _twin(case: Case) -> Case:
    """The case over the same numbers dense."""
    return replace(case, subject=replace(case.subject, twin=True))


def _nothing_packed(case: Case) -> str | None:
    return None if case.subject.packed else "it sets packed weights against dense ones, and these are dense"


def _in_full(case: Case) -> str | None:
    """Methods that train a packed weight itself."""
    if not issubclass(case.part, ParameterPart):
        return None
    model = case.base()
    sites, _, _ = select(model, case.config, case.method, strict=False)
    kinds = [kind for path in sites if (kind := kind_of(model.get_submodule(path))) is not None]
    return "packed blocks cannot be trained in full: refused" if any(k.name == "linear" for k in kinds) else None


def _refuses_packed(case: Case) -> None:
    refused(lambda: case.adapted("a"), "packed blocks")


@law(17, hole=_nothing_packed, refusal=_in_full, refuses=_refuses_packed)
def packed_is_dense(case: Case) -> None:
    """Over packed weights (nf4, int8, a GGUF's blocks) outputs, gradients and rows are those over the same weights dense, by shortcut and by
    the definition."""
    packed, dense = case, _twin(case)
    model, twin, batch = packed.adapted("a", "b"), dense.adapted("a", "b"), packed.batch()
    for each in (model, twin):
        adapt.trainable(each, "a")
    with adapt.disabled(model):
        differs(run(twin, batch), run(model, batch), "active and base")
    close(run(model, batch), run(twin, batch), "packed and dense")
    close_each(gradients(model, "a", batch), gradients(twin, "a", batch), "gradients, packed and dense", times=5.0)
    if on_weights(case):
        general = packed.adapted("a")
        force_general_path(general)
        close(run(general, batch), run(twin, batch), "by the definition over packed weights, and dense")
        found = gradients(general, "a", batch)
        close_each(found, gradients(twin, "a", batch), "gradients by the definition, packed and dense", times=5.0)
    if shared_over_rows(case) is None:
        rows = ["a", None, "b", "a"]
        with adapt.rows(model, rows), adapt.rows(twin, rows):
            close(run(model, batch), run(twin, batch), "rows, packed and dense")
    half = packed.batch(dtype=torch.bfloat16)
    close(
        run(packed.narrowed("a"), half).float(),
        run(dense.representable("a"), batch),
        "packed in bfloat16, and dense in float32",
        dtype=torch.bfloat16,
        times=2.0,
    )


def _unmergeable(case: Case) -> str | None:
    return _nothing_packed(case) or (None if on_weights(case) else "it is no change of weights, so a merge is refused")


@law(17, hole=_unmergeable, refusal=_in_full, refuses=_refuses_packed)
def merged_over_packed(case: Case) -> None:
    """Merged into packed weights an adapter computes what it computes active; unmerge puts the packed bytes back, the same tensors."""
    for dtype in (torch.float32, torch.bfloat16):
        model, batch = case.adapted("a", dtype=dtype), case.batch(dtype=dtype)
        before = {key: (p, p.detach().clone()) for key, p in adapt.base_parameters(model).items()}
        types = {key: type(module) for key, module in model.named_modules()}
        active = run(model, batch)
        for _ in range(2):
            merge(model)
            close(run(model, batch), active, "merged and active", dtype=dtype)
            adapt.unmerge(model)
        now = adapt.base_parameters(model)
        assert list(now) == list(before)
        for key, (parameter, bits) in before.items():
            assert now[key] is parameter, f"{key} is another tensor after unmerge"
            same(parameter.detach(), bits, key)
        assert {key: type(module) for key, module in model.named_modules()} == types
        same(run(model, batch), active, "active after unmerge")
        merge(model)
        adapt.detach(model, keep_merged=True)
        adapt.make_dense(model)
        assert not any(isinstance(module, Packed) for module in model.modules())
        close(run(model, batch), active, "merged for good", dtype=dtype)


@law(17, hole=_nothing_packed, refusal=_in_full, refuses=_refuses_packed)
def saved_over_packed(case: Case) -> None:
    """Saved over packed weights an adapter loads over them with the same bits, and over the base they were packed from without complaint."""
    with tempfile.TemporaryDirectory() as scratch:
        model, batch = case.adapted("a"), case.batch()
        adapt.save(model, Path(scratch) / "a", "a", dtype=torch.float32)
        other = case.base()
        adapt.load(other, Path(scratch) / "a", "a")
        same(run(other, batch), run(model, batch), "loaded and saved")
        if case.subject.packed in QUANTISERS:
            adapt.load(replace(case, subject=replace(case.subject, packed="")).base(), Path(scratch) / "a", "a")
