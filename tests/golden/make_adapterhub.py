"""Write `adapterhub.json`: logits of AdapterHub's bottleneck adapters on tiny models, weights given by a formula.

AdapterHub's `adapters` pins one minor version of transformers, so it cannot be installed beside ours; this script runs in an environment of
its own (`pip install torch adapters`) and the numbers it prints are kept here. Every weight of base and adapter is a function of its own name
and position, `value(name, i)`, so that the test can rebuild both without sharing a file of weights.

    python make_adapterhub.py > adapterhub.json
"""

from __future__ import annotations

import json
import sys
import zlib
from typing import Any

import torch

BERT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 24,
    "type_vocab_size": 2,
}
GPT2 = {
    "vocab_size": 40,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 24,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 24,
}
INPUT = [[5, 9, 12, 7, 3, 22], [8, 1, 30, 2, 17, 39]]
CONFIGS = {
    "houlsby": ("double_seq_bn", {"reduction_factor": 4}),
    "pfeiffer": ("seq_bn", {"reduction_factor": 4}),
    "parallel": ("par_bn", {"reduction_factor": 4}),
}


def values(name: str, shape: tuple[int, ...], spread: float) -> torch.Tensor:
    """Numbers that depend on the name, the position and nothing else."""
    count = 1
    for size in shape:
        count *= size
    start = zlib.crc32(name.encode()) % 1000
    return (torch.sin(torch.arange(count, dtype=torch.float64) * 0.7391 + start) * spread).float().reshape(shape)


def fill_base(model: torch.nn.Module) -> None:
    """Give every parameter of the base its numbers; norms stay near the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1 and name.endswith("weight")
            parameter.copy_(values(name, tuple(parameter.shape), 0.1) + (1.0 if norm else 0.0))


def main() -> None:
    """Print the golden numbers as JSON."""
    import transformers

    import adapters
    from adapters import AdapterConfig

    golden: dict[str, Any] = {
        "adapters": adapters.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "cases": [],
    }
    models = {
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False),
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    }
    for family, make in models.items():
        for method, (name, options) in CONFIGS.items():
            if method == "parallel" and family != "bert":
                continue  # there AdapterHub's bottleneck sees the residual ahead of the norm; ours sees what the MLP sees
            model = make().eval()
            fill_base(model)
            base = {key for key, _ in model.named_parameters()}
            adapters.init(model)
            model.add_adapter("a", config=AdapterConfig.load(name, **options))
            model.set_active_adapters("a")
            blocks: list[dict[str, str]] = []
            with torch.no_grad():
                for key, parameter in model.named_parameters():
                    if key in base or ".a." not in key:
                        continue
                    # block index, place and tensor decide the numbers, so that the other side can find them by structure
                    index = next(part for part in key.split(".") if part.isdigit())
                    place = "attention" if ".attention.output." in key or ".attention_adapters." in key else "output"
                    tensor = ("down" if "adapter_down" in key else "up") + ("_bias" if key.endswith("bias") else "")
                    label = f"{index}.{place}.{tensor}"
                    parameter.copy_(values(label, tuple(parameter.shape), 0.3))
                    blocks.append({"theirs": key, "label": label})
            model.set_active_adapters("a")
            model.eval()
            with torch.no_grad():
                output = model(torch.tensor(INPUT))[0]
                model.set_active_adapters(None)
                bare = model(torch.tensor(INPUT))[0]
            assert (output - bare).abs().max() > 1e-3, f"{family} {method}: the adapter did not act"
            golden["cases"].append(
                {
                    "family": family,
                    "method": method,
                    "options": options,
                    "tensors": blocks,
                    "output": output.flatten()[::7].tolist(),
                }
            )
    json.dump(golden, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
