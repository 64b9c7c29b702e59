"""The supervised measure of `sft.py` on a GPU: a Llama of the 1B shape with random weights, against PEFT + Trainer where `peft` can be imported.

Needs the source tree (`PYTHONPATH=src`), what Ingraft itself depends on, and torch, transformers and accelerate; nothing is downloaded. Base, tokenizer and
rows are made up: random weights, 2,000 words, rows of 30 to 400 words of which the answer is a half. Losses therefore say only that both sides learn
alike (the answers repeat a few words). Every side runs in fresh processes, in turn; the first steps, in which kernels are chosen, are not counted.

    PYTHONPATH=src python benchmarks/cuda.py [--steps 30] [--repeats 3] [--tiny] [--output benchmarks/results]

`--tiny` runs a Llama of two narrow layers, on any machine: a trial of this script, whose figures mean nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import ours
import reference
import sides

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "learning_rate": 5e-4, "batch": 8, "max_length": 512, "seed": 42}
SHAPE: dict[str, int] = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
NARROW = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SIDES = ("ingraft", "peft")
WORDS = 2000
WARM = 5
"""Steps that are not counted."""

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
FLAG = "INGRAFT_BENCH_TINY"


def main() -> int:
    if "--tiny" in sys.argv:
        sys.argv.remove("--tiny")
        os.environ[FLAG] = "1"  # the sides' processes are told in this way
    asked = sides.options("Supervised tuning of a 1B Llama on a GPU: Ingraft against PEFT + Trainer.", SIDES)
    if importlib.util.find_spec("peft") is None and "peft" in asked.sides:
        print("peft cannot be imported here: our side alone")
        asked.sides.remove("peft")
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    lines = [
        "| side | learned tokens/s | real tokens/s | share of the matrix rate | peak above the base, GB | loss before | after |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {side} | {one['learned_per_second']:.0f} | {one['tokens_per_second']:.0f} | {one['share_of_rate']:.0%} | "
        f"{one['peak_memory'] / 1e9:.2f} | {one['loss_before']:.4f} | {one['loss']:.4f} |"
        for side, one in medians.items()
    ]
    if len(medians) == len(SIDES):
        own, theirs = (medians[side] for side in SIDES)
        each = [
            f"{mine['tokens_per_second'] / other['tokens_per_second']:.2f}"
            for mine, other in zip(*(runs[side] for side in SIDES), strict=True)
        ]
        speed = own["tokens_per_second"] / theirs["tokens_per_second"]
        memory = own["peak_memory"] / theirs["peak_memory"]
        lines += [
            "",
            f"Against PEFT + Trainer: {speed:.2f}x the tokens/s ({', '.join(each)}), {memory:.2f}x the memory.",
        ]
    sides.write("cuda-tiny" if os.environ.get(FLAG) else "cuda", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, folder: Path, steps: int) -> dict[str, float]:
    """One run in this process. The base is made where it is not yet, and stays for the next process."""
    import torch

    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import score_loss

    del folder
    home = Path(tempfile.gettempdir()) / f"ingraft-bench-{'tiny' if os.environ.get(FLAG) else '1b'}"
    base_folder = _base(home / "base", NARROW if os.environ.get(FLAG) else SHAPE)
    train, dev = _rows(home, "train", (steps + WARM) * SETTINGS["batch"]), _rows(home, "dev", 40)
    settings = SETTINGS | ({"max_length": 64, "batch": 2} if os.environ.get(FLAG) else {})
    base = load_base(str(base_folder), "bfloat16")
    data = load(str(train), base.tokenizer, eval=str(dev), max_length=settings["max_length"])
    parameters = sum(p.numel() for p in base.model.parameters())
    multiplied = sum(m.weight.numel() for m in base.model.modules() if isinstance(m, torch.nn.Linear))
    loss_before = score_loss(base.model, data.eval, pad_id(base.tokenizer), 8).loss
    held = _held()
    if side == "ingraft":
        tokenizer = base.tokenizer
        del base
        if torch.cuda.is_available():  # it loads its own
            held = 2.0 * parameters
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        run, done = ours.tune(train, settings, steps + WARM, model=str(base_folder), skip=WARM, dtype="bfloat16")
        model = run.model
    else:
        tokenizer = base.tokenizer
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        model, done = reference.tune(base.model, tokenizer, data.train, settings, steps + WARM, skip=WARM)
    peak = _peak() - held
    per_second = done["tokens"] / done["seconds"]
    return {
        "learned_per_second": done["learned"] / done["seconds"],
        "tokens_per_second": per_second,
        "share_of_rate": 4.0 * multiplied * per_second / _matrix_rate(),  # forward, and the inputs' gradients
        "seconds": done["seconds"],
        "peak_memory": peak,
        "loss_before": loss_before,
        "loss": score_loss(model, data.eval, pad_id(tokenizer), 8).loss,
    }


def _held() -> float:
    """Bytes in use now: the GPU's where there is one."""
    import torch

    from ingraft.train.machine import peak_memory

    return torch.cuda.memory_allocated() if torch.cuda.is_available() else peak_memory()


def _peak() -> float:
    import torch

    from ingraft.train.machine import peak_memory

    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak_memory()


def _matrix_rate() -> float:
    """Operations a second in a large bfloat16 product on this machine."""
    import torch

    there = torch.cuda.is_available()
    n, device = (8192, "cuda") if there else (512, "cpu")
    a = torch.randn(n, n, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(8):
        began = time.perf_counter()
        torch.mm(a, a)
        if there:
            torch.cuda.synchronize()
        best = max(best, 2.0 * n**3 / (time.perf_counter() - began))
    return best


def _base(folder: Path, shape: dict[str, int]) -> Path:
    """A Llama of random weights with a tokenizer of 2,000 words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if (folder / "tokenizer_config.json").exists():  # written last
        return folder
    torch.manual_seed(0)
    config = LlamaConfig(**shape, bos_token_id=1, eos_token_id=2, pad_token_id=3)  # pyright: ignore[reportArgumentType]
    config.dtype = torch.bfloat16
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    names = ["<unk>", "<s>", "</s>", "<pad>", "user", "assistant", "system", *(f"w{i}" for i in range(WORDS))]
    inner = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def _rows(folder: Path, name: str, count: int) -> Path:
    """Rows of made-up words, the same ones every time."""
    draw = random.Random(f"{name} {count}")
    lines: list[str] = []
    for _ in range(count):
        words = draw.randint(15, 200)
        prompt = " ".join(f"w{draw.randrange(WORDS)}" for _ in range(words))
        answer = " ".join(f"w{draw.randrange(20)}" for _ in range(words))
        lines.append(json.dumps({"prompt": prompt, "completion": answer}))
    file = folder / f"{name}-{count}.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


if __name__ == "__main__":
    sys.exit(main())
