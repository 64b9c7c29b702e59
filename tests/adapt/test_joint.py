"""Rows of several adapters of one kind are served together, and nobody can tell but by the clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import ingraft
from ingraft import adapt
from ingraft.adapt import joint
from ingraft.adapt.control import require_control
from ingraft.methods.registry import make_config

KINDS: dict[str, list[dict[str, Any]]] = {
    "lora": [{"r": 2}, {"r": 4, "lora_alpha": 3}, {"r": 2, "lora_dropout": 0.5}],
    "ia3": [{}, {}],
    "pfeiffer": [{"reduction_factor": 4.0}, {"reduction_factor": 8.0}, {"non_linearity": "gelu"}],
    "houlsby": [{}, {"scaling": 2.0}],
    "parallel": [{}, {}],
}
MIXED = [name for name in KINDS for _ in range(2)]


def made(methods: list[tuple[str, dict[str, Any]]]) -> nn.Module:
    torch.manual_seed(0)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, num_attention_heads=4, num_key_value_heads=2, pad_token_id=0)
    )
    for index, (method, options) in enumerate(methods):
        ingraft.attach(model, make_config(method, options), name=f"a{index}", seed=index)
        with torch.no_grad():
            for tensor in adapt.parameters(model, f"a{index}").values():
                tensor.add_(0.3 * torch.randn_like(tensor))
    return model.eval()


def alone(model: nn.Module, ids: Tensor, rows: list[str | None]) -> Tensor:
    """Each row's logits with its own adapter on the whole batch."""
    found: list[Tensor] = []
    with torch.no_grad():
        for index, name in enumerate(rows):
            ingraft.activate(model, *([name] if name else []))
            found.append(model(ids).logits[index])
    return torch.stack(found)


def together(model: nn.Module, ids: Tensor, rows: list[str | None]) -> Tensor:
    with torch.no_grad(), ingraft.rows(model, rows):
        return model(ids).logits


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_a_joint_batch_is_its_rows_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks, scales and options of their own, rows without an adapter, and beams (two entries a row)."""
    methods = [(name, {}) for name in MIXED] if kind == "mixed" else [(kind, options) for options in KINDS[kind]]
    model = made(methods)
    rows: list[str | None] = [None, *(f"a{i}" for i in range(len(methods))), None, "a0"]
    ids = torch.randint(1, 64, (len(rows), 5))
    served = 0
    proper = joint.serve

    def count(*args: Any) -> Any:
        nonlocal served
        served += 1
        return proper(*args)

    monkeypatch.setattr("ingraft.adapt.host.serve", count)
    torch.testing.assert_close(together(model, ids, rows), alone(model, ids, rows), atol=2e-5, rtol=1e-4)
    assert served > 0
    twice = ids.repeat_interleave(2, 0)
    wanted = alone(model, ids, rows).repeat_interleave(2, 0)
    torch.testing.assert_close(together(model, twice, rows), wanted, atol=2e-5, rtol=1e-4)


def halve_in_place(model: nn.Module, tensor: nn.Parameter) -> None:
    with torch.no_grad():
        tensor.mul_(0.5)


def halve_data(model: nn.Module, tensor: nn.Parameter) -> None:
    tensor.data = tensor.data * 0.5


def replace_parameter(model: nn.Module, tensor: nn.Parameter) -> None:
    for module in model.modules():
        for name, own in module._parameters.items():
            if own is tensor:
                module._parameters[name] = nn.Parameter(tensor.detach() * 0.5)


def another(model: nn.Module, tensor: nn.Parameter) -> None:
    ingraft.detach(model, "a1")
    ingraft.attach(model, make_config("lora", {"r": 3, "init_lora_weights": False}), name="a1", seed=9)
    model.eval()


@pytest.mark.parametrize("change", [halve_in_place, halve_data, replace_parameter, another])
def test_what_was_joined_is_not_used_when_it_is_out_of_date(change: Callable[[nn.Module, nn.Parameter], None]) -> None:
    model = made([("lora", {"r": 2}), ("lora", {"r": 2})])
    rows: list[str | None] = ["a0", "a1", "a1"]
    ids = torch.randint(1, 64, (3, 5))
    before = together(model, ids, rows)
    change(model, next(iter(adapt.parameters(model, "a1").values())))
    after = together(model, ids, rows)
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, alone(model, ids, rows), atol=2e-5, rtol=1e-4)


def test_other_rows_are_other_products() -> None:
    model = made([("lora", {"r": 2}), ("lora", {"r": 2})])
    ids = torch.randint(1, 64, (3, 5))
    for rows in (["a0", "a1", None], ["a1", "a0", None], [None, "a1", "a0"]):
        torch.testing.assert_close(together(model, ids, rows), alone(model, ids, rows), atol=2e-5, rtol=1e-4)


def test_in_training_every_adapter_drops_inputs_of_its_own() -> None:
    """Also without gradients; and scoring after training is joint again."""
    model = made([("lora", {"r": 2, "lora_dropout": 0.5}), ("lora", {"r": 2, "lora_dropout": 0.5})])
    ids, rows = torch.randint(1, 64, (3, 5)), ["a0", "a1", "a1"]
    scored = together(model, ids, rows)
    model.train()
    dropped = together(model, ids, rows)
    assert not torch.allclose(dropped, scored)
    model.eval()
    torch.testing.assert_close(together(model, ids, rows), scored)


def test_one_plan_a_host_is_kept_and_none_after_the_rows() -> None:
    """A server's batches come with other rows each time, and in prefill and decode with other inputs."""
    model = made([("lora", {"r": 2}), ("lora", {"r": 2})])
    assignments: list[list[str | None]] = [["a0", "a1"], ["a1", "a0"], [None, "a1"], ["a0", None]]
    for rows in assignments:
        with torch.no_grad(), ingraft.rows(model, rows):
            for length in (5, 1):
                model(torch.randint(1, 64, (2, length)))
            assert len(require_control(model).joined.plans) == 14  # two blocks of seven linear layers
        assert not require_control(model).joined


