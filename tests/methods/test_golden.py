"""loralib's and LyCORIS's numbers: the same tensors give the same outputs, gradients and ten steps of an optimiser."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ingraft
from ingraft.methods.registry import make_config

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "weight_methods.json").read_text())["cases"]

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora-linear": ("lora", {"r": 4, "lora_alpha": 6}),
    "lora-embedding": ("lora", {"r": 3, "lora_alpha": 6}),
    "loha-linear": ("loha", {"r": 4, "alpha": 1}),
    "loha-conv2d": ("loha", {"r": 3, "alpha": 6}),
    "loha-cores-conv2d": ("loha", {"r": 3, "alpha": 3, "use_effective_conv2d": True}),
    "lokr-linear": ("lokr", {"r": 1, "alpha": 3}),
    "lokr-factor-linear": ("lokr", {"r": 2, "alpha": 1, "decompose_factor": 2}),
    "lokr-both-linear": ("lokr", {"r": 1, "alpha": 2, "decompose_both": True}),
    "lokr-conv2d": ("lokr", {"r": 1, "alpha": 2}),
    "oft-4-linear": ("oft", {"oft_block_size": 4, "use_cayley_neumann": False}),
    "boft-1-linear": ("boft", {"boft_block_size": 16}),
    "boft-4-linear": ("boft", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}),
    "boft-2-linear": ("boft", {"boft_block_size": 2, "boft_n_butterfly_factor": 4}),
}


def _maker() -> ModuleType:
    """The script that made the numbers, for its formula and its layers."""
    spec = importlib.util.spec_from_file_location("make_weight_methods", GOLDEN / "make_weight_methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


class Case:
    """One of the script's cases here. A rotation turns a layer's inputs here and its outputs in LyCORIS, so there the layer is seen from its
    other side: its weight transposed, every unit vector put in, and what comes out transposed back."""

    def __init__(self, name: str) -> None:
        self.name, (method, options) = name, OURS[name]
        self.kind = MAKER.CASES[name][1]
        self.turned = method in ("oft", "boft")
        layer = MAKER.layer_of(self.kind)
        if self.turned:
            W = layer.weight.detach()
            layer = nn.Linear(W.shape[0], W.shape[1], bias=False)
            layer.weight = nn.Parameter(W.T.contiguous())
        self.model = nn.ModuleDict({"layer": layer})
        ingraft.attach(self.model, make_config(method, {**options, "target_modules": ["layer"]}))
        self.own = {
            key.rpartition(".")[2]: value
            for key, value in ingraft.parameters(self.model, "default").items()
            if key != "layer.boft_s"
        }
        with torch.no_grad():
            for key, parameter in self.own.items():
                parameter.copy_(self._from_theirs(key, tuple(parameter.shape)))

    def output(self) -> Tensor:
        layer: Any = self.model["layer"]
        return layer(torch.eye(MAKER.OUT)).T if self.turned else layer(MAKER.input_of(self.kind))

    def _from_theirs(self, key: str, shape: tuple[int, ...]) -> Tensor:
        if not self.turned:
            return MAKER.values(key, shape)
        B = MAKER.values("oft_blocks", torch.tensor(CASES[self.name]["gradients"]["oft_blocks"]).shape)
        Q = B - B.transpose(-1, -2)
        if key == "oft_R":
            rows, columns = torch.triu_indices(Q.shape[-1], Q.shape[-1], 1)
            return Q[:, rows, columns]
        return -2 * self._in_halves(B)

    @staticmethod
    def _in_halves(B: Tensor) -> Tensor:
        """LyCORIS's blocks in the order of rows and columns used here: they alternate between the two halves that meet in a block."""
        order = torch.arange(B.shape[-1]).view(-1, 2).T.flatten()
        return B[..., order, :][..., order]

    def gradients(self) -> Mapping[str, Tensor]:
        """The gradients of our tensors as those of theirs."""
        found = {key: parameter.grad for key, parameter in self.own.items() if parameter.grad is not None}
        assert found.keys() == self.own.keys()
        if "oft_R" in found:
            B = torch.zeros(torch.tensor(CASES[self.name]["gradients"]["oft_blocks"]).shape)
            rows, columns = torch.triu_indices(B.shape[-1], B.shape[-1], 1)
            B[:, rows, columns] = found["oft_R"]
            return {"oft_blocks": B - B.transpose(1, 2)}
        if "boft_R" in found:
            R = found["boft_R"]
            back = torch.arange(R.shape[-1]).view(2, -1).T.flatten()
            return {"oft_blocks": -2 * R[..., back, :][..., back]}
        return found


@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_ten_steps_are_theirs(name: str) -> None:
    case, golden = Case(name), CASES[name]
    y = case.output()
    expected = torch.tensor(golden["output"])
    assert not torch.allclose(expected, MAKER.layer_of(case.kind)(MAKER.input_of(case.kind)), atol=1e-2)
    assert torch.allclose(y, expected, atol=1e-5)
    MAKER.loss_of(y).backward()
    gradients = case.gradients()
    assert gradients.keys() == golden["gradients"].keys()
    for key, value in golden["gradients"].items():
        assert torch.allclose(gradients[key], torch.tensor(value), rtol=1e-3, atol=1e-5), key
    # Both entries of a pair move in LyCORIS's blocks, one in ours: twice the distance.
    optimizer = torch.optim.Adam(case.own.values(), lr=MAKER.RATE * (2 if case.turned else 1))
    for loss_there in golden["losses"]:
        optimizer.zero_grad()
        loss = MAKER.loss_of(case.output())
        loss.backward()
        optimizer.step()
        assert abs(loss.item() - loss_there) < 1e-4 * loss_there
    assert torch.allclose(case.output(), torch.tensor(golden["after"]), atol=1e-4)


def test_every_case_is_held() -> None:
    assert CASES.keys() == OURS.keys() == MAKER.CASES.keys()


def test_regression_22_loha_merges_what_it_computes() -> None:
    """LyCORIS's merge applies the scale twice: at alpha 1 and rank 4 it is four times too small."""
    case, golden = Case("loha-linear"), CASES["loha-linear"]
    layer: Any = case.model["layer"]
    W = layer.weight.detach().clone()
    ingraft.merge(case.model)
    assert torch.allclose(layer.weight.T, torch.tensor(golden["output"]), atol=1e-5)
    assert torch.allclose(W + (layer.weight - W) / 4, torch.tensor(golden["merged"]), atol=1e-5)
