"""Batches whose rows carry different adapters: one decode step of 16 rows, set against the same rows on the bare base.

Every side runs in processes of its own, interleaved. SmolLM2 in the dtype that the machine is fast at; LoRA of rank 8 on every linear layer, all tensors random, so that no
adapter is a no-op. `mixed` has four adapters of each of four methods (LoRA, IA3, bottleneck, prefix), which PEFT cannot serve in one batch.

    python benchmarks/serving.py [--steps 30] [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import sides

SIDES = ("bare", "one", "each", "mixed", "peft-one", "peft-each")
SETTINGS: dict[str, Any] = {"rows": 16, "prompt": 64, "r": 8, "lora_alpha": 16, "seed": 42}
METHODS: dict[str, dict[str, Any]] = {
    "lora": {"r": 8, "lora_alpha": 16},
    "ia3": {},
    "pfeiffer": {},
    "prefix": {},
}


def main() -> int:
    asked = sides.options("Rows with different adapters: one decode step.", SIDES)
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    bare = medians.get("bare", next(iter(medians.values())))
    lines = ["| rows carry | decode step, ms | against the bare base (each repeat) |", "|---|---|---|"]
    for side, one in medians.items():
        each = [
            mine["decode_seconds"] / other["decode_seconds"]
            for mine, other in zip(runs[side], runs.get("bare", runs[side]), strict=True)
        ]
        lines.append(
            f"| {side} | {1e3 * one['decode_seconds']:.1f} | {one['decode_seconds'] / bare['decode_seconds']:.2f}x "
            f"({', '.join(f'{ratio:.2f}' for ratio in each)}) |"
        )
    sides.write("serving", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, folder: Path, steps: int) -> dict[str, float]:
    """The median decode step of one side in this process."""
    import torch

    from ingraft.bases import load_base

    del folder
    torch.manual_seed(SETTINGS["seed"])
    model = load_base("smollm2", SETTINGS["dtype"]).model
    acting, names = (_theirs if side.startswith("peft") else _ours)(model, side)
    return {"decode_seconds": _decode(acting, names, steps)}


def _ours(model: Any, side: str) -> tuple[Any, AbstractContextManager[Any]]:
    """The model with its adapters, and what lets its rows carry them."""
    from ingraft import adapt
    from ingraft.methods import registry

    if side == "bare":
        return model, nullcontext()
    n = SETTINGS["rows"]
    methods = {"one": ["lora"], "each": ["lora"] * n, "mixed": [name for name in METHODS for _ in range(n // 4)]}[side]
    for index, method in enumerate(methods):
        adapt.attach(model, registry.make_config(method, METHODS[method]), name=f"a{index}", seed=index)
        _random(adapt.parameters(model, f"a{index}").values())
    model.eval()
    if side == "one":
        adapt.activate(model, "a0")
        return model, nullcontext()
    return model, adapt.rows(model, [f"a{index}" for index in range(n)])


def _theirs(model: Any, side: str) -> tuple[Any, AbstractContextManager[Any]]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=SETTINGS["r"], lora_alpha=SETTINGS["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    names = ["default"] if side == "peft-one" else [f"a{index}" for index in range(SETTINGS["rows"])]
    model = get_peft_model(model, config, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, config)
    _random(parameter for name, parameter in model.named_parameters() if "lora_" in name)
    model.eval()
    return (_Named(model, names), nullcontext()) if len(names) > 1 else (model, nullcontext())


class _Named:
    """A model whose every call names the adapters of its rows."""

    def __init__(self, model: Any, names: list[str]) -> None:
        self._model, self._names = model, names

    def __call__(self, **inputs: Any) -> Any:
        return self._model(**inputs, adapter_names=self._names)


def _random(tensors: Any) -> None:
    import torch

    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.01 * torch.randn_like(tensor))


def _decode(model: Any, acting: AbstractContextManager[Any], steps: int) -> float:
    """Seconds for one token of every row, the median."""
    import torch
    from transformers import DynamicCache

    seconds: list[float] = []
    with torch.no_grad(), acting:
        cache = DynamicCache()
        ids = torch.arange(5, 5 + SETTINGS["prompt"]).repeat(SETTINGS["rows"], 1)
        for _ in range(steps):
            began = time.perf_counter()
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    sys.exit(main())
