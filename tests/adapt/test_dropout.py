"""Dropout: a mask of good quality that is a function of (adapter seed, step, site, row, position) and of nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.dropout import dropout, dropped_product
from ingraft.adapt.rows import Call, row_keys
from ingraft.methods.lora import LoraConfig

ROWS, WIDTH = 64, 4096


def kept(salt: int = 1, step: int = 0, ids: Tensor | None = None, p: float = 0.3) -> Tensor:
    """(ROWS, WIDTH) which entries survive."""
    call = Call(step=torch.tensor(step), row_ids=ids)
    return dropout(torch.ones(ROWS, WIDTH), p, row_keys(call, salt, ROWS, None, torch.device("cpu"))) != 0


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's, of two masks flattened."""
    stacked = torch.stack([a.flatten().double(), b.flatten().double()])
    return float(torch.corrcoef(stacked)[0, 1])


@pytest.mark.parametrize("p", [0.05, 0.1, 0.3, 0.5, 0.9])
def test_the_share_dropped_is_p(p: float) -> None:
    share = float((~kept(p=p)).double().mean())
    deviation = math.sqrt(p * (1 - p) / (ROWS * WIDTH))
    assert abs(share - p) < 4 * deviation, (share, p)


def test_every_row_and_every_column_is_dropped_alike() -> None:
    mask = (~kept()).double()
    for dim, size in ((0, ROWS), (1, WIDTH)):
        means = mask.mean(dim=dim)
        deviation = math.sqrt(0.3 * 0.7 / size)
        assert float((means - 0.3).abs().max()) < 5.5 * deviation
        assert 0.9 * deviation < float(means.std()) < 1.1 * deviation or (
            dim == 1 and 0.7 < float(means.std()) / deviation < 1.3
        )


def test_survivors_are_scaled_so_that_the_mean_stays() -> None:
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) + 2
    y = dropout(x, 0.3, row_keys(Call(), 1, ROWS, None, torch.device("cpu")))
    assert torch.equal(y[y != 0], (x * (1.0 / 0.7))[y != 0])
    assert abs(float(y.mean() / x.mean()) - 1) < 0.01


def test_sites_steps_and_rows_are_independent() -> None:
    bound = 5 / math.sqrt(ROWS * WIDTH)
    for other in (kept(salt=2), kept(salt=1 << 20), kept(step=1), kept(step=1000), kept(ids=torch.arange(ROWS) + 1000)):
        assert abs(correlation(kept(), other)) < bound
    mask = kept()
    for shift in (1, 2, 7):
        assert abs(correlation(mask[:-shift], mask[shift:])) < 1.2 * bound, "neighbouring rows"
        assert abs(correlation(mask[:, :-shift], mask[:, shift:])) < 1.2 * bound, "neighbouring positions"
        assert abs(correlation(kept(step=shift), mask)) < bound


def test_neighbouring_sites_steps_and_rows_do_not_collide() -> None:
    """Were step and row or site added up plainly, (row 1, step 0) would be (row 0, step 1)."""
    keys = torch.cat(
        [
            row_keys(Call(step=torch.tensor(step)), salt, 32, None, torch.device("cpu"))
            for step in range(32)
            for salt in range(32)
        ]
    )
    collisions = len(keys) - len(keys.unique())
    assert collisions <= 2, f"{collisions} of {len(keys)} keys occur twice"  # by chance, 32,768 draws of 2^32 give 0.1


def test_a_row_keeps_its_mask_in_any_batch() -> None:
    device = torch.device("cpu")
    ids = torch.tensor([9, 4, 7])
    three = row_keys(Call(row_ids=ids), 5, 3, None, device)
    alone = row_keys(Call(row_ids=torch.tensor([4])), 5, 1, None, device)
    assert torch.equal(three[1:2], alone)
    some = row_keys(Call(row_ids=ids), 5, 3, torch.tensor([2, 0]), device)
    assert torch.equal(some, three[[2, 0]])
    assert torch.equal(
        row_keys(Call(row_ids=ids), 5, 6, None, device)[2:4],
        row_keys(Call(row_ids=torch.tensor([4])), 5, 2, None, device),
    )


def model() -> nn.Module:
    """Two layers with one adapter that drops half."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    adapt.attach(net, LoraConfig(r=4, lora_dropout=0.5, target_modules=["0", "1"], init_lora_weights=False), seed=1)
    return net.train()


def test_a_trainer_that_says_nothing_gets_a_new_mask_each_forward() -> None:
    net, x = model(), torch.ones(2, 16)
    assert not torch.equal(net(x), net(x))
    adapt.dropout_step(net, 3)
    assert torch.equal(net(x), net(x)), "once told the step, it stays there"


def test_the_step_taken_inside_a_block_goes_on_counting_outside() -> None:
    net, x = model(), torch.ones(2, 16)
    with adapt.rows(net, ["default", "default"]):
        inside = net(x)
    assert not torch.equal(net(x), inside)


def test_two_adapters_with_one_seed_share_masks_and_two_seeds_do_not() -> None:
    x = torch.ones(2, 16)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
        adapt.attach(net, LoraConfig(r=4, lora_dropout=0.5, target_modules=["0"]), seed=seed)
        with torch.no_grad():
            for p in adapt.parameters(net, "default").values():
                p.fill_(0.1)
        adapt.dropout_step(net, 0)
        outputs.append(net.train()(x))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_gradients_are_those_of_what_is_left() -> None:
    """The product with A keeps x and makes the mask again: autograd's own gradients, in float64."""
    x, A = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 4, 7), (2, 7)))
    keys = row_keys(Call(), 5, 3, None, torch.device("cpu"))
    assert torch.autograd.gradcheck(lambda x, A: dropped_product(x, A, 0.3, keys), (x, A))
    assert torch.autograd.gradcheck(lambda x: dropout(x, 0.3, keys), (x,))
    torch.testing.assert_close(dropped_product(x, A, 0.3, keys), dropout(x, 0.3, keys) @ A.T)


class Three(nn.Module):
    """Three projections of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, out, bias=False) for out in (64, 32, 32))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.q(x), self.k(x), self.v(x)


@pytest.mark.parametrize("p", [0.0, 0.1])
def test_what_lora_keeps_for_backward(p: float) -> None:
    """One input for all three, and three products with A; dropout keeps nothing more than a key for each row."""
    r, B, T = 4, 2, 8
    model = Three().bfloat16()
    adapt.attach(model, LoraConfig(r=r, lora_dropout=p, target_modules=["q", "k", "v"]), seed=1)
    model.train()
    x = torch.randn(B, T, 64, dtype=torch.bfloat16, requires_grad=True)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x)
    tokens, keys = 2 * B * T, 4 * B if p else 0
    assert sum(kept.values()) == tokens * 64 + 3 * tokens * r + 3 * keys
