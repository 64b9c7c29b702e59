"""LoRA and full fine-tuning of a BERT classifier with `transformers.Trainer`.

Written as for Hugging Face PEFT; only the import differs. The classification head, which starts at random, is trained in full beside LoRA
because the task type says so.
"""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
import tiny
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments

from ingraft.peft import AutoPeftModelForSequenceClassification, LoraConfig, TaskType, get_peft_model


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of right classes."""
    return {"accuracy": float((np.asarray(prediction.predictions).argmax(-1) == prediction.label_ids).mean())}


def train(model: Any, folder: str, learning_rate: float) -> tuple[float, Trainer]:
    """Train on most of the sentences; the accuracy on the rest, and the trainer."""
    tokenizer = tiny.tokenizer()
    rows = [{**tokenizer(text), "labels": label} for text, label in tiny.reviews()]
    arguments = TrainingArguments(
        output_dir=folder,
        learning_rate=learning_rate,
        per_device_train_batch_size=16,
        num_train_epochs=8,
        weight_decay=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows[:72],  # pyright: ignore[reportArgumentType] - a list is a data set
        eval_dataset=rows[72:],  # pyright: ignore[reportArgumentType]
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"], trainer


def main() -> dict[str, float]:
    """Accuracies on held-out sentences: LoRA, LoRA loaded again, full fine-tuning."""
    results: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        tiny.bert().save_pretrained(f"{folder}/base")

        peft_config = LoraConfig(task_type=TaskType.SEQ_CLS, inference_mode=False, r=8, lora_alpha=16, lora_dropout=0.1)
        model = type(tiny.bert()).from_pretrained(f"{folder}/base")
        model = get_peft_model(model, peft_config)
        model.print_trainable_parameters()
        results["lora"], trainer = train(model, f"{folder}/lora", learning_rate=1e-2)
        model.save_pretrained(f"{folder}/adapter")

        again = AutoPeftModelForSequenceClassification.from_pretrained(f"{folder}/adapter", num_labels=2)
        trainer.model = trainer.model_wrapped = again
        results["lora, loaded again"] = trainer.evaluate()["eval_accuracy"]

        results["full"], _ = train(tiny.bert(), f"{folder}/full", learning_rate=3e-3)
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name:<20} {value:.3f}")
