"""`ingraft eval`: loss and metrics of a base, or of a base with an adapter, on a data set, computed as training computes them.

Without --data the rows that the adapter's own run held out are scored, so that the loss must come out as the run logged it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ingraft.cli.options import adapter_option, given, trust_option, verb
from ingraft.cli.output import Output
from ingraft.errors import IngraftError


@verb(
    "model",
    "quantization",
    "task",
    "data",
    "preference",
    "embed",
    "reward_adapter",
    "reward_function",
    "rl",
    "dtype",
    "per_device_eval_batch_size",
    "seed",
)
@adapter_option
@trust_option
def command(
    config: str | None,
    as_json: bool,
    adapter: str | None,
    allow_base_mismatch: bool,
    trust_remote_code: bool,
    **arguments: Any,
) -> None:
    """Score a base, or a base with an adapter, on a data set.

    Rows named with --data are all scored. Without it, those that the recipe of the adapter (or of --config) holds out.
    """
    from ingraft.bases.heads import scale_of
    from ingraft.cli.sources import load_data, model_labels, open_model, settle
    from ingraft.data import pad_id
    from ingraft.evaluate import evaluate, hold
    from ingraft.evaluate.rewards import rewards_of
    from ingraft.recipe import SAMPLING_TASKS

    output = Output(as_json=as_json)
    overrides = given(arguments)
    whole = "data.train" in overrides
    recipe = settle(overrides, config=config, adapter=adapter)
    parts = (
        ["train"]
        if whole
        else [part for part, rows in (("eval", recipe.data.eval), ("test", recipe.data.test)) if rows]
    )
    if not parts:
        raise IngraftError("--data FILE is needed: the recipe holds no rows out.")
    opened = open_model(
        recipe,
        adapter,
        output,
        trust_remote_code=trust_remote_code,
        allow_base_mismatch=allow_base_mismatch,
        reference=True,
    )
    hold(opened.tokenizer, opened.model)
    data = load_data(recipe, opened.tokenizer, model_labels(opened), scale_of(opened.model))
    output.say(*(f"note: {note}" for note in data.report.notes))
    rewards = None
    if recipe.task in SAMPLING_TASKS:
        run = Path(adapter) if adapter is not None else None
        pad = pad_id(opened.tokenizer)
        found_rewards = rewards_of(recipe, opened.model, pad, run, allow_base_mismatch=allow_base_mismatch)
        rewards = found_rewards if found_rewards.sources else None
    found: dict[str, Any] = {}
    for part in parts:
        metrics = evaluate(
            opened.model,
            opened.tokenizer,
            data,
            part,
            batch_size=recipe.per_device_eval_batch_size,
            losses=recipe.losses,
            rewards=rewards,
        )
        files = ", ".join(origin.file for origin in data.parts[part].origins)
        found[part] = {"rows": len(data.parts[part].examples), "source": files, **metrics}
    output.result({"model": recipe.model, "adapter": adapter, "task": recipe.task, **found})
    for part in parts:
        values = {name: f"{value:.6f}" if isinstance(value, float) else value for name, value in found[part].items()}
        output.facts({f"{part}_{name}" if len(parts) > 1 else name: value for name, value in values.items()})
