"""What an adapter costs around training: loading one beside fifty others, switching, imports, and the merged model against the base.

Every side runs in processes of its own, interleaved. SmolLM2 in the dtype that the machine is fast at, LoRA of rank 8 on every linear layer: 210 layers, 9.8 MB in float32.

* `load`: seconds to load the 1st, 10th, 25th and 50th adapter (ours with its digest check; one thread for tensors), by the clock and by the processor; ours
  also of one with other options beside the fifty, for which nothing is known from those; `switch`, `detach`: with fifty held.
* growth (ours alone): one load and detaching with 1 to 1,000 adapters in the folder beside it (links to one file); with 1 to 64 in memory, and what
  each takes there.
* `import`: seconds of `import ingraft` and `ingraft --help`, of `import peft`, in fresh processes, less an empty Python's.
* `merged`: a forward of 16 x 64 tokens through the merged model and through the base, in turn.

    python benchmarks/lifecycle.py [--repeats 3] [--output benchmarks/results]
"""

from __future__ import annotations

import os
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
ON_DISK = (1, 10, 100, 1000)
IN_MEMORY = (1, 8, 32, 64)


def main() -> int:
    asked = sides.options("Loading, imports, the merged model.", ("ingraft", "peft"))
    runs = sides.measure(asked, run_side, __file__, SETTINGS)
    medians = sides.medians_of(runs)
    keys = list(dict.fromkeys(key for one in medians.values() for key in one))
    lines = ["| measure | " + " | ".join(medians) + " |", "|---" * (len(medians) + 1) + "|"]
    for key in keys:
        shown = [_shown(key, one[key]) if key in one else "" for one in medians.values()]
        lines.append(f"| {key} | {' | '.join(shown)} |")
    sides.write("lifecycle", asked, SETTINGS, runs, lines)
    return 0


def _shown(key: str, value: float) -> str:
    return f"{value:.2f}" if key.endswith(("x", "MB")) else f"{1e3 * value:.1f} ms"


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
        if side == "ingraft":
            found |= _growth(Path(scratch))
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

    return load_base("smollm2", SETTINGS["dtype"]).model


def _our_loads(scratch: Path) -> dict[str, float]:
    import torch

    from ingraft import adapt

    _save(scratch / "saved", r=SETTINGS["r"])
    _save(scratch / "other", r=SETTINGS["r"] // 2)
    torch.set_num_threads(1)
    model = _base()
    found = _timed(lambda name: adapt.load(model, scratch / "saved", name=name), scratch / "saved")
    found["load, other options beside 50"] = _once(lambda: adapt.load(model, scratch / "other", name="other"))[0]
    found["switch with 50"] = statistics.median(
        _once(lambda name=f"a{n}": adapt.activate(model, name))[0] for n in LOADED
    )
    return found | {"detach one of 50": _once(lambda: adapt.detach(model, "a7"))[0]}


def _save(folder: Path, **options: Any) -> None:
    import torch

    from ingraft import adapt
    from ingraft.methods import registry

    model = _base()
    config = registry.make_config("lora", {"lora_alpha": SETTINGS["lora_alpha"], **options})
    adapt.attach(model, config, name="default", seed=SETTINGS["seed"])
    adapt.save(model, folder, dtype=torch.float32)


def _growth(scratch: Path) -> dict[str, float]:
    """What a load costs the more adapters there are on the disk and in memory."""
    from ingraft import adapt

    model, found = _base(), dict[str, float]()
    shelf = scratch / "shelf"
    adapt.load(model, scratch / "saved", name="first")
    for n in range(max(ON_DISK)):
        (shelf / f"n{n}").mkdir(parents=True)
        for file in (scratch / "saved").iterdir():
            os.link(file, shelf / f"n{n}" / file.name)
        if n + 1 in ON_DISK:
            seconds = [
                _once(
                    lambda place=n * k // 9: (
                        adapt.load(model, shelf / f"n{place}", name="x"),
                        adapt.detach(model, "x"),
                    )
                )
                for k in range(10)
            ]
            found[f"load and detach, {n + 1} on disk"] = statistics.median(clock for clock, _ in seconds)
    before, held, seconds = _memory(), 1, list[float]()
    for n in range(1, max(IN_MEMORY) + 1):
        seconds.append(_once(lambda name=f"m{n}": adapt.load(model, scratch / "saved", name=name))[0])
        if n in IN_MEMORY:
            found[f"load, {n} in memory"] = statistics.median(seconds[held - 1 :])
            found[f"memory an adapter, {n} in memory, MB"] = (_memory() - before) / n / 1e6
            held = n + 1
    return found


def _memory() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _their_loads(scratch: Path) -> dict[str, float]:
    import torch

    from peft import LoraConfig, PeftModel, get_peft_model

    config = LoraConfig(
        r=SETTINGS["r"], lora_alpha=SETTINGS["lora_alpha"], target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(_base(), config).save_pretrained(str(scratch / "saved"))
    torch.set_num_threads(1)
    base, held = _base(), dict[str, Any]()

    def load(name: str) -> None:
        if held:
            held["model"].load_adapter(scratch / "saved", adapter_name=name)
        else:
            held["model"] = PeftModel.from_pretrained(base, scratch / "saved", adapter_name=name)

    found = _timed(load, scratch / "saved")
    model = held["model"]
    found["switch with 50"] = statistics.median(_once(lambda name=f"a{n}": model.set_adapter(name))[0] for n in LOADED)
    return found | {"detach one of 50": _once(lambda: model.delete_adapter("a7"))[0]}


def _timed(load: Callable[[str], object], folder: Path) -> dict[str, float]:
    """Seconds of some of the loads, each the median of it and the two before it; the first alone."""
    found = {"file, MB": (folder / "adapter_model.safetensors").stat().st_size / 1e6}
    seconds: list[tuple[float, float]] = []
    for index in range(1, max(LOADED) + 1):
        seconds.append(_once(lambda name=f"a{index}": load(name)))
        if index in LOADED:
            last = seconds[-3:] if index > 3 else seconds
            found[f"load, number {index}"] = statistics.median(clock for clock, _ in last)
            found[f"load, number {index}, by the processor"] = statistics.median(processor for _, processor in last)
    return found


def _once(do: Callable[[], object]) -> tuple[float, float]:
    """Seconds that something takes, by the clock and by the processor (all threads)."""
    clock, processor = time.perf_counter(), time.process_time()
    do()
    return time.perf_counter() - clock, time.process_time() - processor


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
