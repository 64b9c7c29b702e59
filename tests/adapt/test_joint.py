"""Rows of several adapters of one kind are served together, and nobody can tell but by the clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

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
            assert len(require_control(model).joined) == 14  # two blocks of seven linear layers
        assert not require_control(model).joined
