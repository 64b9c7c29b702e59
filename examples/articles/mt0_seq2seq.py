"""LoRA on an mT5 (mt0's kind of model) with `Seq2SeqTrainer`. Written as for Hugging Face PEFT."""

from __future__ import annotations

import tempfile

import numpy as np
import tiny
from transformers import DataCollatorForSeq2Seq, EvalPrediction, Seq2SeqTrainer, Seq2SeqTrainingArguments

from ingraft.peft import LoraConfig, PeftModel, TaskType, get_peft_model


def right(prediction: EvalPrediction) -> dict[str, float]:
    """Share of answers whose first word is right."""
    made, wanted = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    return {"right": float((made[:, 1] == wanted[:, 0]).mean())}


def main() -> dict[str, float]:
    """Share of right answers before training, after it, and after loading and merging."""
    tokenizer = tiny.tokenizer()
    rows = [
        {
            "input_ids": tokenizer(text)["input_ids"],
            "labels": tokenizer("positive" if label else "negative", add_special_tokens=False)["input_ids"] + [3],
        }
        for text, label in tiny.reviews()
    ]
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        inference_mode=False,
        r=8,
        lora_alpha=32,
        lora_dropout=0.1,
        target_modules=["q", "k", "v", "o", "wi_0", "wi_1", "wo"],
    )
    model = get_peft_model(tiny.mt5(), peft_config)
    model.print_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            output_dir=folder,
            learning_rate=1e-2,
            per_device_train_batch_size=16,
            num_train_epochs=20,
            save_strategy="no",
            predict_with_generate=True,
            generation_max_length=3,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = Seq2SeqTrainer(
            model=model,
            args=arguments,
            train_dataset=rows,  # pyright: ignore[reportArgumentType] - a list is a data set
            eval_dataset=rows,  # pyright: ignore[reportArgumentType]
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
            compute_metrics=right,
        )
        before = trainer.evaluate()["eval_right"]
        trainer.train()
        after = trainer.evaluate()["eval_right"]
        model.save_pretrained(f"{folder}/adapter")
        merged = PeftModel.from_pretrained(tiny.mt5(), f"{folder}/adapter").merge_and_unload()
        trainer.model = trainer.model_wrapped = merged
        loaded = trainer.evaluate()["eval_right"]
    return {"before": before, "after": after, "loaded and merged": loaded}


if __name__ == "__main__":
    print(main())
