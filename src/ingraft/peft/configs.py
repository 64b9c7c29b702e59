"""The incumbent's config classes: its names, its fields, its defaults.

They are what users write and read, mutable as they are used to, and nothing more: what a config means for a model is worked out by the
reader of adapter files (`adapt.peft_format`), so a script and a file are understood in one way, and what cannot be honoured is refused by
name in both.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any, ClassVar

from ingraft import durable
from ingraft.errors import IngraftError, nearest

CONFIG = "adapter_config.json"

Names = list[str] | tuple[str, ...] | set[str] | str | None


class TaskType(StrEnum):
    """What a model is for."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"


class PeftType(StrEnum):
    """The methods that both libraries have."""

    LORA = "LORA"
    ADALORA = "ADALORA"
    IA3 = "IA3"
    PREFIX_TUNING = "PREFIX_TUNING"
    PROMPT_TUNING = "PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    BOFT = "BOFT"
    C3A = "C3A"
    FOURIERFT = "FOURIERFT"
    GRALORA = "GRALORA"
    HIRA = "HIRA"
    HRA = "HRA"
    LN_TUNING = "LN_TUNING"
    LOHA = "LOHA"
    LOKR = "LOKR"
    MISS = "MISS"
    OFT = "OFT"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    SHIRA = "SHIRA"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    VBLORA = "VBLORA"
    VERA = "VERA"


@dataclass(kw_only=True)
class PeftConfig:
    """What every config has.

    Attributes:
        task_type: one of `TaskType`; a classification or question answering task has its head trained in full as well.
        auto_mapping: kept for the file format; never followed.
        base_model_name_or_path: the base; filled in when the config is used.
        revision: of the base on the hub.
        inference_mode: add the adapter frozen.
    """

    kind: ClassVar[PeftType | None] = None

    task_type: TaskType | str | None = None
    auto_mapping: dict[str, Any] | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False

    def __post_init__(self) -> None:
        known = [task.value for task in TaskType]
        if self.task_type is not None and str(getattr(self.task_type, "value", self.task_type)) not in known:
            hint = nearest(str(self.task_type), known)
            raise IngraftError(f"task_type: there is no task {self.task_type!r}{hint}. Known: {', '.join(known)}.")
        if self.task_type is not None:
            self.task_type = TaskType(self.task_type)

    @property
    def peft_type(self) -> PeftType | None:
        """The incumbent's name of the method."""
        return self.kind

    @property
    def is_prompt_learning(self) -> bool:
        """Whether the method adds virtual tokens."""
        return isinstance(self, PromptLearningConfig)

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, sets sorted."""
        values = {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}
        return values | {"peft_type": None if self.kind is None else self.kind.value}

    def save_pretrained(self, save_directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder."""
        durable.write_json(Path(save_directory) / CONFIG, self.to_dict())

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any) -> PeftConfig:
        """The config of an adapter: a folder, or the hub's id of one. See `ingraft.peft.hub.folder_of` for the options."""
        from ingraft.peft.hub import folder_of

        values = durable.read_json(folder_of(pretrained_model_name_or_path, **options) / CONFIG)
        if not isinstance(values, dict):
            raise IngraftError(f"{pretrained_model_name_or_path}: {CONFIG} is not an object with fields.")
        return from_dict(values)


@dataclass(kw_only=True)
class LoraConfig(PeftConfig):
    """LoRA and its variants, by `use_dora`, `use_rslora` and `init_lora_weights`. Fields as in the incumbent; those without effect here are
    refused unless left empty."""

    kind: ClassVar[PeftType | None] = PeftType.LORA

    r: int = 8
    target_modules: Names = None
    exclude_modules: Names = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    use_rslora: bool = False
    modules_to_save: Names = None
    init_lora_weights: bool | str = True
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict[str, int])
    alpha_pattern: dict[str, float] = field(default_factory=dict[str, float])
    megatron_config: Any = None
    megatron_core: str | None = "megatron.core"
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    loftq_config: Any = field(default_factory=dict[str, Any])
    eva_config: Any = None
    corda_config: Any = None
    lora_ga_config: Any = None
    use_dora: bool = False
    velora_config: Any = None
    alora_invocation_tokens: list[int] | None = None
    use_qalora: bool = False
    qalora_group_size: int = 16
    monteclora_config: Any = None
    layer_replication: list[tuple[int, int]] | None = None
    lora_bias: bool = False
    target_parameters: list[str] | None = None
    use_bdlora: Any = None
    arrow_config: Any = None
    kasa_config: Any = None
    ensure_weight_tying: bool = False


