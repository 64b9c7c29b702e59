"""What is well-formed in a recipe and cannot be done all the same: keys that exclude each other, and the method's own keys."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any, cast

from ingraft.errors import IngraftError, nearest
from ingraft.recipe.fields import (
    IMAGE_TASKS,
    READY_TASKS,
    REFERENCE_TASKS,
    SAMPLING_TASKS,
    Recipe,
    Source,
    sources_of,
)
from ingraft.recipe.yaml import plain


def impossible(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are well-formed alone and wrong together, as (keys concerned, sentence)."""
    held_out = recipe.data.eval
    if recipe.task not in READY_TASKS:
        yield ("task",), f"task: {recipe.task!r} comes later; today {', '.join(READY_TASKS)} work."
    if isinstance(held_out, bool) or (isinstance(held_out, float) and not 0 <= held_out < 1):
        text = "is a share in [0, 1), a whole number of rows or a file"
        yield ("data.eval",), f"data.eval: {text}, got {held_out!r}."
    elif isinstance(held_out, int) and held_out < 0:
        yield ("data.eval",), f"data.eval: a number of rows cannot be negative, got {held_out!r}."
    yield from _sources(recipe)
    if not recipe.model.strip():
        yield ("model",), "model: names no base; `ingraft models` lists the ones at hand."
    if recipe.reference_adapter is not None and recipe.task not in REFERENCE_TASKS:
        text = f"only {', '.join(REFERENCE_TASKS)} compare with another adapter, and task is {recipe.task!r}; leave it out."
        yield ("reference_adapter", "task"), f"reference_adapter: {text}"
    yield from _rewards(recipe)
    if recipe.cache_frozen and recipe.task in ("embed", "reward", *REFERENCE_TASKS):
        text = f"rows of task {recipe.task!r} are several sequences each, whose states are not kept; leave it false."
        yield ("cache_frozen", "task"), f"cache_frozen: {text}"
    if recipe.neftune_noise_alpha is not None and recipe.cache_frozen:
        text = "what frozen blocks make of a row is another thing with every noise; leave one of the two out."
        yield ("neftune_noise_alpha", "cache_frozen"), f"neftune_noise_alpha: {text}"
    if recipe.neftune_noise_alpha is not None and recipe.task in SAMPLING_TASKS:
        text = f"task {recipe.task!r} compares what the policy says with and without an update, and noise is neither; leave it out."
        yield ("neftune_noise_alpha", "task"), f"neftune_noise_alpha: {text}"
    if recipe.task in IMAGE_TASKS:
        noise = recipe.neftune_noise_alpha is not None
        for key, asked, other in (
            ("cache_frozen", recipe.cache_frozen, "false"),
            ("data.packing", recipe.data.packing, "false"),
            ("neftune_noise_alpha", noise, "out"),
        ):
            if asked:
                text = f"is for tokens, and the rows of task {recipe.task!r} are pictures; leave it {other}."
                yield (key, "task"), f"{key}: {text}"
    if recipe.learning_rate == "auto" and recipe.task in SAMPLING_TASKS:
        text = f"the loss of task {recipe.task!r} does not tell whether a step was good; give a number, or null."
        yield ("learning_rate", "task"), f"learning_rate: {text}"
    if recipe.meta.inner_steps:
        yield from _rounds(recipe)
    if recipe.max_steps == 0:
        yield ("max_steps",), "max_steps: 0 steps train nothing; use -1 to follow num_train_epochs."
    if recipe.cache_frozen and recipe.max_steps == -1 and recipe.num_train_epochs <= 1:
        text = f"no row comes twice in num_train_epochs {recipe.num_train_epochs:g}; leave it false, or train for more epochs."
        yield ("cache_frozen", "max_steps", "num_train_epochs"), f"cache_frozen: {text}"
    if 0 < recipe.max_steps < recipe.warmup_steps:
        yield (
            ("max_steps", "warmup_steps"),
            f"warmup_steps: {recipe.warmup_steps} is more than max_steps {recipe.max_steps}.",
        )
    for key, asked in (
        ("load_best_model_at_end", recipe.load_best_model_at_end),
        ("early_stopping_patience", recipe.early_stopping_patience is not None),
        ("eval_samples", recipe.eval_samples > 0),
    ):
        if asked and not held_out:
            yield (key, "data.eval"), f"{key}: needs rows to evaluate on; data.eval is {held_out!r}."
        if asked and not recipe.eval_steps:
            yield (key, "eval_steps"), f"{key}: needs evaluations during training; eval_steps is 0."


