"""Write `adapterhub.json`: outputs of AdapterHub's adapters on tiny models, weights given by a formula.

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
TIED = {"r": 2, "dropout": 0.0, "prefix_positions": 2, "suffix_positions": 1, "tied_weights": True}
CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    ("houlsby", "double_seq_bn", {"reduction_factor": 4}),
    ("pfeiffer", "seq_bn", {"reduction_factor": 4}),
    ("parallel", "par_bn", {"reduction_factor": 4}),
    ("compacter", "compacter", {"reduction_factor": 4}),
    ("compacter", "compacter++", {"reduction_factor": 2, "phm_dim": 2, "phm_rank": 3}),
    ("reft", "loreft", TIED),
    ("reft", "noreft", TIED),
    ("reft", "direft", TIED),
    ("fusion", "dynamic", {"of": "seq_bn"}),
    ("fusion", "static", {"of": "seq_bn"}),
    ("fusion", "dynamic", {"of": "double_seq_bn"}),
]
"""Our method, AdapterHub's name, options."""


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


def place_of(key: str) -> str:
    """Where in its block one of AdapterHub's tensors lies."""
    return "attention" if ".attention.output." in key or ".attention_adapters." in key else "output"


def fill_bottlenecks(model: torch.nn.Module, name: str, prefix: str = "") -> list[dict[str, str]]:
    """Give one adapter's bottlenecks their numbers; block, place and tensor decide them, so that the other side can find them by structure."""
    filled: list[dict[str, str]] = []
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f".adapters.{name}." not in key:
                continue
            index = next(part for part in key.split(".") if part.isdigit())
            tensor = ("down" if "adapter_down" in key else "up") + ("_bias" if key.endswith("bias") else "")
            label = f"{prefix}{index}.{place_of(key)}.{tensor}"
            parameter.copy_(values(label, tuple(parameter.shape), 0.3))
            filled.append({"theirs": key, "label": label})
    return filled


def fill_compacter(model: torch.nn.Module) -> list[dict[str, str]]:
    """The same for Compacter; the rule that all layers share has a label of its own."""
    names = {"W_left": "left", "W_right": "right", "b": "bias"}
    filled: list[dict[str, str]] = []
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("shared_parameters.a.phm_rule"):
                label = "shared.phm_rule"
            elif ".adapters.a." in key:
                index = next(part for part in key.split(".") if part.isdigit())
                matrix = "down" if "adapter_down" in key else "up"
                label = f"{index}.{place_of(key)}.{matrix}.{names[key.rpartition('.')[2]]}"
            else:
                continue
            parameter.copy_(values(label, tuple(parameter.shape), 0.7))
            filled.append({"theirs": key, "label": label})
    assert any(one["label"] == "shared.phm_rule" for one in filled)
    return filled


def orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """The rows made orthonormal, each in the direction of what it adds to those before it."""
    rows: list[torch.Tensor] = []
    for row in matrix.double():
        for other in rows:
            row = row - (row @ other) * other
        rows.append(row / row.norm())
    return torch.stack(rows).float()


def fill_reft(model: torch.nn.Module) -> list[dict[str, str]]:
    """The same for ReFT; an orthogonal projection is that of a free matrix."""
    filled: list[dict[str, str]] = []
    with torch.no_grad():
        for key, module in model.named_modules():
            if type(module).__name__ != "ReftUnit":
                continue
            index = next(part for part in key.split(".") if part.isdigit())
            weight, bias = module.learned_source.weight, module.learned_source.bias
            weight.copy_(values(f"{index}.weight", tuple(weight.shape), 0.3))
            bias.copy_(values(f"{index}.bias", tuple(bias.shape), 0.3))
            free = values(f"{index}.rotation", tuple(weight.shape), 0.3)
            if module.orthogonal:
                module.projection.weight = orthonormal(free)
                assert (module.projection.weight - orthonormal(free)).abs().max() < 1e-5
            else:
                module.projection.weight.copy_(free)
            filled += [{"theirs": key, "label": f"{index}.{tensor}"} for tensor in ("weight", "bias", "rotation")]
    return filled


def fill_fusion(model: torch.nn.Module) -> list[dict[str, str]]:
    """The same for a fusion and for the two adapters in it."""
    filled = [one for name in ("p", "q") for one in fill_bottlenecks(model, name, f"{name}.")]
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".adapter_fusion_layer." not in key:
                continue
            index = next(part for part in key.split(".") if part.isdigit())
            matrix, leaf = key.split(".")[-2:]
            label = f"f.{index}.{place_of(key)}.{matrix}" + ("_bias" if leaf == "bias" else "")
            parameter.copy_(values(label, tuple(parameter.shape), 0.3))
            filled.append({"theirs": key, "label": label})
    return filled


def adapted(model: Any, method: str, name: str, options: dict[str, Any]) -> list[dict[str, str]]:
    """Add the adapters of a case, filled and acting; returns which tensors got which numbers."""
    from adapters import AdapterConfig, Fuse

    if method == "fusion":
        for member in ("p", "q"):
            model.add_adapter(member, config=AdapterConfig.load(options["of"], reduction_factor=4))
        model.add_adapter_fusion(Fuse("p", "q"), config=name)
        filled = fill_fusion(model)
        model.set_active_adapters(Fuse("p", "q"))
        return filled
    model.add_adapter("a", config=AdapterConfig.load(name, **options))
    filled = {"compacter": fill_compacter, "reft": fill_reft}.get(method, lambda model: fill_bottlenecks(model, "a"))(
        model
    )
    model.set_active_adapters("a")
    return filled


def main() -> None:
    """Print the golden numbers as JSON."""
    import transformers

    import adapters

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
        for method, name, options in CONFIGS:
            if method == "parallel" and family != "bert":
                continue  # there AdapterHub's bottleneck sees the residual ahead of the norm; ours sees what the MLP sees
            model = make().eval()
            fill_base(model)
            adapters.init(model)
            filled = adapted(model, method, name, options)
            model.eval()
            with torch.no_grad():
                output = model(torch.tensor(INPUT))[0]
                model.set_active_adapters(None)
                bare = model(torch.tensor(INPUT))[0]
            assert (output - bare).abs().max() > 1e-3, f"{family} {name}: the adapter did not act"
            golden["cases"].append(
                {
                    "family": family,
                    "method": method,
                    "name": name,
                    "options": options,
                    "tensors": filled,
                    "output": output.flatten()[::7].tolist(),
                }
            )
    json.dump(golden, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
