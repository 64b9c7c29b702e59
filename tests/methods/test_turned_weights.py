"""OFT and BOFT: what they refuse, what holds on kernels, what PEFT has only beside a CUDA extension."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from torch import nn

import ingraft
from ingraft.errors import IngraftError
from ingraft.testing.cases import randomise


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 6, (3, 1), stride=2, bias=False)).eval()


def test_regression_5_oft_on_a_kernel_is_the_identity_at_its_start_and_merged_is_active(tmp_path: Path) -> None:
    model, x = convolutions(), torch.randn(2, 4, 9, 9)
    expected = model(x)
    ingraft.attach(model, ingraft.OFTConfig(oft_block_size=4, target_modules=["0", "2"]))
    assert torch.allclose(model(x), expected, atol=1e-6)
    randomise(model, "default")
    active = model(x)
    assert not torch.allclose(active, expected, atol=0.05)
    ingraft.merge(model)
    assert torch.allclose(model(x), active, atol=1e-5)
    ingraft.unmerge(model)
    ingraft.save(model, tmp_path / "oft")
    # PEFT means something else by these tensors, so it must not take them for its own.
    assert json.loads((tmp_path / "oft" / "adapter_config.json").read_text())["peft_type"] == "INGRAFT_OFT"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ingraft.OFTConfig(oft_block_size=5, target_modules=["0"]), ("36", "2, 3, 4, 6, 9, 12, 18, 36")),
        (ingraft.OFTConfig(oft_block_size=0, r=36, target_modules=["0"]), ("r = 36", "2, 3, 4")),
        (ingraft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["0"]), ("8", "36", "fewer")),
        (ingraft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=["0"]), ("sizes", "2, 6, 18")),
        (ingraft.HRAConfig(r=40, target_modules=["0"]), ("40", "36")),
        (ingraft.RoadConfig(group_size=6, target_modules=["0"]), ("8 outputs", "2, 4, 8")),
    ],
)
def test_sizes_that_do_not_fit_are_refused_with_those_that_do(config: ingraft.OFTConfig, words: tuple[str]) -> None:
    model = convolutions()
    with pytest.raises(IngraftError) as caught:
        ingraft.attach(model, config)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(("size", "factors"), [(4, 1), (4, 2), (2, 3), (6, 2)])
def test_boft_of_several_factors_is_what_peft_would_compute(size: int, factors: int) -> None:
    """The matrices that PEFT builds densely, from its own permutations, give the same weight."""
    model = nn.Sequential(nn.Linear(24, 5)).double().float()
    W = model[0].weight.detach().clone()
    config = ingraft.BOFTConfig(boft_block_size=size, boft_n_butterfly_factor=factors, target_modules=["0"])
    ingraft.attach(model, config)
    randomise(model, "default")
    R, s = (value.detach() for value in ingraft.parameters(model, "default").values())
    turned, eye = torch.eye(24), torch.eye(size)
    for level in range(factors):
        order = BOFTLayer.block_butterfly_perm(None, 24, 24 // size // 2**level, size // 2, factors - 1)  # type: ignore[arg-type]
        P = torch.eye(24)[order]
        Q = (R[level] - R[level].transpose(1, 2)) / 2
        C = torch.block_diag(*((eye - Q) @ torch.linalg.inv(eye + Q)))
        turned = P @ C @ P.T @ turned
    ingraft.merge(model)
    assert torch.allclose(model[0].weight, (turned @ W.T).T * s[:, None], atol=1e-5)


def test_coft_holds_the_trained_values_themselves_after_a_step() -> None:
    model = nn.Sequential(nn.Linear(16, 5))
    ingraft.attach(model, ingraft.OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=["0"]))
    randomise(model, "default")
    x = torch.randn(3, 16)
    before = model(x)
    (R,) = ingraft.parameters(model, "default").values()
    norm = R.norm(dim=1) * 2**0.5
    assert (norm > 0.1).all()
    ingraft.after_step(model, 1)
    assert torch.allclose(R.norm(dim=1) * 2**0.5, torch.full((4,), 0.1 / 2), atol=1e-6)
    assert torch.allclose(model(x), before, atol=1e-6)
