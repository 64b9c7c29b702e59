"""The recipe: everything that decides a training run, as plain frozen data.

One object serves the YAML file, the command line (whose options are generated from these fields), the Python call and the `recipe.yaml` that
a run leaves behind, so the four cannot drift apart. Keys not explained otherwise mean what they mean in transformers' `TrainingArguments`.

Two things shape this file. A user mends a recipe in one go only if *every* problem is reported at once, so checks collect and never stop
at the first; and `ingraft --help` must be instant, so nothing heavier than the standard library is imported before a recipe is read
(pydantic, yaml and, for the method's own keys, torch come in through the functions that need them).

What a person must decide at the keyboard (trusting remote code, overwriting a folder) is deliberately no field: a file cannot grant it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from ingraft._yaml import dump, plain, read_yaml
from ingraft._yaml import scalar as scalar
from ingraft.errors import IngraftError, nearest
from ingraft.methods.registry import record

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Task = Literal[
    "sft", "lm", "classify", "multi-label", "regress", "tag", "qa", "seq2seq", "embed",
    "image-classify", "diffusion", "reward", "dpo", "ipo", "kto", "ppo", "grpo",
]  # fmt: skip
Quantization = Literal["none", "nf4", "int8", "keep"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]

READY_TASKS = ("sft", "lm", "classify", "multi-label", "regress", "tag", "qa", "reward", "dpo", "ipo", "kto")
REFERENCE_TASKS = ("dpo", "ipo", "kto")
"""Those that compare a policy with the one it was at first."""

_KEYBOARD_ONLY = {
    "trust_remote_code": "a file may not decide whose code runs here",
    "overwrite_output_dir": "a file may not delete a folder",
    "allow_base_mismatch": "it is a person's to accept",
    "resume_from_checkpoint": "it describes one start of a run, not the run",
}


def _key(help: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A recipe field: its meaning for `--help`, and its default unless it is required."""
    return field(default=default, default_factory=factory, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where the rows come from and how they become token sequences."""

    train: str = _key(
        "training rows: a file (jsonl, json, csv, tsv, parquet, txt, also .gz), a datasets folder or a hub id"
    )
    eval: float | int | str = _key(
        "rows to evaluate on: a share of train (0.1), a number of rows (100), a file, or 0 for none", 0.1
    )
    test: str | None = _key("a file of rows scored once, after training", None)
    format: str = _key("row format; auto detects it from the rows", "auto")
    learn: Literal["answer", "all"] = _key("which tokens the loss counts: the answers, or every token", "answer")
    max_length: Annotated[int, Ge(2)] = _key("longest sequence in tokens; longer rows are cut", 512)
    stride: Annotated[int, Ge(0)] = _key(
        "qa: tokens that neighbouring windows of a context share which is longer than max_length", 128
    )
    packing: bool = _key(
        "lay the rows of a forward pass end to end, so that nothing is padded; what is learned is the same", False
    )


@dataclass(frozen=True, kw_only=True)
class PreferenceRecipe:
    """How preferences become a loss (tasks dpo, ipo and kto)."""

    beta: Annotated[float, Gt(0)] = _key(
        "dpo, kto: how dear a step away from the reference is; ipo: the goal is a margin of 1 / (2 beta) nats a token",
        0.1,
    )
    label_smoothing: Annotated[float, Ge(0), Lt(0.5)] = _key(
        "dpo: the share of pairs taken to be the wrong way round", 0.0
    )
    desirable_weight: Annotated[float, Gt(0)] = _key("kto: weight of answers judged good", 1.0)
    undesirable_weight: Annotated[float, Gt(0)] = _key("kto: weight of answers judged bad", 1.0)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Build it through `as_recipe` or `load_recipe`, which check it; the fields carry their help text."""

    model: str = _key("the base: a name from `ingraft models`, a hub id, a folder or a .gguf file")
    quantization: Quantization = _key(
        "how the frozen base is held in memory: nf4, int8, keep (a GGUF's own blocks) or none (dense)", "none"
    )
    task: Task = _key(
        "what is learned: sft (answers), lm (plain text), classify (a label), multi-label (several), regress (a number), tag (a tag a word), "
        "qa (the passage that answers a question), reward (which answer is better), or dpo, ipo, kto (to give the better one)",
        "sft",
    )
    data: DataRecipe = _key("the data, see the data.* keys")
    method: str = _key("tuning method, a name from `ingraft methods`", "lora")
    method_config: dict[str, Any] = _key("the method's own keys, for example method_config.r", factory=dict)
    adapters: dict[str, str] = _key(
        "trained adapters that the method acts over (fusion): a folder by the name it gets here", factory=dict
    )
    init_adapter: str | None = _key("start from this adapter folder instead of a fresh adapter", None)
    reference_adapter: str | None = _key(
        "dpo, ipo, kto: the adapter that the policy is compared with; null takes init_adapter, else the base alone",
        None,
    )
    preference: PreferenceRecipe = _key("see the preference.* keys", factory=PreferenceRecipe)

    learning_rate: Annotated[float, Gt(0)] | None = _key(
        "peak learning rate; null takes the method's own, see `ingraft methods`", None
    )
    optim: Literal["adamw_torch", "adamw_8bit"] = _key(
        "optimiser: AdamW, or AdamW with its state in 8 bits (CUDA, bitsandbytes)", "adamw_torch"
    )
    weight_decay: Annotated[float, Ge(0)] = _key("decoupled weight decay of AdamW", 0.0)
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = _key("AdamW's decay of the mean", 0.9)
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = _key("AdamW's decay of the variance", 0.999)
    adam_epsilon: Annotated[float, Gt(0)] = _key("AdamW's epsilon", 1e-8)
    max_grad_norm: Annotated[float, Ge(0)] = _key("clip gradients to this norm; 0 does not clip", 1.0)

    num_train_epochs: Annotated[float, Gt(0)] = _key("passes over the training rows", 1.0)
    max_steps: Annotated[int, Ge(-1)] = _key("optimiser steps; overrides num_train_epochs unless -1", -1)
    per_device_train_batch_size: Annotated[int, Ge(1)] = _key("rows in a forward pass while training", 8)
    auto_find_batch_size: bool = _key(
        "take fewer rows at once where memory is short; the effective batch stays what it is", True
    )
    per_device_eval_batch_size: Annotated[int, Ge(1)] = _key("rows in a forward pass while evaluating", 8)
    gradient_accumulation_steps: Annotated[int, Ge(1)] = _key("forward passes to an optimiser step", 1)
    gradient_checkpointing: bool | Annotated[int, Ge(0)] | Literal["auto"] = _key(
        "recompute blocks in backward, less memory for more time: all, none, a number of them, or auto: as few as the memory asks for",
        False,
    )
    cache_frozen: bool = _key(
        "run the blocks below the lowest adapted one once a row and keep on disk what they make, for the epochs after the first",
        False,
    )
    lr_scheduler_type: Schedule = _key("shape of the learning rate over the run", "cosine")
    warmup_ratio: Annotated[float, Ge(0), Le(1)] = _key("share of all steps spent warming up", 0.03)
    warmup_steps: Annotated[int, Ge(0)] = _key("steps spent warming up; overrides warmup_ratio unless 0", 0)

    logging_steps: Annotated[int, Ge(1)] = _key("steps between two lines of log.jsonl", 10)
    eval_steps: Annotated[int, Ge(0)] = _key(
        "steps between two evaluations; 0 evaluates before and after training only", 50
    )
    save_steps: Annotated[int, Ge(0)] = _key("steps between two resumable checkpoints; 0 writes none", 50)
    save_total_limit: Annotated[int, Ge(1)] | None = _key("how many checkpoints to keep; null keeps all", 2)
    load_best_model_at_end: bool = _key("keep the best evaluated adapter instead of the last", False)
    metric_for_best_model: str = _key(
        "what best means: loss (lower is better) or a metric of the task (higher is better)", "loss"
    )
    early_stopping_patience: Annotated[int, Ge(1)] | None = _key(
        "stop after this many evaluations without improvement", None
    )

    seed: Annotated[int, Ge(0), Lt(2**63)] = _key("decides initialisation, data order and dropout", 42)
    dtype: Dtype = _key("compute dtype; auto is bfloat16 where this machine is fast at it, else float32", "auto")
    output_dir: str = _key("the run folder; by default runs/<data>-<method>", "")

    @property
    def peak_rate(self) -> float:
        """The learning rate of a resolved recipe."""
        assert self.learning_rate is not None, "as_recipe resolves it"
        return self.learning_rate


GROUPS: Mapping[str, type] = {"data": DataRecipe, "preference": PreferenceRecipe}
"""The keys that hold keys of their own."""


def recipe_fields(cls: type = Recipe, prefix: str = "") -> Iterator[tuple[str, Any, Field[Any]]]:
    """Every leaf of the recipe as (dotted key, type with its bounds, dataclass field), in the order in which they are declared."""
    hints = get_type_hints(cls, include_extras=True)
    for item in fields(cls):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            yield from recipe_fields(cast(type, kind), f"{prefix}{item.name}.")
        else:
            yield prefix + item.name, kind, item


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
    merge_values(values, overrides or {})
    return as_recipe(values, source="" if path is None else str(path), also=also)


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
    if isinstance(values.get("data"), str):  # `data: rows.jsonl`, as `--data rows.jsonl`
        values["data"] = {"train": values["data"]}
    parsed, problems, wrong = _parse(values)
    problems += [text for keys, text in _impossible(parsed) if not wrong.intersection(keys)]
    if check_method and not wrong.intersection(("method", "method_config")):
        over, steps = tuple(parsed.adapters), parsed.max_steps
        options, method_problems = _method_options(parsed.method, parsed.method_config, over, steps)
        problems += method_problems
        parsed = dataclasses.replace(parsed, method_config=options)
    if problems:
        inside = [f"{source}: {text}" if source else text for text in problems]
        raise IngraftError(*inside, *(also(parsed) if also is not None else ()))
    if parsed.learning_rate is None:
        parsed = dataclasses.replace(parsed, learning_rate=record(parsed.method).learning_rate)
    if not parsed.output_dir:
        parsed = dataclasses.replace(parsed, output_dir=f"runs/{_stem(parsed.data.train)}-{parsed.method}")
    return parsed


def to_yaml(recipe: Recipe) -> str:
    """The recipe with every key spelled out; `load_recipe` reads it back to an equal object."""
    return dump(dataclasses.asdict(recipe))


def merge_values(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Lay `overrides` (dotted keys, or mappings inside mappings) over `values` in place."""
    if isinstance(values.get("data"), str):  # `data: rows.jsonl`, as `--data rows.jsonl`
        values["data"] = {"train": values["data"]}
    if "method" in overrides and overrides["method"] != values.get("method", overrides["method"]):
        values.pop("method_config", None)
    for key, value in overrides.items():
        if key == "data" and isinstance(value, str):
            key = "data.train"
        _put(values, key, value)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, making the mappings on the way and replacing what is in the way."""
    *parents, last = key.split(".")
    for name in parents:
        inner = values.get(name)
        values[name] = inner = dict(cast(dict[str, Any], inner)) if isinstance(inner, dict) else {}
        values = cast(dict[str, Any], inner)
    if isinstance(value, Mapping) and isinstance(values.get(last), dict):
        for name, item in cast(Mapping[str, Any], value).items():
            _put(cast(dict[str, Any], values[last]), str(name), item)
    else:
        values[last] = value


@cache
def _adapter() -> TypeAdapter[Recipe]:
    """pydantic's validator of these dataclasses. They stay plain dataclasses for whoever holds one; only reading is pydantic's."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    for group in GROUPS.values():
        with_config(config)(group)
    return TypeAdapter(with_config(config)(Recipe))


def _parse(values: dict[str, Any]) -> tuple[Recipe, list[str], set[str]]:
    """Types and names. Returns what could be understood (defaults elsewhere), the problems and the dotted keys they concern."""
    from pydantic import ValidationError

    known = [key for key, _, _ in recipe_fields()] + list(GROUPS)
    known_set = set(known)
    problems: dict[str, str] = {}
    remaining = plain(values)
    for key, kind, _ in recipe_fields():  # Python counts true as 1, and pydantic with it
        *parents, last = key.split(".")
        inside: Any = remaining
        for name in parents:
            inside = inside.get(name) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and isinstance(inside.get(last), bool) and _is_number(kind):
            problems[key] = f"{key}: should be a number, got {inside.pop(last)!r}."
    # A round removes each key found wrong and reads again, so that the rest is still checked; required keys get a placeholder.
    for _ in range(3):
        try:
            return _adapter().validate_python(remaining), list(problems.values()), set(problems)
        except ValidationError as error:
            found = error.errors(include_url=False)
        for item in found:
            path = [str(part) for part in item["loc"]]
            key = next(
                (joined for n in range(len(path), 0, -1) if (joined := ".".join(path[:n])) in known_set),
                ".".join(path[:2]),
            )
            if item["type"] == "unexpected_keyword_argument":
                key = ".".join(path)
            problems.setdefault(key, _sentence(key, item, known))
            _drop(remaining, key)
            if key == "data":
                _put(remaining, "data", {"train": ""})
                if item["type"] == "missing":
                    problems["data.train"] = problems.pop("data").replace("data:", "data.train:", 1)
            elif key in ("model", "data.train"):
                _put(remaining, key, "")
    raise AssertionError(f"recipe did not settle: {problems}")


def _is_number(kind: Any) -> bool:
    """Whether a field's type has numbers and no true or false."""
    from ingraft.methods.config import leaves

    found = set(leaves(kind))
    return bool(found & {int, float}) and bool not in found


def _drop(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        values = cast(dict[str, Any], values.get(name, {}))
    values.pop(last, None)


def _sentence(key: str, item: Mapping[str, Any], known: list[str]) -> str:
    """One pydantic finding as a sentence for the user."""
    kind, got = item["type"], item["input"]
    if kind == "unexpected_keyword_argument":
        last = key.rsplit(".", 1)[-1]
        if last in _KEYBOARD_ONLY:
            return f"{key}: only the command line may say this (--{last.replace('_', '-')}): {_KEYBOARD_ONLY[last]}."
        elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == last]
        hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(key, known, count=1 if "." in key else 2)
        return f"{key}: there is no such key{hint}."
    if kind in ("missing", "missing_keyword_only_argument"):
        flag = "data" if key in ("data", "data.train") else key.replace("_", "-")
        return f"{key}: is needed and was not given; add it to the recipe or pass --{flag}."
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", str(item["ctx"]["expected"]))
        return f"{key}: {got!r} is none of {', '.join(allowed)}{nearest(str(got), allowed)}."
    message = str(item["msg"]).removeprefix("Input ").replace("valid ", "").replace(" a integer", " an integer")
    message = message.split(", unable to")[0]
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}."


def _impossible(recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
    """Settings that are well-formed alone and wrong together, as (keys concerned, sentence)."""
    held_out = recipe.data.eval
    if recipe.task not in READY_TASKS:
        yield ("task",), f"task: {recipe.task!r} comes later; today {', '.join(READY_TASKS)} work."
    if isinstance(held_out, bool) or (isinstance(held_out, float) and not 0 <= held_out < 1):
        text = "is a share in [0, 1), a whole number of rows or a file"
        yield ("data.eval",), f"data.eval: {text}, got {held_out!r}."
    elif isinstance(held_out, int) and held_out < 0:
        yield ("data.eval",), f"data.eval: a number of rows cannot be negative, got {held_out!r}."
    if not recipe.data.train.strip():
        yield ("data.train",), "data.train: names no file."
    if not recipe.model.strip():
        yield ("model",), "model: names no base; `ingraft models` lists the ones at hand."
    if recipe.reference_adapter is not None and recipe.task not in REFERENCE_TASKS:
        text = f"only {', '.join(REFERENCE_TASKS)} compare with another adapter, and task is {recipe.task!r}; leave it out."
        yield ("reference_adapter", "task"), f"reference_adapter: {text}"
    if recipe.cache_frozen and recipe.task in ("reward", *REFERENCE_TASKS):
        text = f"rows of task {recipe.task!r} are several sequences each, whose states are not kept; leave it false."
        yield ("cache_frozen", "task"), f"cache_frozen: {text}"
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
    ):
        if asked and not held_out:
            yield (key, "data.eval"), f"{key}: needs rows to evaluate on; data.eval is {held_out!r}."
        if asked and not recipe.eval_steps:
            yield (key, "eval_steps"), f"{key}: needs evaluations during training; eval_steps is 0."


def _method_options(
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


def _stem(data: str) -> str:
    """A short name for a data source, fit for a folder: `/x/reviews.jsonl.gz` -> `reviews`."""
    name = Path(data.rstrip("/")).name.split(".")[0]
    return re.sub(r"[^\w-]+", "-", name) or "run"
