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

SAMPLING_TASKS = ("ppo", "grpo")
"""Those that learn from answers which the model itself samples."""
READY_TASKS = (
    *("sft", "lm", "seq2seq", "classify", "image-classify", "multi-label", "regress", "tag", "qa", "embed"),
    *("reward", "dpo", "ipo", "kto"),
    *SAMPLING_TASKS,
)
IMAGE_TASKS = ("image-classify", "diffusion")
"""Those whose rows are pictures and no tokens."""
REFERENCE_TASKS = ("dpo", "ipo", "kto", *SAMPLING_TASKS)
"""Those that compare a policy with the one it was at first."""


def _key(help: str, default: Any = MISSING, *, factory: Any = MISSING) -> Any:
    """A recipe field: its meaning for `--help`, and its default unless it is required."""
    return field(default=default, default_factory=factory, metadata={"help": help})


@dataclass(frozen=True, kw_only=True)
class Source:
    """One of several files.

    Attributes:
        file: as the user named it.
        weight: its share of the rows of an epoch, relative to the others'; None where files are taken as they are.
        format: of its rows; None takes data.format.
    """

    file: str
    weight: float | None = None
    format: str | None = None


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Where the rows come from and how they become what a model reads."""

    train: str | list[Source] = _key(
        "training rows: a file (jsonl, json, csv, tsv, parquet, txt, also .gz; npz of pictures), a folder of class folders with pictures, a datasets folder or a hub id; or several, each with a weight if wanted "
        "(FILE=2), its share of an epoch relative to the others'"
    )
    eval: float | int | str | list[Source] = _key(
        "rows to evaluate on: a share of train (0.1), a number of rows (100), a file or several, or 0 for none", 0.1
    )
    test: str | list[Source] | None = _key("a file of rows scored once, after training, or several", None)
    format: str = _key("row format; auto detects it from the rows", "auto")
    learn: Literal["answer", "all"] = _key("which tokens the loss counts: the answers, or every token", "answer")
    max_length: Annotated[int, Ge(2)] = _key("longest sequence in tokens; longer rows are cut", 512)
    truncation: Literal["keep_answer", "keep_start", "keep_end", "drop", "refuse"] = _key(
        "what becomes of longer rows: the middle of the prompt goes, so that answers stay whole; the end goes; the beginning goes; they are left out; or "
        "the run does not start",
        "keep_answer",
    )
    stride: Annotated[int, Ge(0)] = _key(
        "qa: tokens that neighbouring windows of a context share which is longer than max_length", 128
    )
    packing: bool = _key(
        "lay the rows of a forward pass end to end, so that nothing is padded; what is learned is the same", False
    )

    @property
    def named(self) -> str:
        """The training files as a person names them."""
        return ", ".join(source.file for source in sources_of(self.train))

    @property
    def files(self) -> list[str]:
        """Every file that is named."""
        return [s.file for v in (self.train, self.eval, self.test) if isinstance(v, str | list) for s in sources_of(v)]


def sources_of(value: str | list[Source]) -> list[Source]:
    """One file or several, as several."""
    return [Source(file=value)] if isinstance(value, str) else value


@dataclass(frozen=True, kw_only=True)
class MetaRecipe:
    """How an adapter becomes one to start from (several files in data.train, each a task)."""

    inner_steps: Annotated[int, Ge(0)] = _key(
        "Reptile: steps on one file, after which the adapter goes part of the way from where it was; 0 trains as usual",
        0,
    )
    step_size: Annotated[float, Gt(0), Le(1)] = _key(
        "the part of the way in the first round; it falls evenly to 0", 1.0
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
class RlRecipe:
    """How a policy learns from its own answers (tasks ppo and grpo)."""

    reward_pattern: str | None = _key(
        "a regular expression with one group: an answer that it matches earns format_weight, and correct_weight more where the group is what "
        "it finds in the row's own answer",
        None,
    )
    format_weight: float = _key("reward of an answer that reward_pattern matches", 0.5)
    correct_weight: float = _key("further reward where the group is the expected one", 1.0)
    num_generations: Annotated[int, Ge(0)] = _key("answers to a prompt; 0 takes 1 for ppo and 4 for grpo", 0)
    max_new_tokens: Annotated[int, Ge(1)] = _key("longest answer, in tokens", 64)
    missing_eos_penalty: Annotated[float, Ge(0)] = _key("taken off the reward of an answer that did not end", 0.0)
    num_epochs: Annotated[int, Ge(1)] = _key("passes over the answers of a rollout", 1)
    num_mini_batches: Annotated[int, Ge(1)] = _key("optimiser steps in a pass over a rollout", 1)
    kl_coef: Annotated[float, Ge(0)] = _key("price of a nat of distance from the reference", 0.05)
    kl_target: Annotated[float, Gt(0)] | None = _key(
        "ppo: distance in nats an answer that kl_coef is moved to keep; null leaves it fixed", None
    )
    kl_horizon: Annotated[int, Ge(1)] = _key("ppo: answers in which kl_coef may change by a fifth", 1000)
    clip_range: Annotated[float, Gt(0), Lt(1)] = _key("how far the ratio of new to old may fall below 1", 0.2)
    clip_range_high: Annotated[float, Gt(0)] | None = _key("how far above 1; null as clip_range", None)
    clip_range_value: Annotated[float, Gt(0)] = _key("ppo: how far a value may move in a rollout", 0.2)
    gamma: Annotated[float, Gt(0), Le(1)] = _key("ppo: discount a token", 1.0)
    lam: Annotated[float, Ge(0), Le(1)] = _key("ppo: lambda of generalised advantages", 0.95)
    whiten_advantages: bool = _key("ppo: advantages of a rollout get mean 0 and variance 1", True)
    scale_rewards: bool = _key("grpo: divide by the standard deviation of a prompt's rewards", True)


@dataclass(frozen=True, kw_only=True)
class EmbedRecipe:
    """How texts that belong together become a loss (task embed)."""

    temperature: Annotated[float, Gt(0)] = _key(
        "cosines are divided by it; the smaller, the more the nearest wrong text counts", 0.05
    )
    symmetric: bool = _key("pairs: also find each query by its match among the queries of the step", False)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Settings of losses that only some tasks have; the usual ones where nothing is said."""

    preference: PreferenceRecipe = PreferenceRecipe()
    rl: RlRecipe = RlRecipe()
    embed: EmbedRecipe = EmbedRecipe()


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training run. Build it through `as_recipe` or `load_recipe`, which check it; the fields carry their help text."""

    model: str = _key("the base: a name from `ingraft models`, a hub id, a folder or a .gguf file")
    quantization: Quantization = _key(
        "how the frozen base is held in memory: nf4, int8, keep (a GGUF's own blocks) or none (dense)", "none"
    )
    task: Task = _key(
        "what is learned: sft (answers), lm (plain text), seq2seq (answers of a decoder behind an encoder), classify (a label), image-classify (the label of a picture), multi-label (several), regress (a number), tag (a tag a word), "
        "qa (the passage that answers a question), embed (vectors, near where texts belong together), reward (which answer is better), dpo, ipo, kto (to give the better one), or ppo, grpo (what "
        "earns a reward)",
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
        "dpo, ipo, kto, ppo, grpo: the adapter that the policy is compared with; null takes init_adapter, else the base alone",
        None,
    )
    preference: PreferenceRecipe = _key("see the preference.* keys", factory=PreferenceRecipe)
    reward_adapter: str | None = _key("ppo, grpo: the run folder of a reward model over the same base", None)
    reward_function: str | None = _key(
        "ppo, grpo: file.py:name, a Python function from (prompts, answers, expected, rows) to a list of numbers", None
    )
    rl: RlRecipe = _key("see the rl.* keys", factory=RlRecipe)
    embed: EmbedRecipe = _key("see the embed.* keys", factory=EmbedRecipe)
    meta: MetaRecipe = _key("see the meta.* keys", factory=MetaRecipe)

    learning_rate: Annotated[float, Gt(0)] | Literal["auto"] | None = _key(
        "peak learning rate; null takes the method's own, see `ingraft methods`; auto looks for it ahead of the first step",
        None,
    )
    optim: Literal["adamw_torch", "adamw_8bit"] = _key(
        "optimiser: AdamW, or AdamW with its state in 8 bits (CUDA, bitsandbytes)", "adamw_torch"
    )
    weight_decay: Annotated[float, Ge(0)] = _key("decoupled weight decay of AdamW", 0.0)
    adam_beta1: Annotated[float, Ge(0), Lt(1)] = _key("AdamW's decay of the mean", 0.9)
    adam_beta2: Annotated[float, Ge(0), Lt(1)] = _key("AdamW's decay of the variance", 0.999)
    adam_epsilon: Annotated[float, Gt(0)] = _key("AdamW's epsilon", 1e-8)
    max_grad_norm: Annotated[float, Ge(0)] = _key("clip gradients to this norm; 0 does not clip", 1.0)

    neftune_noise_alpha: Annotated[float, Gt(0)] | None = _key(
        "noise on the embeddings of what is read while training, at most this over the root of tokens times width (NEFTune); 5 to 15 are usual",
        None,
    )

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
    eval_samples: Annotated[int, Ge(0)] = _key(
        "rows that are also answered at every evaluation, into log and report (three are before and after training)", 0
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
    def losses(self) -> Losses:
        """The settings of losses, by themselves."""
        return Losses(preference=self.preference, rl=self.rl, embed=self.embed)


GROUPS: Mapping[str, type] = {
    "data": DataRecipe,
    "preference": PreferenceRecipe,
    "rl": RlRecipe,
    "embed": EmbedRecipe,
    "meta": MetaRecipe,
}
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
