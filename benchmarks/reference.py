"""The other side: Hugging Face PEFT's LoRA on every linear layer, trained by `transformers.Trainer` as their documentation sets them up."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def tune(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Any],
    settings: Mapping[str, Any],
    steps: int,
    *,
    start: Path | None = None,
    grouped: bool = False,
    skip: int = 0,
) -> tuple[Any, dict[str, float]]:
    """Train, padding to the longest row of a batch (`DataCollatorForSeq2Seq`), with `Trainer`'s own defaults.

    Args:
        settings: r, lora_alpha, learning_rate, batch, seed.
        start: a saved adapter to start from, and then take the examples as they come; otherwise PEFT draws one and Trainer shuffles.
        grouped: let Trainer put rows of similar length together.
        skip: how many of the first steps are left out of the figures.

    Returns:
        The tuned model; seconds of the steps, real and learned tokens in them.
    """
    import torch
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments, set_seed

    from peft import LoraConfig, PeftModel, get_peft_model

    set_seed(settings["seed"])  # what PEFT draws comes before Trainer sets it
    config = LoraConfig(
        r=settings["r"], lora_alpha=settings["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = (
        get_peft_model(model, config) if start is None else PeftModel.from_pretrained(model, start, is_trainable=True)
    )
    rows = [{"input_ids": e.input_ids, "labels": e.labels, "attention_mask": [1] * len(e.input_ids)} for e in examples]
    counted = {"tokens": 0.0, "learned": 0.0}
    batches = 0
    collate = DataCollatorForSeq2Seq(tokenizer)

    def collator(batch: list[Any]) -> Any:
        nonlocal batches
        batches += 1
        if batches <= skip:
            return collate(batch)
        counted["tokens"] += sum(len(row["input_ids"]) for row in batch)
        counted["learned"] += sum(label != -100 for row in batch for label in row["labels"])
        return collate(batch)

    class Clock(TrainerCallback):
        began = 0.0
        seconds = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if state.global_step == skip:
                self.began = time.perf_counter()
            self.seconds = time.perf_counter() - self.began

    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=settings["batch"],
            max_steps=steps,
            learning_rate=settings["learning_rate"],
            seed=settings["seed"],
            save_strategy="no",
            report_to="none",
            logging_steps=steps,
            use_cpu=not torch.cuda.is_available(),
            dataloader_pin_memory=False,
            disable_tqdm=True,
            train_sampling_strategy="sequential" if start is not None else "group_by_length" if grouped else "random",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=[clock])  # pyright: ignore[reportArgumentType] - a list of dicts is a data set to it
        trainer.train()
    return model, {"seconds": clock.seconds, **counted}
