"""Tiny models by name, as the fixture `tiny`: the same weights every time, no network."""

from __future__ import annotations

import gc
import logging
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
)

from ingraft.testing.matrix import pytest_terminal_summary

__all__ = ["pytest_terminal_summary"]

VOCAB = 64


def pytest_configure() -> None:
    """No test pulls the plug: what a flush is for cannot be seen here, that it is asked for can (tests/durable). Thousands of them cost a minute."""
    os.fsync = lambda fd: None  # type: ignore[assignment]


def pytest_collection_finish() -> None:
    """Thousands of tests are there to stay: the collector need not look through them again and again, which took a seventh of the time."""
    for logger in logging.getLogger().manager.loggerDict.values():
        if isinstance(logger, logging.Logger) and logger.name.startswith("torch."):
            logger.propagate = True  # pytest hangs its handlers to every logger that does not, six times a test
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


class Picture(nn.Module):
    """Two convolutions and a head, one of them with a bias and a stride."""

    def __init__(self, kernel: int = 3, groups: int = 1) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 12, kernel, stride=2, bias=False, groups=groups)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean(dim=(2, 3)))


PICTURES: dict[str, dict[str, int]] = {"picture": {}, "points": {"kernel": 1}, "groups": {"groups": 2}}


def make(kind: str) -> nn.Module:
    """A small model of a kind, the same weights every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "llama":
            config: Any = LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=VOCAB,
                pad_token_id=0,
            )
            return LlamaForCausalLM(config).eval()
        if kind == "gpt2":
            config = GPT2Config(
                n_embd=32, n_layer=2, n_head=4, vocab_size=VOCAB, n_positions=64, bos_token_id=1, eos_token_id=1
            )
            return GPT2LMHeadModel(config).eval()
        if kind == "bert":
            config = BertConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCAB,
                num_labels=3,
            )
            return BertForSequenceClassification(config).eval()
        if kind == "mt5":
            config = MT5Config(d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8, vocab_size=VOCAB)
            return MT5ForConditionalGeneration(config).eval()
        if kind in PICTURES:
            return Picture(**PICTURES[kind]).eval()
    raise AssertionError(kind)


def example(kind: str) -> dict[str, Tensor]:
    """A batch for it, its second row padded on the right."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if kind in PICTURES:
            return {"x": torch.randn(2, 3, 9, 9)}
        ids = torch.randint(2, VOCAB, (2, 7))
        mask = torch.ones_like(ids)
        mask[1, 5:] = 0
        batch = {"input_ids": ids, "attention_mask": mask}
        return batch | ({"decoder_input_ids": torch.randint(2, VOCAB, (2, 4))} if kind == "mt5" else {})


@torch.no_grad()
def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits at the real tokens (PEFT's prompt tuning puts the virtual ones in front)."""
    out = model(**batch)
    y = out if isinstance(out, Tensor) else out.logits
    return (
        y[:, -batch["input_ids"].shape[1] :]
        if y.dim() == 3 and "decoder_input_ids" not in batch and "input_ids" in batch
        else y
    )


@torch.no_grad()
def perturb(parameters: Any) -> None:
    """Move trained tensors away from their start, so that nothing can pass by doing nothing."""
    generator = torch.Generator().manual_seed(5)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@pytest.fixture(scope="session")
def tiny() -> SimpleNamespace:
    """The functions above: make, example, output, perturb."""
    return SimpleNamespace(make=make, example=example, output=output, perturb=perturb)
