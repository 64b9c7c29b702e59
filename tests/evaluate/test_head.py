"""Losses and gradients at the asked positions are those of the model's own logits, whatever the model does behind its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import ingraft.adapt as adapt
from ingraft.evaluate.head import PIECE, CausalHead
from ingraft.methods.lora import LoraConfig

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "eos_token_id": 2,
        "bos_token_id": 1,
    },
    "gemma2": {**SMALL, "head_dim": 8, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "opt": {
        "vocab_size": 64,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
    "phi": {**SMALL, "num_key_value_heads": 4},
}
"""Plain; Conv1D; soft cap; scale; divisor; positions behind; a head with bias."""


def build(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family]))
    for parameter in model.parameters():  # fresh models have logits near zero, where caps and scales hide
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def batch(rows: int = 3, width: int = 40) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (rows, width), generator=generator)
    mask = torch.ones_like(ids)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.6, ids, -100)
    for row in range(1, rows):
        mask[row, -row * 5 :] = 0
        labels[row, -row * 5 :] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def reference(model: Any, data: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits.float()
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), data["labels"][:, 1:].reshape(-1), reduction="sum"
    )


def bent_reference(model: Any, data: dict[str, Tensor]) -> Tensor:
    rows = [{name: value[i : i + 1] for name, value in data.items()} for i in range(len(data["input_ids"]))]
    return sum((reference(model, row) ** 2 for row in rows), reference(model, data))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradient_equal_those_of_the_whole_logits(family: str) -> None:
    model = adapt.attach(build(family), LoraConfig(r=4), seed=0)
    own = list(adapt.parameters(model, "default").values())
    with torch.no_grad():
        for parameter in own:
            parameter.normal_(std=0.1)
    data = batch()
    head = CausalHead(model)
    assert head.by_pieces
    wanted = reference(model, data)
    grads = torch.autograd.grad(wanted, own)
    loss = head.loss(data)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-4)
    bent = head.by_row(data).square().sum() + head.loss(data)  # a row's gradient is weighed by what is made of its sum
    for got, want in zip(
        torch.autograd.grad(bent, own), torch.autograd.grad(bent_reference(model, data), own), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max()))
    # 3 * loss, so that the gradient from outside is seen to be applied
    for got, want in zip(torch.autograd.grad(3 * loss, own), grads, strict=True):
        torch.testing.assert_close(got, 3 * want, rtol=1e-3, atol=1e-4)


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), batch(8, 100)
    whole = CausalHead(model).losses(data)[0]
    assert len(whole) > PIECE
    monkeypatch.setattr("ingraft.evaluate.head.PIECE", 7)
    torch.testing.assert_close(CausalHead(model).losses(data)[0], whole)
    torch.testing.assert_close(whole.sum(), reference(model, data), rtol=1e-5, atol=1e-4)


def test_losses_name_their_rows() -> None:
    model, data = build("llama"), batch()
    losses, rows = CausalHead(model).losses(data)
    for row in range(3):
        alone = {name: value[row : row + 1] for name, value in data.items()}
        torch.testing.assert_close(losses[rows == row].sum(), reference(model, alone), rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(CausalHead(model).by_row(data)[row], losses[rows == row].sum())


def test_a_trained_head_gets_its_gradient() -> None:
    model, data = build("llama"), batch()
    model.lm_head.weight.requires_grad_(True)
    head = CausalHead(model)
    assert not head.by_pieces
    (wanted,) = torch.autograd.grad(reference(model, data), model.lm_head.weight)
    (got,) = torch.autograd.grad(head.loss(data), model.lm_head.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_an_adapted_head_is_used_with_its_adapter() -> None:
    model = adapt.attach(build("llama"), LoraConfig(r=2, target_modules=("lm_head",)), seed=0)
    with torch.no_grad():
        for parameter in adapt.parameters(model, "default").values():
            parameter.normal_()
    head = CausalHead(model)
    assert not head.by_pieces
    data = batch()
    torch.testing.assert_close(head.loss(data), reference(model, data), rtol=1e-5, atol=1e-4)


def test_a_model_nobody_knows_keeps_its_logits() -> None:
    model, data = build("llama"), batch()
    forward = type(model).forward

    class Odd(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            out = forward(self, *args, **kwargs)
            out.logits = out.logits.pow(3)
            return out

    model.__class__ = Odd
    head = CausalHead(model)
    assert not head.by_pieces
    torch.testing.assert_close(head.loss(data), reference(model, data), rtol=1e-5, atol=1e-4)


def test_logits_at_positions() -> None:
    model, data = build("gemma2"), batch()
    rows, at = torch.tensor([0, 2, 2]), torch.tensor([5, 0, 20])
    wanted = model(input_ids=data["input_ids"], attention_mask=data["attention_mask"]).logits[rows, at]
    torch.testing.assert_close(CausalHead(model).logits(data, rows, at), wanted, rtol=1e-4, atol=1e-5)


def test_bfloat16_is_close() -> None:
    model, data = build("llama", torch.bfloat16), batch()
    head = CausalHead(model)
    assert head.by_pieces
    torch.testing.assert_close(head.loss(data), reference(model, data), rtol=2e-2, atol=0.5)


def test_the_probe_sees_no_dropout_and_leaves_no_trace() -> None:
    model = adapt.attach(build("llama"), LoraConfig(r=4, lora_dropout=0.5), seed=0)
    with torch.no_grad():
        for parameter in adapt.parameters(model, "default").values():
            parameter.normal_()
    model.train()
    call = model.ingraft_control.call
    assert CausalHead(model).by_pieces
    assert model.training
    assert model.ingraft_control.call is call
