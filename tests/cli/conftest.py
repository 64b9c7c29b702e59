"""Running `ingraft` in a process of its own, where exit codes, signals and imports are what a user gets; and, for the verbs, in this one, on models small enough to
train in a second."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingraft.cli.main import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]

WORDS = [
    "<unk>",
    "<s>",
    "</s>",
    "<pad>",
    "user",
    "assistant",
    "system",
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

Call = Callable[..., dict[str, Any]]


def tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=64
    )
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`llama/`, `bert/`, `rows.jsonl` (text and label, the label a word of the text), `new.jsonl` (no labels), and two trained runs."""
    home = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    size = {"vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    size |= {"num_attention_heads": 4, "max_position_embeddings": 64, "pad_token_id": 3}
    LlamaForCausalLM(LlamaConfig(**size, eos_token_id=2, bos_token_id=1)).save_pretrained(home / "llama")
    BertForMaskedLM(BertConfig(**size)).save_pretrained(home / "bert")
    for name in ("llama", "bert"):
        tokenizer(home / name)
    rng = random.Random(0)
    texts = [[*rng.choices(WORDS[9:], k=rng.randint(2, 12)), rng.choice(["good", "bad"]), "film"] for _ in range(60)]
    rows = [{"text": " ".join(words), "label": words[-2]} for words in texts]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "new.jsonl").write_text(
        "".join(json.dumps({"id": i, "text": row["text"]}) + "\n" for i, row in enumerate(rows[:9]))
    )
    common = [
        "--data",
        str(home / "rows.jsonl"),
        "--max-steps",
        "30",
        "--learning-rate",
        "1e-2",
        "--dtype",
        "float32",
        "--eval-steps",
        "0",
    ]
    for name, base, task in (("talk", "llama", "sft"), ("sort", "bert", "classify")):
        words = ["--model", str(home / base), "--task", task, "--data.eval", "12", "--output-dir", str(home / name)]
        assert main(["train", *common, *words, "--json"]) == 0
    return home


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Run a verb with --json and return its document."""

    def run(*words: object, code: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == code
        return json.loads(capsys.readouterr().out) if code == 0 else {}

    return run


@pytest.fixture
def ingraft(tmp_path: Path) -> Run:
    """`ingraft("train", "--help")`, in an empty folder, without a terminal."""

    def run(*words: str, stdin: str = "", cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ingraft.cli.main", *words],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
            timeout=300,
        )

    return run
