"""Write `preferences.json`: what TRL's trainers make of a batch of preferences on tiny models, weights given by a formula.

TRL brings requirements of its own, so this script runs in an environment of its own (`pip install torch trl`) and the numbers it prints are kept
here. The base is a Llama whose weights are a function of name and position; the policy is that base with a low-rank change on some of
its layers, the reference is the base. The test rebuilds the policy as an adapter. Recorded are losses, log-probabilities, and the
gradients of one layer's factors (by the chain rule from the gradient of its dense weight).

    python make_preferences.py > preferences.json
"""

from __future__ import annotations

import json
import sys
import tempfile
import zlib
from typing import Any

import torch

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 3,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROWS = [
    {"prompt_ids": [5, 9, 12], "chosen_ids": [7, 3, 22, 2], "rejected_ids": [8, 2]},
    {"prompt_ids": [6, 30, 11, 4, 17], "chosen_ids": [39, 2], "rejected_ids": [21, 14, 33, 10, 2]},
    {"prompt_ids": [18], "chosen_ids": [20, 25, 2], "rejected_ids": [20, 26, 2]},
]
GOOD = [True, False, True]
"""Of the chosen answers, where they are judged alone; what is seen beside each is another row's answer, chosen or rejected."""
LAYERS = ("q_proj", "down_proj")
R, ALPHA = 2, 6
WATCHED = "model.layers.0.self_attn.q_proj"


def values(name: str, shape: tuple[int, ...], spread: float) -> torch.Tensor:
    """Numbers that depend on the name, the position and nothing else."""
    count = 1
    for size in shape:
        count *= size
    start = zlib.crc32(name.encode()) % 1000
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391 + start) * spread).float().reshape(shape)


def fill(model: torch.nn.Module) -> None:
    """Give every parameter its numbers; norms stay near the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(values(name, tuple(parameter.shape), 0.2) + (1.0 if norm else 0.0))


def factors(path: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A (r, in) and B (out, r) of a layer."""
    return values(f"{path}.A", (R, shape[1]), 0.3), values(f"{path}.B", (shape[0], R), 0.3)


def shift(model: torch.nn.Module) -> None:
    """Make the base the policy."""
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in LAYERS:
                a, b = factors(path, tuple(module.weight.shape))
                module.weight += ALPHA / R * b @ a


def tokenizer() -> Any:
    """Words that are numbers; the trainers want one, the batches here do not need it."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({str(i): i for i in range(40)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="2", bos_token="1", pad_token="3", unk_token="0")


def gradients(model: torch.nn.Module) -> dict[str, Any]:
    """Of the watched layer's factors."""
    weight = model.get_submodule(WATCHED).weight
    a, b = factors(WATCHED, tuple(weight.shape))
    return {"A": (ALPHA / R * b.T @ weight.grad).tolist(), "B": (ALPHA / R * weight.grad @ a.T).tolist()}


def measure(trainer: Any, model: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """One loss, and what it asks of the watched layer."""
    model.zero_grad()
    model.train()
    loss = trainer.compute_loss(model, dict(batch))
    loss.backward()
    return {"loss": loss.item(), **gradients(model)}


def main() -> None:
    import datasets
    import transformers
    import trl
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
    from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference
    from trl.trainer.reward_trainer import DataCollatorForPreference as RewardCollator

    common: dict[str, Any] = {"report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    common["output_dir"] = tempfile.mkdtemp()
    words = datasets.Dataset.from_list([{"prompt": "5 9", "chosen": "7 2", "rejected": "8 2"}] * 3)
    found: dict[str, Any] = {"versions": {"trl": trl.__version__, "transformers": transformers.__version__}}

    def models() -> tuple[Any, Any]:
        policy, reference = LlamaForCausalLM(LlamaConfig(**LLAMA)), LlamaForCausalLM(LlamaConfig(**LLAMA))
        for model in (policy, reference):
            fill(model)
        shift(policy)
        return policy, reference

    batch = DataCollatorForPreference(pad_token_id=3)(ROWS)
    for kind in ("sigmoid", "ipo"):
        for beta in (0.1, 0.5):
            policy, reference = models()
            args = DPOConfig(loss_type=[kind], beta=beta, **common)
            trainer = DPOTrainer(policy, reference, args, train_dataset=words, processing_class=tokenizer())
            found[f"{kind} {beta}"] = measure(trainer, trainer.model, batch)
            if kind == "sigmoid" and beta == 0.1:
                metrics = trainer._metrics["train"]
                keys = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
                found["metrics 0.1"] = {key: metrics[key][0] for key in keys}
                found["logps"] = {key: metrics[f"logps/{key}"][0] for key in ("chosen", "rejected")}

    batches = {
        beside: DataCollatorForUnpairedPreference(pad_token_id=3)(
            [
                {
                    "prompt_ids": row["prompt_ids"],
                    "completion_ids": row["chosen_ids"],
                    "KL_completion_ids": ROWS[(number + 1) % len(ROWS)][beside],
                    "label": GOOD[number],
                }
                for number, row in enumerate(ROWS)
            ]
        )
        for beside in ("chosen_ids", "rejected_ids")
    }
    alone = datasets.Dataset.from_list(
        [{"prompt": "5 9", "completion": f"{i} 2", "label": i < 8} for i in (6, 7, 8, 9)]
    )
    for beta, good, bad, beside in ((0.1, 1.0, 1.0, "chosen_ids"), (0.5, 1.5, 0.7, "rejected_ids")):
        policy, reference = models()
        args = KTOConfig(
            beta=beta, desirable_weight=good, undesirable_weight=bad, per_device_train_batch_size=4, **common
        )
        trainer = KTOTrainer(policy, reference, args, train_dataset=alone, processing_class=tokenizer())
        found[f"kto {beta}"] = {
            **measure(trainer, trainer.model, batches[beside]),
            "kl": trainer._metrics["train"]["kl"][0],
        }

    model = LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))
    fill(model)
    shift(model)
    args = RewardConfig(disable_dropout=True, **common)
    trainer = RewardTrainer(model, args, train_dataset=words, processing_class=tokenizer())
    rows = [{key: row["prompt_ids"] + row[key] for key in ("chosen_ids", "rejected_ids")} for row in ROWS]
    found["reward"] = measure(trainer, trainer.model, RewardCollator(pad_token_id=3)(rows))
    found["reward"] |= {key: trainer._metrics["train"][key][0] for key in ("accuracy", "margin")}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
