"""Rows are cut so that a method's virtual tokens have a place beside them, in training as in scoring."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ingraft.train.run import train


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
def test_rows_that_fill_the_places_are_trained(method: str, home: Path, tmp_path: Path) -> None:
    """A tokenizer that declares no limit, over learned positions."""
    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(home / "llama")
    tokenizer.model_max_length = 10**30
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=4, n_positions=48, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    words = [word for word in tokenizer.get_vocab() if word.isalpha()]
    rng = random.Random(0)
    rows = [
        {"prompt": " ".join(rng.choices(words, k=3)), "completion": " ".join(rng.choices(words, k=40))}
        for _ in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "model": str(tmp_path / "base"),
        "data": {"train": str(tmp_path / "rows.jsonl"), "eval": 2},
        "method": method,
        "max_steps": 1,
        "output_dir": str(tmp_path / "run"),
    }
    run = train(recipe, quiet=True)
    assert run.metrics["after"]["loss"] > 0
