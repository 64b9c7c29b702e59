"""What packing brings: learned tokens a second of processor time, with it and without, over batches by length (the default) and drawn at random.

    python benchmarks/packing.py ROWS.jsonl [--batches 3] [--size 8] [--dtype float32]

One process and one thread; each batch is run both ways in turn, loss and gradients compared, and processor time counted, so that other work on
the machine matters little. Reading, attaching and the optimiser are left out.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch

import ingraft.adapt as adapt
from ingraft.bases import load_base, load_tokenizer
from ingraft.data import batches, load, pad_id
from ingraft.methods.lora import LoraConfig
from ingraft.train.machine import keep_freed_memory
from ingraft.train.objectives import objective_for


def main() -> None:
    """Measure and print a line of JSON for each kind of batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows")
    parser.add_argument("--batches", type=int, default=3)
    parser.add_argument("--size", type=int, default=8)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-length", type=int, default=512)
    asked = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(asked.model)
    examples = load(asked.rows, tokenizer, task="sft", max_length=asked.max_length, seed=0).train
    model: Any = load_base(asked.model, asked.dtype, task="sft").model
    adapt.attach(model, LoraConfig(r=8), seed=0)
    objective = objective_for("sft", model, pad_id(tokenizer))
    objective.begin()
    parameters = list(adapt.parameters(model, "default").values())

    def step(rows: list[Any]) -> tuple[float, float, torch.Tensor]:
        batch = objective.batch(rows)
        began = time.process_time()
        loss = objective.loss(batch)
        loss.backward()
        seconds = time.process_time() - began
        gradient = torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
        for p in parameters:
            p.grad = None
        return seconds, float(loss.detach()), gradient

    step(examples[: asked.size])  # what is made once is made before
    for bucket in (True, False):
        chosen = batches(examples, asked.size, seed=0, epoch=0, bucket=bucket)[: asked.batches]
        seconds, apart = {False: 0.0, True: 0.0}, 0.0
        for number, positions in enumerate(chosen):
            rows = sorted((examples[i] for i in positions), key=lambda row: -len(row))
            found: dict[bool, Any] = {}
            for packed in (False, True) if number % 2 else (True, False):
                if packed:
                    with adapt.packing(model):
                        found[packed] = step(rows)
                else:
                    found[packed] = step(rows)
                seconds[packed] += found[packed][0]
            plain, packed_gradient = found[False][2], found[True][2]
            apart = max(apart, float((plain - packed_gradient).norm() / plain.norm()))
        real = sum(len(examples[i]) for batch in chosen for i in batch)
        padded = sum(max(len(examples[i]) for i in batch) * len(batch) for batch in chosen)
        learned = sum(examples[i].learned for batch in chosen for i in batch)
        line = {
            "batches": "by length" if bucket else "at random",
            "rows": sum(map(len, chosen)),
            "tokens": real,
            "padding": round(1 - real / padded, 3),
            "learned_per_second": round(learned / seconds[False], 1),
            "packed_learned_per_second": round(learned / seconds[True], 1),
            "times": round(seconds[False] / seconds[True], 3),
            "gradients_apart": apart,
        }
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
