"""The recipe: everything that decides a training run, as plain frozen data.

One object serves the YAML file, the command line (whose options are generated from these fields), the Python call and the `recipe.yaml` that
a run leaves behind, so the four cannot drift apart.

Two things shape this package. A user mends a recipe in one go only if *every* problem is reported at once, so checks collect and never stop
at the first; and `ingraft --help` must be instant, so nothing heavier than the standard library is imported before a recipe is read
(pydantic, yaml and, for the method's own keys, torch come in through the functions that need them).

What a person must decide at the keyboard (trusting remote code, overwriting a folder) is deliberately no field: a file cannot grant it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ingraft.errors import IngraftError
from ingraft.methods.registry import record
from ingraft.recipe.checks import impossible, method_options
from ingraft.recipe.fields import (
    GROUPS,
    READY_TASKS,
    REFERENCE_TASKS,
    SAMPLING_TASKS,
    DataRecipe,
    EmbedRecipe,
    Losses,
    PreferenceRecipe,
    Recipe,
    RlRecipe,
    Source,
    recipe_fields,
    sources_of,
)
from ingraft.recipe.parsing import merge_values, parse
from ingraft.recipe.yaml import dump, plain, read_yaml, scalar

__all__ = [
    "GROUPS",
    "READY_TASKS",
    "REFERENCE_TASKS",
    "DataRecipe",
    "EmbedRecipe",
    "Losses",
    "PreferenceRecipe",
    "SAMPLING_TASKS",
    "Recipe",
    "RlRecipe",
    "Source",
    "as_recipe",
    "load_recipe",
    "merge_values",
    "plain",
    "read_yaml",
    "recipe_fields",
    "scalar",
    "sources_of",
    "to_yaml",
]


def load_recipe(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    also: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """Read a YAML recipe, lay `overrides` over it and check the whole.

    Args:
        path: the YAML file, or None to build the recipe from overrides alone.
        overrides: values by dotted key (`{"data.max_length": 512}`); they win over the file. `method_config` merges key by key, unless
            the override changes the method, whose keys would then belong to another method.
        also: as in `as_recipe`.

    Raises:
        IngraftError: the file cannot be read, or the recipe is wrong; every problem is listed.
    """
    values = {} if path is None else read_yaml(path)
    barred: list[str] = []
    if (named := values.get("reward_function")) is not None and "reward_function" not in (overrides or {}):
        barred.append(
            f"{path}: reward_function: a file may not decide whose code runs here; if you have read it and trust it, add "
            f"--reward-function {named}."
        )
    merge_values(values, overrides or {})
    try:
        recipe = as_recipe(values, source="" if path is None else str(path), also=also)
    except IngraftError as error:
        raise IngraftError(*barred, *error.problems) from None
    if barred:
        raise IngraftError(*barred)
    return recipe


def as_recipe(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    source: str = "",
    check_method: bool = True,
    also: Callable[[Recipe], list[str]] | None = None,
) -> Recipe:
    """A checked, fully resolved recipe from whatever the caller holds: a `Recipe`, a mapping with the same keys, or a YAML file.

    Args:
        source: where a mapping came from, to be named in the messages.
        check_method: look into the method's own keys as well, which imports the method and with it torch.
        also: asked for further problems, of the files that it names, where a recipe is refused: all are told at once.

    Raises:
        IngraftError: every problem found.
    """
    if isinstance(recipe, str | Path):
        return load_recipe(recipe, also=also)
    values = dataclasses.asdict(recipe) if isinstance(recipe, Recipe) else dict(recipe)
    if isinstance(values.get("data"), str | list):  # `data: rows.jsonl`, as `--data rows.jsonl`
        values["data"] = {"train": values["data"]}
    parsed, problems, wrong = parse(values)
    problems += [text for keys, text in impossible(parsed) if not wrong.intersection(keys)]
    if check_method and not wrong.intersection(("method", "method_config")):
        over, steps = tuple(parsed.adapters), parsed.max_steps
        options, method_problems = method_options(parsed.method, parsed.method_config, over, steps)
        problems += method_problems
        parsed = dataclasses.replace(parsed, method_config=options)
    if problems:
        inside = [f"{source}: {text}" if source else text for text in problems]
        raise IngraftError(*inside, *(also(parsed) if also is not None else ()))
    if parsed.learning_rate is None:
        parsed = dataclasses.replace(parsed, learning_rate=record(parsed.method).learning_rate)
    if parsed.task in SAMPLING_TASKS and parsed.metric_for_best_model == "loss":
        parsed = dataclasses.replace(parsed, metric_for_best_model="reward")
    if not parsed.output_dir:
        parsed = dataclasses.replace(parsed, output_dir=f"runs/{_stem(parsed.data)}-{parsed.method}")
    return parsed


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every key spelled out; `load_recipe` reads it back to an equal object."""
    return dump(dataclasses.asdict(recipe))


def _stem(data: DataRecipe) -> str:
    """A short name for the data, fit for a folder: `/x/reviews.jsonl.gz` -> `reviews`."""
    names = [Path(source.file.rstrip("/")).name.split(".")[0] for source in sources_of(data.train)]
    return re.sub(r"[^\w-]+", "-", "-".join(names[:3])) or "run"
