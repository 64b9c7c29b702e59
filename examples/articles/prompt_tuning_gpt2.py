"""Prompt tuning of a GPT-2 that learns to answer with the class of a sentence. Written as for Hugging Face PEFT."""

from __future__ import annotations

import tempfile

import tiny
import torch
from torch.utils.data import DataLoader
from transformers import default_data_collator, get_linear_schedule_with_warmup

from ingraft.peft import PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_model

LENGTH = 12
EPOCHS = 15


def main() -> dict[str, float]:
    """Loss before and after, and the loss after saving and loading."""
    tokenizer = tiny.tokenizer()
    rows: list[dict[str, list[int]]] = []
    for text, label in tiny.reviews():
        question = tokenizer(text + " answer :", add_special_tokens=False)["input_ids"]
        answer = tokenizer("positive" if label else "negative", add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        ids = question + answer
        room = LENGTH - len(ids)
        rows.append(
            {
                "input_ids": [tokenizer.pad_token_id] * room + ids,
                "attention_mask": [0] * room + [1] * len(ids),
                "labels": [-100] * (room + len(question)) + answer,
            }
        )
    loader = DataLoader(rows, shuffle=True, collate_fn=default_data_collator, batch_size=16)  # pyright: ignore[reportArgumentType]

    peft_config = PromptTuningConfig(
        task_type=TaskType.CAUSAL_LM, prompt_tuning_init=PromptTuningInit.SAMPLE_VOCAB, num_virtual_tokens=8
    )
    model = get_peft_model(tiny.gpt2(), peft_config)
    model.print_trainable_parameters()

    def loss_of(model: torch.nn.Module) -> float:
        model.eval()
        with torch.no_grad():
            return sum(model(**batch).loss.item() for batch in loader) / len(loader)

    before = loss_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-1)
    steps = len(loader) * EPOCHS
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=0, num_training_steps=steps)
    for _ in range(EPOCHS):
        model.train()
        for batch in loader:
            loss = model(**batch).loss
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    after = loss_of(model)

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny.gpt2(), folder)
    inputs = tokenizer("the film is so good . answer :", add_special_tokens=False, return_tensors="pt")
    ids = again.generate(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=2)
    print(tokenizer.decode(ids[0]))
    return {"before": before, "after": after, "loaded": loss_of(again)}


if __name__ == "__main__":
    print(main())
