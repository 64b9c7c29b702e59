"""A tiny chat model and a tiny encoder with real folders, so that runs go through every file they would in earnest."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "user",
    "assistant",
    "good",
    "bad",
    "very",
    "a",
    "film",
    "was",
    "the",
    "plot",
    "it",
    "i",
]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"

Make = Callable[..., dict[str, Any]]


def _tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(path)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/`, `bert/`, `t5/` and `rows.jsonl`: text and label, where the label is a word of the text."""
    home = tmp_path_factory.mktemp("train")
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 3}
    LlamaForCausalLM(LlamaConfig(**size, eos_token_id=2, bos_token_id=1)).save_pretrained(home / "llama")
    BertForMaskedLM(BertConfig(**size)).save_pretrained(home / "bert")
    pair = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu"}
    pair |= {"vocab_size": len(WORDS), "pad_token_id": 3, "eos_token_id": 2, "decoder_start_token_id": 3}
    T5ForConditionalGeneration(T5Config(**pair)).save_pretrained(home / "t5")
    for name in ("llama", "bert", "t5"):
        _tokenizer(home / name)
    rng = random.Random(0)
    with (home / "rows.jsonl").open("w") as file:
        for _ in range(60):
            label = rng.choice(["good", "bad"])
            words = [rng.choice(WORDS[9:]) for _ in range(rng.randint(2, 12))]
            file.write(json.dumps({"text": " ".join([*words, label, "film"]), "label": label}) + "\n")
    return home


@pytest.fixture
def recipe(home: Path, tmp_path: Path) -> Make:
    """A recipe of 12 steps that evaluates and saves every 4; `changes` by dotted key."""

    def make(**changes: Any) -> dict[str, Any]:
        values: dict[str, Any] = {
            "model": str(home / "llama"),
            "data": {"train": str(home / "rows.jsonl"), "eval": 12},
            "max_steps": 12,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "eval_steps": 4,
            "save_steps": 4,
            "logging_steps": 2,
            "dtype": "float32",
            "output_dir": str(tmp_path / "run"),
            "method_config": {"lora_dropout": 0.1},
        }
        for key, value in changes.items():
            if key.startswith("data_"):
                values["data"][key.removeprefix("data_")] = value
            else:
                values[key] = value
        return values

    return make


@pytest.fixture(scope="session")
def bases(home: Path) -> Path:
    """`llama4`, `gpt2` and `bert4`: four blocks each, with the words of `home`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(1)
    size: dict[str, Any] = {"vocab_size": 16, "pad_token_id": 3, "eos_token_id": 2, "bos_token_id": 1}
    wide = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    made: dict[str, Any] = {
        "llama4": LlamaForCausalLM(LlamaConfig(**size, **wide, max_position_embeddings=64)),
        "gpt2": GPT2LMHeadModel(GPT2Config(**size, n_embd=32, n_layer=4, n_head=4, n_positions=64)),
        "bert4": BertForMaskedLM(BertConfig(**size, **wide, max_position_embeddings=64)),
    }
    for name, model in made.items():
        model.save_pretrained(home / name)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(home / "llama" / file, home / name / file)
    return home


@pytest.fixture
def top(recipe: Make, bases: Path) -> Make:
    """A recipe of three epochs of 8 steps over 30 rows, in effect plain descent, so that a rounding error stays one."""

    def make(base: str, **changes: Any) -> dict[str, Any]:
        values = {
            "model": str(bases / base),
            "task": "classify" if base == "bert4" else "sft",
            "max_steps": 24,
            "logging_steps": 1,
            "eval_steps": 8,
            "save_steps": 8,
            "data_eval": 30,
            "learning_rate": 0.2,
            "adam_epsilon": 1.0,
            "cache_frozen": True,
            "method_config": {"lora_dropout": 0.1, "layers_to_transform": [2, 3]},
        }
        return recipe(**{**values, **changes})

    return make
