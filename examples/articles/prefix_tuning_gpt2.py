"""Prefix tuning of a GPT-2, with and without the projection of the paper. Written as for Hugging Face PEFT."""

from __future__ import annotations

import tempfile

import tiny
import torch

from ingraft.peft import AutoPeftModelForCausalLM, PrefixTuningConfig, TaskType, get_peft_model


def main() -> dict[str, tuple[float, float, float]]:
    """Loss before, after, and after saving and loading, for both forms."""
    tokenizer = tiny.tokenizer()
    texts = [f"{text} answer : {'positive' if label else 'negative'}" for text, label in tiny.reviews()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    results: dict[str, tuple[float, float, float]] = {}
    for projection in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            base = tiny.gpt2()
            base.save_pretrained(f"{folder}/base")
            base = type(base).from_pretrained(f"{folder}/base")
            peft_config = PrefixTuningConfig(
                task_type=TaskType.CAUSAL_LM, num_virtual_tokens=10, prefix_projection=projection
            )
            model = get_peft_model(base, peft_config)
            model.print_trainable_parameters()
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=3e-2)
            losses: list[float] = []
            for _ in range(60):
                loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.item())
            model.eval()
            after = model(**batch).loss.item()
            model.save_pretrained(f"{folder}/adapter")
            again = AutoPeftModelForCausalLM.from_pretrained(f"{folder}/adapter")
            results["projected" if projection else "direct"] = (losses[0], after, again(**batch).loss.item())
    return results


if __name__ == "__main__":
    print(main())
