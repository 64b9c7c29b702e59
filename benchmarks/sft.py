"""Supervised tuning, Ingraft against Hugging Face PEFT with `transformers.Trainer`: same base, rows, dtype, rank, rate and number of steps.

Each side runs in fresh processes, interleaved, so that a busy minute of the machine hits both; the table shows medians and the ratio. PEFT is
set up as its documentation does: `DataCollatorForSeq2Seq` padding to the longest row of a batch, `Trainer`'s own defaults. The rows are the
demo's reviews (`make demo` fetches them). Both sides are scored by the same code on the same held-out rows.

    python benchmarks/sft.py [--steps 30] [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sides

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "learning_rate": 5e-4, "batch": 8, "max_length": 160, "seed": 42}
SIDES = ("ingraft", "peft")


def main() -> int:
    asked = sides.options("Supervised tuning: Ingraft against PEFT + Trainer.", SIDES)
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    lines = ["| measure | " + " | ".join(medians) + (" | ratio |" if len(medians) == 2 else " |")]
    lines.append("|---" * (lines[0].count("|") - 1) + "|")
    for key in next(iter(medians.values())):
        found = [one[key] for one in medians.values()]
        ratio = f" {found[0] / found[1]:.2f} |" if len(found) == 2 else ""
        lines.append(f"| {key} | " + " | ".join(f"{value:.4g}" for value in found) + " |" + ratio)
    sides.write("sft", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, rows: Path, steps: int) -> dict[str, float]:
    """One run in this process: seconds of training, tokens a second, peak memory above the loaded base, loss on held-out rows."""
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import score_loss
    from ingraft.train.machine import peak_memory

    if side == "ingraft":
        return _ingraft(rows, steps)
    base = load_base("smollm2", "bfloat16")
    data = load(
        str(rows / "train.jsonl"), base.tokenizer, eval=str(rows / "heldout.jsonl"), max_length=SETTINGS["max_length"]
    )
    before = peak_memory()
    model, seconds, tokens = _peft(base.model, base.tokenizer, data.train, steps)
    peak = peak_memory() - before
    loss = score_loss(model, data.eval[:200], pad_id(base.tokenizer), 16).loss
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory": peak, "loss": loss}


def _ingraft(rows: Path, steps: int) -> dict[str, float]:
    """The public way: a recipe. The log gives the seconds of the steps; loading and scoring are left out, as on the other side."""
    from ingraft.bases import load_base
    from ingraft.data import load, pad_id
    from ingraft.evaluate.loss import score_loss
    from ingraft.train.machine import peak_memory
    from ingraft.train.run import train

    load_base("smollm2", "bfloat16")
    before = peak_memory()
    with tempfile.TemporaryDirectory() as folder:
        recipe: dict[str, Any] = {
            "model": "smollm2",
            "task": "sft",
            "dtype": "bfloat16",
            "data": {"train": str(rows / "train.jsonl"), "eval": 0, "max_length": SETTINGS["max_length"]},
            "method": "lora",
            "method_config": {"r": SETTINGS["r"], "lora_alpha": SETTINGS["lora_alpha"]},
            "learning_rate": SETTINGS["learning_rate"],
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "max_steps": steps,
            "per_device_train_batch_size": SETTINGS["batch"],
            "logging_steps": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "seed": SETTINGS["seed"],
            "output_dir": f"{folder}/run",
        }
        run = train(recipe, quiet=True)
        peak = peak_memory() - before
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        stepped = [line for line in lines if "step_seconds" in line]
        seconds = sum(line["step_seconds"] for line in stepped)
        tokens = sum(line["step_seconds"] * line["tokens_per_second"] for line in stepped)
    data = load(
        str(rows / "train.jsonl"), run.tokenizer, eval=str(rows / "heldout.jsonl"), max_length=SETTINGS["max_length"]
    )
    loss = score_loss(run.model, data.eval[:200], pad_id(run.tokenizer), 16).loss
    return {"seconds": seconds, "tokens_per_second": tokens / seconds, "peak_memory": peak, "loss": loss}


def _peft(
    model: Any, tokenizer: Any, examples: list[Any], steps: int, *, in_order: bool = False
) -> tuple[Any, float, int]:
    """PEFT's LoRA on every linear layer, trained by transformers' Trainer.

    Args:
        in_order: take the examples as they come; otherwise Trainer shuffles them.
    """
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

    from peft import LoraConfig, get_peft_model

    set_seed(SETTINGS["seed"])  # what PEFT draws comes before Trainer sets it
    config = LoraConfig(
        r=SETTINGS["r"], lora_alpha=SETTINGS["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(model, config)
    rows = [{"input_ids": e.input_ids, "labels": e.labels, "attention_mask": [1] * len(e.input_ids)} for e in examples]
    counted = {"tokens": 0}
    collate = DataCollatorForSeq2Seq(tokenizer)

    def collator(batch: list[Any]) -> Any:
        counted["tokens"] += sum(len(row["input_ids"]) for row in batch)
        return collate(batch)

    class Clock(TrainerCallback):
        began = 0.0
        seconds = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.seconds = time.perf_counter() - self.began

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=SETTINGS["batch"],
            max_steps=steps,
            learning_rate=SETTINGS["learning_rate"],
            seed=SETTINGS["seed"],
            save_strategy="no",
            report_to="none",
            logging_steps=steps,
            use_cpu=True,
            dataloader_pin_memory=False,
            disable_tqdm=True,
            train_sampling_strategy="sequential" if in_order else "random",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])  # pyright: ignore[reportArgumentType] - a list of dicts is a data set to it
        trainer.train()
    return model, clock.seconds, counted["tokens"]


if __name__ == "__main__":
    sys.exit(main())
