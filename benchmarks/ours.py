"""Our side: the public way, a recipe given to `ingraft.train`. The log gives the seconds of the steps; loading and scoring are left out."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def tune(
    file: Path, settings: Mapping[str, Any], steps: int, *, skip: int = 0, **more: Any
) -> tuple[Any, dict[str, float]]:
    """Train a LoRA on every linear layer of SmolLM2.

    Args:
        file: with the training rows.
        settings: r, lora_alpha, learning_rate, batch, max_length, seed, dtype.
        skip: how many of the first steps are left out of the figures.
        more: other keys of the recipe.

    Returns:
        The finished run; seconds of the steps, real and learned tokens in them, and the steps against their matrix products alone (`roofline`).
    """
    from ingraft.train.run import train

    with tempfile.TemporaryDirectory() as folder:
        recipe: dict[str, Any] = {
            "model": "smollm2",
            "task": "sft",
            "dtype": settings["dtype"],
            "data": {"train": str(file), "eval": 0, "max_length": settings["max_length"]},
            "method": "lora",
            "method_config": {"r": settings["r"], "lora_alpha": settings["lora_alpha"]},
            "learning_rate": settings["learning_rate"],
            "lr_scheduler_type": "linear",
            "warmup_ratio": 0.0,
            "max_steps": steps,
            "per_device_train_batch_size": settings["batch"],
            "logging_steps": 1,
            "eval_steps": 0,
            "save_steps": 0,
            "seed": settings["seed"],
            "output_dir": f"{folder}/run",
            **more,
        }
        run = train(recipe, quiet=True)
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    stepped = [line for line in lines if "step_seconds" in line][skip:]

    def total(key: str) -> float:
        return sum(line["step_seconds"] * line.get(key, 1.0) for line in stepped)

    tokens, learned = (round(total(key)) for key in ("tokens_per_second", "learned_tokens_per_second"))
    alone = sum(line["step_seconds"] / line["roofline"] for line in stepped)
    return run, {"seconds": total(""), "tokens": tokens, "learned": learned, "roofline": total("") / alone}
