"""What an adapter costs around training: loading one beside fifty others, imports, and the merged model against the base.

Every side runs in processes of its own, interleaved. SmolLM2 in bf16, LoRA of rank 8 on every linear layer.

* `load`: seconds to load the 1st, 10th, 25th and 50th adapter (ours with its digest check).
* `import`: seconds of `import ingraft` and `ingraft --help`, of `import peft`, in fresh processes, less an empty Python's.
* `merged`: a forward of 16 x 64 tokens through the merged model and through the base, in turn.

    python benchmarks/lifecycle.py [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sides

SETTINGS: dict[str, Any] = {"r": 8, "lora_alpha": 16, "seed": 42}
LOADED = (1, 10, 25, 50)


def main() -> int:
    asked = sides.options("Loading, imports, the merged model.", ("ingraft", "peft"))
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    keys = list(dict.fromkeys(key for one in medians.values() for key in one))
    lines = ["| measure | " + " | ".join(medians) + " |", "|---" * (len(medians) + 1) + "|"]
    for key in keys:
        shown = [f"{one[key]:.2f}" if key.endswith("x") else f"{1e3 * one[key]:.0f} ms" for one in medians.values()]
        lines.append(f"| {key} | {' | '.join(shown)} |")
    sides.write("lifecycle", asked, SETTINGS, runs, lines)
    return 0


def run_side(side: str, folder: Path, steps: int) -> dict[str, float]:
    """The figures of one side in this process."""
    del folder, steps
    words = {"import": [sys.executable, "-c", f"import {side}"]}
    words["help"] = [str(Path(sys.executable).parent / "ingraft"), "--help"] if side == "ingraft" else words["import"]
    empty = _seconds([sys.executable, "-c", "pass"])
    found = {
        "import": max(_seconds(words["import"]) - empty, 0.0),
        "command line's help": _seconds(words["help"]),
    }
    with tempfile.TemporaryDirectory() as scratch:
        found |= (_our_loads if side == "ingraft" else _their_loads)(Path(scratch))
    return {**found, "merged over base, x": (_our_merge if side == "ingraft" else _their_merge)()}


def _seconds(command: list[str]) -> float:
    """The least of five runs."""
    found: list[float] = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        found.append(time.perf_counter() - began)
    return min(found)


def _base() -> Any:
    from ingraft.bases import load_base

    return load_base("smollm2", "bfloat16").model


def _our_loads(scratch: Path) -> dict[str, float]:
    from ingraft import adapt
    from ingraft.methods import registry

    config = registry.make_config("lora", {"r": SETTINGS["r"], "lora_alpha": SETTINGS["lora_alpha"]})
    model = _base()
    adapt.attach(model, config, name="default", seed=SETTINGS["seed"])
    adapt.save(model, scratch / "saved")
    model = _base()
    return _timed(lambda name: adapt.load(model, scratch / "saved", name=name))


def _their_loads(scratch: Path) -> dict[str, float]:
    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=SETTINGS["r"], lora_alpha=SETTINGS["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(_base(), config).save_pretrained(str(scratch / "saved"))
    base, held = _base(), dict[str, Any]()

    def load(name: str) -> None:
        if held:
            held["model"].load_adapter(scratch / "saved", adapter_name=name)
        else:
            held["model"] = PeftModel.from_pretrained(base, scratch / "saved", adapter_name=name)

    return _timed(load)


def _timed(load: Callable[[str], object]) -> dict[str, float]:
    """Seconds of some of the loads."""
    found: dict[str, float] = {}
    for index in range(1, max(LOADED) + 1):
        began = time.perf_counter()
        load(f"a{index}")
        if index in LOADED:
            found[f"load, number {index}"] = time.perf_counter() - began
    return found


def _our_merge() -> float:
    from ingraft import adapt
    from ingraft.methods import registry

    model = _base()
    adapt.attach(model, registry.make_config("lora", {"r": SETTINGS["r"], "init_lora_weights": False}))
    adapt.merge(model)
    return _ratio(model)


def _their_merge() -> float:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=SETTINGS["r"], target_modules="all-linear", init_lora_weights=False)
    return _ratio(get_peft_model(_base(), config).merge_and_unload())


def _ratio(merged: Any) -> float:
    """The merged model's forward over the base's, the median of forwards in turn."""
    import torch

    base, ids = _base(), torch.arange(5, 69).repeat(16, 1)
    ratios: list[float] = []
    with torch.no_grad():
        for _ in range(9):
            seconds: list[float] = []
            for model in (merged, base):
                began = time.perf_counter()
                model(input_ids=ids)
                seconds.append(time.perf_counter() - began)
            ratios.append(seconds[0] / seconds[1])
    return statistics.median(ratios[1:])


if __name__ == "__main__":
    sys.exit(main())
