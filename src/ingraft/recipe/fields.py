"""The keys of a recipe, their types, defaults and meaning. The command line's options and the document of keys are made from them.

Keys not explained otherwise mean what they mean in transformers' `TrainingArguments`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Annotated, Any, Literal, cast, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

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
