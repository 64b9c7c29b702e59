"""Where a verb's settings come from when they are not all given, and how the model they name is opened.

`ingraft eval --adapter runs/x` should score what the run trained, under the settings it trained with; otherwise its loss is not the one in
the log. So the recipe that lies beside an adapter is the first layer, `--config` the second, options the last. Only what belongs to base
and data is taken over: the method's settings are in the adapter itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingraft import durable
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ingraft.bases.reading import Reader
    from ingraft.cli.output import Output
    from ingraft.recipe import Recipe

_TRAINING_ONLY = (
    "method",
    "method_config",
    "init_adapter",
    "reference_adapter",
    "output_dir",
    "load_best_model_at_end",
    "early_stopping_patience",
    "warmup_steps",
    "eval_samples",
    "neftune_noise_alpha",
    "meta",
)
_UNUSED = "unused"


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A base in memory, with an adapter where one was asked for.

    Attributes:
        tokenizer: what the base reads rows with.
        source: the folder, file or hub id that the base was read from.
    """

    model: PreTrainedModel
    tokenizer: Reader
    recipe: Recipe
    adapter: str | None
    source: str = ""


def settle(
    overrides: Mapping[str, Any],
    *,
    config: str | None = None,
    adapter: str | None = None,
    needs_data: bool = True,
    keep_split: bool = False,
) -> Recipe:
    """The recipe for a verb that does not train.

    Args:
        overrides: what was given as options, by dotted key.
        config: a recipe file given with --config.
        adapter: an adapter folder; its recipe, or at least the base recorded in it, fills what is not given.
        needs_data: whether a data set must be named.
        keep_split: leave rows named at the keyboard split as training would split them; otherwise they are taken whole.

    Raises:
        IngraftError: every problem found.
    """
    from ingraft.recipe import as_recipe, merge_values, read_yaml

    values: dict[str, Any] = {}
    if adapter is not None:
        values = recorded(adapter)
    if config is not None:
        merge_values(values, read_yaml(config))
    values.pop("reward_function", None)  # code that a person names, or nobody
    given_data = "data.train" in overrides
    merge_values(values, overrides)
    if given_data and not keep_split:  # the split belonged to the data of the run
        values["data"] |= {"eval": 0, "test": None, "format": overrides.get("data.format", "auto")}
        if "data.eval" in overrides:
            values["data"]["eval"] = overrides["data.eval"]
    if not needs_data and not values.get("data"):
        values["data"] = {"train": _UNUSED}
    for key in _TRAINING_ONLY:
        values.pop(key, None)
    return as_recipe(values, check_method=False)


def recorded(adapter: str) -> dict[str, Any]:
    """What an adapter folder says about its base and its run, as recipe values.

    Raises:
        IngraftError: there is no such folder, or it holds no adapter.
    """
    from ingraft.recipe import read_yaml

    folder = adapter_folder(adapter)
    if (folder / "recipe.yaml").is_file():
        return read_yaml(folder / "recipe.yaml")
    base = durable.read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    return {"model": base} if base else {}


def adapter_folder(adapter: str) -> Path:
    """The folder, if there is an adapter in it.

    Raises:
        IngraftError: no folder, or one without `adapter_config.json`; says what is there instead.
    """
    folder = Path(adapter)
    if not folder.is_dir():
        raise IngraftError(f"--adapter {adapter}: there is no such folder.")
    if (folder / "adapter_config.json").is_file():
        return folder
    inner = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if inner:
        raise IngraftError(f"--adapter {adapter}: holds no adapter itself; one lies in {inner[-1]}.")
    raise IngraftError(f"--adapter {adapter}: holds no adapter_config.json, so it is no adapter or run folder.")


def free_folder(output_dir: str, overwrite: bool) -> Path:
    """The folder of --output-dir, if it may be written.

    Raises:
        IngraftError: it is a file, or holds something that may not be replaced.
    """
    target = Path(output_dir)
    if not overwrite and target.exists() and (target.is_file() or any(target.iterdir())):
        raise IngraftError(
            f"--output-dir {output_dir}: exists and is not empty; choose another, or add --overwrite-output-dir."
        )
    return target


def open_model(
    recipe: Recipe,
    adapter: str | None,
    output: Output,
    *,
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    announce: bool = True,
    reference: bool = False,
) -> Opened:
    """Load the base a recipe names and put the adapter into it.

    Args:
        announce: say first what is being loaded.
        reference: load what the adapter's run compared its policy with as well, where its folder keeps that.

    Raises:
        IngraftError: no such base; the adapter does not fit it, or is damaged.
    """
    import torch
    from transformers.utils import logging

    import ingraft
    from ingraft.adapt.lifecycle import acting_kept
    from ingraft.bases import HEADS, load_base
    from ingraft.evaluate.roles import REFERENCE

    logging.disable_progress_bar()

    if announce:
        output.say(f"base {recipe.model}" + (f", adapter {adapter}" if adapter else ""))
    facts = manifest_facts(adapter_folder(adapter)) if adapter is not None else {}
    run = run_facts(facts)
    labels, scale = run.get("labels"), run.get("scale")
    dtype = recipe.dtype
    if dtype == "auto" and facts.get("dtype"):  # the dtype the adapter was trained in, not what is fast here today
        dtype = facts["dtype"]
    # A model with a head that was saved by itself (merged, or trained elsewhere) brings the head, and its labels.
    head = HEADS[recipe.task]
    by_itself = head.fresh and (labels is None if head.named else adapter is None)
    task = None if by_itself else recipe.task
    torch.manual_seed(recipe.seed)  # what a base lacks for the task starts at random: draw it as training did
    base = load_base(
        recipe.model, dtype, trust_remote_code, task, labels=labels, quantization=recipe.quantization, scale=scale
    )
    model, tokenizer = base.model, base.tokenizer
    name = None
    if adapter is not None:
        folder = adapter_folder(adapter)
        name = ingraft.load(model, folder, allow_base_mismatch=allow_base_mismatch)
        if reference and (kept := folder / REFERENCE).is_dir():
            with acting_kept(model):
                ingraft.load(model, kept, name=REFERENCE, allow_base_mismatch=allow_base_mismatch)
    model.eval()
    return Opened(model=model, tokenizer=tokenizer, recipe=recipe, adapter=name, source=base.source)


def run_facts(facts: Mapping[str, Any]) -> dict[str, Any]:
    """What the facts of an adapter folder tell of the run that it comes from."""
    return facts.get("run") or facts.get("extra", {}).get("run", {})


def manifest_facts(folder: Path) -> dict[str, Any]:
    """What the manifest of an adapter folder tells beside its digests; nothing for a folder written elsewhere."""
    return durable.read_manifest(folder)["facts"] if (folder / durable.MANIFEST).is_file() else {}


def model_labels(opened: Opened) -> tuple[str, ...] | None:
    """What the model's outputs are called, in their order; None where they have no names."""
    from ingraft.bases import HEADS

    names = opened.model.config.id2label if HEADS[opened.recipe.task].named else None
    return None if names is None else tuple(name for _, name in sorted(names.items()))
