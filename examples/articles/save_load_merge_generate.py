"""The life of an adapter: train, save, load, switch, merge, generate. Written as for Hugging Face PEFT."""

from __future__ import annotations

import tempfile
from typing import Any

import tiny
import torch
from transformers import AutoModelForCausalLM, GenerationConfig, pipeline

from ingraft.peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, TaskType, get_peft_model


def train(model: torch.nn.Module, text: str) -> None:
    """Teach an adapter one sentence."""
    batch = tiny.tokenizer()(text, return_tensors="pt", add_special_tokens=False)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=2e-2)
    for _ in range(40):
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> dict[str, str]:
    """What each stage answers to "the"."""
    tokenizer = tiny.tokenizer()
    prompt = tokenizer("the", return_tensors="pt", add_special_tokens=False)
    settings = GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    answers: dict[str, str] = {}

    def answer(model: torch.nn.Module) -> str:
        model.eval()
        ids = model.generate(**prompt, generation_config=settings)  # pyright: ignore[reportCallIssue]
        return str(tokenizer.decode(ids[0]))

    with tempfile.TemporaryDirectory() as folder:
        tiny.gpt2().save_pretrained(f"{folder}/base")
        base = AutoModelForCausalLM.from_pretrained(f"{folder}/base")
        answers["base"] = answer(base)

        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=8,
            lora_alpha=16,
            target_modules=["c_attn", "c_proj", "c_fc"],
            fan_in_fan_out=True,
        )
        model = get_peft_model(base, config)
        train(model, "the film is very good")
        answers["film"] = answer(model)
        model.add_adapter("book", config)
        model.set_adapter("book")
        train(model, "the book is so dull")
        answers["book"] = answer(model)
        with model.disable_adapter():
            answers["disabled"] = answer(model)
        model.set_adapter("default")
        answers["film again"] = answer(model)
        model.save_pretrained(f"{folder}/adapters")

        assert PeftConfig.from_pretrained(f"{folder}/adapters").base_model_name_or_path == f"{folder}/base"
        loaded = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapters")
        answers["film loaded"] = answer(loaded)
        loaded.load_adapter(f"{folder}/adapters/book", adapter_name="book")
        loaded.set_adapter("book")
        answers["book loaded"] = answer(loaded)
        loaded.delete_adapter("book")
        merged = loaded.merge_and_unload(progressbar=True, safe_merge=True)
        answers["film merged"] = answer(merged)
        merged.save_pretrained(f"{folder}/merged")

        plain = AutoModelForCausalLM.from_pretrained(f"{folder}/merged")
        answers["film merged, plain transformers"] = answer(plain)
        attached = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(f"{folder}/base"), f"{folder}/adapters"
        )
        pipe = pipeline("text-generation", model=attached, tokenizer=tokenizer)
        made: Any = pipe("the", generation_config=settings, add_special_tokens=False, return_full_text=False)
        answers["film in a pipeline"] = "the " + made[0]["generated_text"].strip()
    return answers


if __name__ == "__main__":
    for stage, text in main().items():
        print(f"{stage:<34} {text}")