@dataclass(kw_only=True)
class IA3Config(PeftConfig):
    """IA3. Fields as in the incumbent."""

    kind: ClassVar[PeftType | None] = PeftType.IA3

    target_modules: Names = None
    exclude_modules: Names = None
    feedforward_modules: Names = None
    fan_in_fan_out: bool = False
    modules_to_save: Names = None
    init_ia3_weights: bool = True


@dataclass(kw_only=True)
class PromptLearningConfig(PeftConfig):
    """What prompt and prefix tuning share. Sizes of the model need not be given."""

    num_virtual_tokens: int | None = None
    token_dim: int | None = None
    num_transformer_submodules: int | None = None
    num_attention_heads: int | None = None
    num_layers: int | None = None
    modules_to_save: Names = None


@dataclass(kw_only=True)
class PrefixTuningConfig(PromptLearningConfig):
    """Prefix tuning. Fields as in the incumbent."""

    kind: ClassVar[PeftType | None] = PeftType.PREFIX_TUNING

    init_weights: str | None = None
    encoder_hidden_size: int | None = None
    prefix_projection: bool = False


class PromptTuningInit(StrEnum):
    """Where a prompt starts."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass(kw_only=True)
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning. Fields as in the incumbent; TEXT needs `prompt_tuning_init_text` and `tokenizer_name_or_path`."""

    kind: ClassVar[PeftType | None] = PeftType.PROMPT_TUNING
    starts: ClassVar[type[StrEnum]] = PromptTuningInit

    prompt_tuning_init: StrEnum | str = PromptTuningInit.RANDOM
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [start.value for start in self.starts]
        if self.prompt_tuning_init not in known:
            raise IngraftError(
                f"prompt_tuning_init must be one of {', '.join(known)}, got {self.prompt_tuning_init!r}."
            )
        self.prompt_tuning_init = self.starts(self.prompt_tuning_init)
        if str(self.prompt_tuning_init) == "TEXT" and not (
            self.prompt_tuning_init_text and self.tokenizer_name_or_path
        ):
            raise IngraftError("prompt_tuning_init = TEXT needs prompt_tuning_init_text and tokenizer_name_or_path.")


CLASSES: dict[str, type[PeftConfig]] = {
    cls.kind.value: cls
    for cls in (LoraConfig, IA3Config, PrefixTuningConfig, PromptTuningConfig)
    if cls.kind is not None
}


def from_dict(values: Mapping[str, Any]) -> PeftConfig:
    """The config of a dictionary with a `peft_type`; fields that the class does not have are dropped with a warning, as the incumbent does.

    A type that the incumbent does not have gives a plain `PeftConfig`.
    """
    kind = values.get("peft_type")
    cls = CLASSES.get(str(getattr(kind, "value", kind)), PeftConfig)
    known = {f.name for f in dataclasses.fields(cls)}
    if cls is not PeftConfig:
        unknown = sorted(
            name for name, value in values.items() if name not in known | {"peft_type", "peft_version"} and value
        )
        if unknown:
            warnings.warn(f"{cls.__name__} has no fields {', '.join(unknown)}; they are ignored.", stacklevel=2)
    return cls(**{name: value for name, value in values.items() if name in known})


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """The incumbent's name for `from_dict`."""
    return from_dict(config_dict)


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return list(value) if isinstance(value, tuple) else value