def _sources(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with the files that the recipe names."""
    if not recipe.data.named.strip():
        yield ("data.train",), "data.train: names no file."
    for key in ("train", "eval", "test"):
        value = getattr(recipe.data, key)
        found = cast("list[Source]", value) if isinstance(value, list) else []
        again = sorted({source.file for source in found if sum(other.file == source.file for other in found) > 1})
        if again:
            hint = "; to see it more often, give it a weight" if key == "train" else ""
            yield (f"data.{key}",), f"data.{key}: names {', '.join(again)} more than once{hint}."
        weighted = [source.file for source in found if source.weight is not None]
        if key == "train" and weighted and len(weighted) < len(found):
            without = ", ".join(source.file for source in found if source.weight is None)
            yield (f"data.{key}",), f"data.{key}: {without}: has no weight and others do; give every file one, or none."
        elif key != "train" and weighted:
            yield (
                (f"data.{key}",),
                f"data.{key}: {', '.join(weighted)}: a weight is for training files only; leave it out.",
            )


def _rounds(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What rounds over files cannot be combined with."""
    files = sources_of(recipe.data.train)
    if len(files) < 2:
        yield (
            ("meta.inner_steps", "data.train"),
            "meta.inner_steps: each file is a task, and data.train names one; name several.",
        )
    if any(source.weight is not None for source in files):
        text = "every file has as many rounds as the others, so weights would mean nothing; leave them out."
        yield ("meta.inner_steps", "data.train"), f"meta.inner_steps: {text}"
    if recipe.task in (*SAMPLING_TASKS, *REFERENCE_TASKS):
        yield ("meta.inner_steps", "task"), f"meta.inner_steps: not for task {recipe.task!r}; leave it 0."
    if recipe.data.eval and recipe.eval_steps % recipe.meta.inner_steps:
        text = f"within a round the adapter is one file's, so evaluations belong at its end; {recipe.eval_steps} is no multiple of {recipe.meta.inner_steps}."
        yield ("meta.inner_steps", "eval_steps"), f"eval_steps: {text}"
    if recipe.cache_frozen:
        yield ("meta.inner_steps", "cache_frozen"), "cache_frozen: not with meta.inner_steps; leave it false."


def _rewards(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """What is wrong with where rewards come from."""
    given = {
        "reward_adapter": recipe.reward_adapter,
        "reward_function": recipe.reward_function,
        "rl.reward_pattern": recipe.rl.reward_pattern,
    }
    there = [key for key, value in given.items() if value is not None]
    if recipe.task not in SAMPLING_TASKS:
        for key in there:
            yield (key, "task"), f"{key}: only {' and '.join(SAMPLING_TASKS)} learn from rewards; leave it out."
        return
    if recipe.reward_function is not None:
        file, _, name = recipe.reward_function.rpartition(":")
        if not file.endswith(".py") or not name.isidentifier():
            yield ("reward_function",), f"reward_function: is file.py:name, got {recipe.reward_function!r}."
    if recipe.rl.reward_pattern is not None:
        try:
            groups = re.compile(recipe.rl.reward_pattern).groups
        except re.error as error:
            yield ("rl.reward_pattern",), f"rl.reward_pattern: is no regular expression: {error}."
        else:
            if groups != 1:
                yield ("rl.reward_pattern",), f"rl.reward_pattern: needs one group, and has {groups}."
    if recipe.task == "grpo" and recipe.rl.num_generations == 1:
        yield ("rl.num_generations",), "rl.num_generations: grpo compares answers to a prompt, so it needs 2 or more."
    if recipe.data.packing:
        yield ("data.packing", "task"), f"data.packing: is not for task {recipe.task!r}; leave it false."


def method_options(
    method: str, options: dict[str, Any], over: tuple[str, ...], steps: int
) -> tuple[dict[str, Any], list[str]]:
    """The method's options with its defaults filled in, or the problems with its name or its keys.

    Args:
        over: the names of the adapters the recipe brings, for a method that acts over others; such a method calls its option `adapters`.
        steps: how long training is, if that is known yet (above 0).
    """
    from ingraft.methods import registry

    if method not in registry.records():
        if (reason := registry.why_not(method)) is not None:
            return options, [f"method: {reason}"]
        hint = nearest(method, registry.records())
        return options, [f"method: there is no method {method!r}{hint}; `ingraft methods` lists them."]
    acts_over = registry.load(method).over
    if over and acts_over is None:
        others = [other.name for other in registry.methods() if other.over is not None]
        return options, [
            f"adapters: {method} acts on the base alone; leave adapters out ({', '.join(others)} uses them)."
        ]
    if over and not options.get("adapters"):
        options = {**options, "adapters": list(over)}
    try:
        config = registry.make_config(method, options)
    except IngraftError as error:
        return options, [
            text if text.startswith("method_config") else f"method_config: {text}" for text in error.problems
        ]
    if acts_over is not None:
        named = acts_over(config)
        if len(named) < 2 or set(named) != set(over):
            said = ", ".join(named) or "none"
            return options, [
                f"adapters: {method} acts over two trained adapters or more, and needs the folder of each "
                f"(--adapters.NAME FOLDER); it is to act over {said}, and there are folders for {', '.join(over) or 'none'}."
            ]
    found = [f"method_config: {text}" for text in (config.in_steps(steps) if steps > 0 else ())]
    return plain(dataclasses.asdict(cast(Any, config))), found
