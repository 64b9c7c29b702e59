"""Law 17: over a base whose weights are kept in packed blocks a method computes what it computes over the same numbers kept dense.

The yardstick is therefore a dense twin, unpacked from the very blocks: how well a format approximates a weight is no affair of a method.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.select import all_linear, base_modules, select
from ingraft.adapt.weights import kind_of
from ingraft.methods.contract import ParameterPart
from ingraft.quant.formats import FILE_FORMATS, QUANTISERS
from ingraft.quant.layers import Packed, QuantizedLinear, quantised
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
from ingraft.testing.subjects import Layers
from ingraft.testing.suite import law

FORMATS = {"linear": ("nf4", "int8", "Q8_0"), "llama": ("nf4",)}
"""What each subject is packed in."""


def _layers() -> nn.Module:
    """Wide enough for a block of 32, and nf4's blocks of 64 run across the first layer's rows."""
    return Layers(nn.Linear(32, 64), nn.Linear(64, 64, bias=False), nn.Linear(64, 5))


def _wide(n: int) -> dict[str, Tensor]:
    return {"x": torch.randn(n, 3, 32, generator=torch.Generator().manual_seed(7))}


def _in_eights(layer: nn.Linear) -> QuantizedLinear:
    """A layer as a GGUF in Q8_0 would hold it."""
    from gguf import GGMLQuantizationType, quants

    raw = torch.from_numpy(quants.quantize(layer.weight.detach().numpy().astype(np.float32), GGMLQuantizationType.Q8_0))
    form, dtype = FILE_FORMATS["Q8_0"], layer.weight.dtype
    made = QuantizedLinear(form, layer.in_features, layer.out_features, dtype=dtype, packed=form.pack(raw))
    made.bias = cast("nn.Parameter | None", layer.bias)
    return made


def _packed(name: str, model: nn.Module) -> nn.Module:
    """A model with all its linear layers packed."""
    for path in all_linear(model, base_modules(model)):
        layer = model.get_submodule(path)
        assert isinstance(layer, nn.Linear)
        model.set_submodule(path, quantised(layer, QUANTISERS[name]) if name in QUANTISERS else _in_eights(layer))
    assert any(isinstance(module, Packed) for module in model.modules())
    return model.eval()


def _dense(name: str, model: nn.Module) -> nn.Module:
    """The same numbers in ordinary layers."""
    model = _packed(name, model)
    adapt.make_dense(model)
    return model


def _twins(case: Case) -> Iterator[tuple[str, Case, Case]]:
    """For each format the case over packed weights and over the same weights dense."""
    subject = case.subject
    if subject.name == "linear":
        subject = replace(subject, make=_layers, batch=_wide)
    for name in FORMATS[subject.name]:
        packed, dense = (replace(subject, finish=functools.partial(how, name)) for how in (_packed, _dense))
        yield name, replace(case, subject=packed), replace(case, subject=dense)


def _nowhere_packed(case: Case) -> str | None:
    if case.subject.name not in FORMATS:
        return "linear layers are what is packed; tried on layers by themselves and in a Llama"
    if case.subject.name == "linear" and case.method.sites == ("norms",):
        return "the packed layers by themselves have no norm; tried in a Llama"
    return None


def _in_full(case: Case) -> str | None:
    """Methods that train a packed weight itself."""
    if not issubclass(case.part, ParameterPart):
        return None
    model = case.base()
    sites, _, _ = select(model, case.config, case.method, strict=False)
    kinds = [kind for path in sites if (kind := kind_of(model.get_submodule(path))) is not None]
    return "packed blocks cannot be trained in full: refused" if any(k.name == "linear" for k in kinds) else None


def _refuses_packed(case: Case) -> None:
    for _, packed, _ in _twins(case):
        refused(lambda packed=packed: packed.adapted("a"), "packed blocks")


@law(17, hole=_nowhere_packed, refusal=_in_full, refuses=_refuses_packed)
def packed_is_dense(case: Case) -> None:
    """Over packed weights (nf4, int8, a GGUF's blocks) outputs, gradients and rows are those over the same weights dense, by shortcut and by
    the definition."""
    for name, packed, dense in _twins(case):
        model, twin, batch = packed.adapted("a", "b"), dense.adapted("a", "b"), packed.batch()
        for each in (model, twin):
            adapt.trainable(each, "a")
        with adapt.disabled(model):
            differs(run(twin, batch), run(model, batch), "active and base")
        close(run(model, batch), run(twin, batch), f"packed in {name} and dense")
        close_each(gradients(model, "a", batch), gradients(twin, "a", batch), f"gradients over {name}", times=5.0)
        if on_weights(case):
            general = packed.adapted("a")
            force_general_path(general)
            close(run(general, batch), run(twin, batch), f"by the definition over {name} and dense")
            found = gradients(general, "a", batch)
            close_each(found, gradients(twin, "a", batch), f"gradients by the definition over {name}", times=5.0)
        if shared_over_rows(case) is None:
            rows = ["a", None, "b", "a"]
            with adapt.rows(model, rows), adapt.rows(twin, rows):
                close(run(model, batch), run(twin, batch), f"rows over {name} and dense")
        half = packed.batch(dtype=torch.bfloat16)
        close(
            run(packed.adapted("a", dtype=torch.bfloat16), half).float(),
            run(dense.adapted("a"), batch),
            f"packed in {name} in bfloat16, and dense in float32",
            dtype=torch.bfloat16,
            times=2.0,
        )


def _unmergeable(case: Case) -> str | None:
    return _nowhere_packed(case) or (None if on_weights(case) else "it is no change of weights, so a merge is refused")


@law(17, hole=_unmergeable, refusal=_in_full, refuses=_refuses_packed)
def merged_over_packed(case: Case) -> None:
    """Merged into packed weights an adapter computes what it computes active; unmerge puts the packed bytes back, the same tensors."""
    for name, packed, _ in _twins(case):
        for dtype in (torch.float32, torch.bfloat16):
            model, batch = packed.adapted("a", dtype=dtype), packed.batch(dtype=dtype)
            before = {key: (p, p.detach().clone()) for key, p in adapt.base_parameters(model).items()}
            types = {key: type(module) for key, module in model.named_modules()}
            active = run(model, batch)
            for _ in range(2):
                merge(model)
                close(run(model, batch), active, f"merged into {name} and active", dtype=dtype)
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
            close(run(model, batch), active, f"merged into {name} for good", dtype=dtype)


@law(17, hole=_nowhere_packed, refusal=_in_full, refuses=_refuses_packed)
def saved_over_packed(case: Case) -> None:
    """Saved over packed weights an adapter loads over them with the same bits, and over the base they were packed from without complaint."""
    for name, packed, _ in _twins(case):
        with tempfile.TemporaryDirectory() as scratch:
            model, batch = packed.adapted("a"), packed.batch()
            adapt.save(model, Path(scratch) / "a", "a", dtype=torch.float32)
            other = packed.base()
            adapt.load(other, Path(scratch) / "a", "a")
            same(run(other, batch), run(model, batch), f"loaded and saved over {name}")
