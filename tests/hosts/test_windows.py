"""Virtual tokens beside sliding windows: agreed with PEFT up to the window, and said in the log."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import transformers as t

from ingraft import adapt
from ingraft.methods.registry import make_config


def mistral(window: int | None) -> Any:
    config = t.MistralConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
    )
    return t.MistralForCausalLM(config)


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("window", [8, None])
def test_a_window_is_told_of(method: str, window: int | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "ingraft"):
        adapt.attach(mistral(window), make_config(method, {}))
    told = [record.getMessage() for record in caplog.records if "sliding window" in record.getMessage()]
    assert len(told) == (1 if window and method != "lora" else 0)