# ------------------------------------------------------------------------------------------------- one adapter, token by token


class Counted(TorchDispatchMode):
    """How often each operation runs."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def in_half(model: nn.Module) -> nn.Module:
    """The base in bfloat16, what is trained in float32."""
    trained = {id(tensor) for tensor in adapt.parameters(model, "a0").values()}
    for parameter in model.parameters():
        if id(parameter) not in trained:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def steps(model: nn.Module, count: int, *, between: Callable[[], object] = lambda: None) -> Tensor:
    """The logits of tokens one by one behind a prompt of five, two rows."""
    ids = torch.arange(1, 6).repeat(2, 1)
    cache = transformers.DynamicCache()
    found: list[Tensor] = []
    model(input_ids=ids, past_key_values=cache)
    for step in range(count):
        if step == count - 1:
            between()
        found.append(model(input_ids=ids[:, step : step + 1], past_key_values=cache).logits.detach())
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", ["lora", "ia3", "pfeiffer", "houlsby", "parallel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_generation_is_what_it_is_without_what_is_kept(kind: str, dtype: torch.dtype) -> None:
    """With gradients nothing is kept. In float32 both are the same bits."""
    model = made([(kind, {})])
    if dtype == torch.bfloat16:
        in_half(model)
    ordinary = steps(model, 3)
    with torch.no_grad():
        kept = steps(model, 3)
    if dtype == torch.float32:
        assert torch.equal(kept, ordinary)
    torch.testing.assert_close(kept, ordinary, atol=0.05, rtol=0.05)


def test_a_step_casts_nothing_and_runs_two_products_a_layer() -> None:
    """Counted against the bare base, over fourteen layers: no cast of A or B, a product with each, a scale, and views."""
    model = in_half(made([("lora", {"r": 2})]))
    calls: list[Counter[str]] = []
    for adapters in (["a0"], []):
        ingraft.activate(model, *adapters)
        counted = Counted()

        def count(counted: Counted = counted) -> None:
            counted.__enter__()

        with torch.no_grad():
            steps(model, 3, between=count)
        counted.__exit__(None, None, None)
        calls.append(counted.calls)
    more = calls[0] - calls[1]
    assert more["aten._to_copy.default"] == 0, more
    assert more["aten.mm.default"] == more["aten.addmm_.default"] == more["aten.mul_.Tensor"] == 14, more
    assert sum(more.values()) <= 14 * 10, more
    assert not calls[1] - calls[0]


@pytest.mark.parametrize("change", [halve_in_place, halve_data, replace_parameter])
def test_what_one_adapter_keeps_is_not_used_when_it_is_out_of_date(
    change: Callable[[nn.Module, nn.Parameter], None],
) -> None:
    model = in_half(made([("lora", {"r": 2})]))
    tensor = next(iter(adapt.parameters(model, "a0").values()))
    with torch.no_grad():
        before = steps(model, 3)
        after = steps(model, 3, between=lambda: change(model, tensor))
    assert torch.equal(before[:, :2], after[:, :2]) and not torch.equal(before[:, 2], after[:, 2])


def test_one_adapter_keeps_nothing_beyond_a_longer_forward() -> None:
    """So what is written through `.data`, which no version tells of, is seen by whatever is scored next."""
    model = in_half(made([("lora", {"r": 2})]))
    ids = torch.arange(1, 6).repeat(2, 1)
    with torch.no_grad():
        steps(model, 2)
        assert len(require_control(model).joined.plans) == 14
        before = model(ids).logits
        assert require_control(model).joined is None
        for tensor in adapt.parameters(model, "a0").values():
            tensor.data.mul_(0.5)
        assert not torch.equal(model(ids).logits, before)
