"""Forwards at the same time: a layer's product without its bias is computed so that another thread sees nothing of it."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import ingraft.adapt as adapt
from ingraft.methods.contract import MethodConfig
from ingraft.methods.dora import DoraConfig
from ingraft.methods.ia3 import IA3Config
from ingraft.testing.cases import randomise, run, same
from ingraft.testing.subjects import SUBJECTS

CONFIGS: dict[str, MethodConfig] = {
    "dora": DoraConfig(r=2, target_modules=["first", "second"]),
    "ia3": IA3Config(target_modules=["first", "second"]),
}


class Watched(TorchFunctionMode):
    """Looks into the layers at every operation of torch, where another thread could."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers, self.operations = layers, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        assert not any({"weight", "bias"} & vars(layer).keys() for layer in self.layers)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["linear", "conv1d-transposed", "conv1d", "conv2d"])
def test_leaving_out_a_bias_leaves_no_trace(name: str, method: str) -> None:
    """While a layer computes without its bias, with one and without, it shows the parameters it has."""
    model: Any = SUBJECTS[name].make_redrawn()
    adapt.attach(model, CONFIGS[method], "a", seed=1)
    randomise(model, "a")
    batch = SUBJECTS[name].batch(2)
    expected = run(model, batch)
    watched = Watched([model.first, model.second])
    with watched:
        found = run(model, batch)
    assert watched.operations
    same(found, expected, "watched and not")


def test_forwards_at_the_same_time_are_each_what_they_are_alone() -> None:
    model = SUBJECTS["llama"].make_redrawn()
    adapt.attach(model, DoraConfig(r=2), "a", seed=1)
    randomise(model, "a")
    batch = SUBJECTS["llama"].batch(2)
    expected = run(model, batch)
    found: list[Tensor] = []
    start = threading.Barrier(3)

    def work() -> None:
        start.wait()
        with torch.no_grad():
            found.extend(model(**batch).logits for _ in range(5))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 15
    for one in found:
        same(one, expected, "at the same time and alone")
