"""The incumbent's config classes of the methods that learn tokens: P-tuning, multi-task prompt tuning, adaption prompts."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from safetensors.torch import load_file
from torch import nn

from ingraft.errors import IngraftError
from ingraft.peft.configs import CLASSES, PeftConfig, PeftType, PromptLearningConfig, PromptTuningConfig


class PromptEncoderReparameterizationType(StrEnum):
    """What encodes a prompt."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass(kw_only=True)
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning. Fields as in the incumbent; `encoder_hidden_size` may be left out (the model's width)."""

    kind: ClassVar[PeftType | None] = PeftType.P_TUNING

    encoder_reparameterization_type: PromptEncoderReparameterizationType | str | None = (
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    encoder_dropout: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_dropout and not self.inference_mode:
            warnings.warn("PromptEncoderConfig: encoder_dropout is not applied.", stacklevel=3)


class MultitaskPromptTuningInit(StrEnum):
    """Where a multi-task prompt starts."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


@dataclass(kw_only=True)
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Multi-task prompt tuning. Fields as in the incumbent; a source is the safetensors file of another adapter of this kind."""

    kind: ClassVar[PeftType | None] = PeftType.MULTITASK_PROMPT_TUNING
    starts: ClassVar[type[StrEnum]] = MultitaskPromptTuningInit

    prompt_tuning_init: StrEnum | str = MultitaskPromptTuningInit.RANDOM
    prompt_tuning_init_state_dict_path: str | None = None
    prompt_tuning_init_task: int | None = 0
    num_ranks: int | None = 1
    num_tasks: int | None = 1


@dataclass(kw_only=True)
class AdaptionPromptConfig(PeftConfig):
    """LLaMA-Adapter. Fields as in the incumbent; `adapter_layers` may be left out (all)."""

    kind: ClassVar[PeftType | None] = PeftType.ADAPTION_PROMPT

    target_modules: str | None = None
    adapter_len: int | None = None
    adapter_layers: int | None = None

    @property
    def is_adaption_prompt(self) -> bool:
        """The incumbent's mark."""
        return True


CLASSES.update(
    {
        cls.kind.value: cls
        for cls in (PromptEncoderConfig, MultitaskPromptTuningConfig, AdaptionPromptConfig)
        if cls.kind is not None
    }
)


def source_values(config: PeftConfig) -> Callable[[Any, Mapping[str, nn.Module], nn.Module | None], None] | None:
    """What gives a new adapter the values of the source that its config names, for `attach(fill=...)`; None where it names none.

    Raises:
        IngraftError: a source that is missing or is no safetensors file.
    """
    if not isinstance(config, MultitaskPromptTuningConfig):
        return None
    how, path = config.prompt_tuning_init, config.prompt_tuning_init_state_dict_path
    if how in (MultitaskPromptTuningInit.RANDOM, MultitaskPromptTuningInit.TEXT):
        return None
    if not path or not path.endswith(".safetensors"):
        raise IngraftError(
            f"prompt_tuning_init = {how} needs prompt_tuning_init_state_dict_path, the safetensors file of an adapter; got {path!r}."
        )
    source = load_file(path)
    names = {"prompt": "prompt_embeddings", "cols": "prefix_task_cols", "rows": "prefix_task_rows"}
    if missing := [key for key in names.values() if key not in source]:
        raise IngraftError(f"{path}: holds no {', '.join(missing)}, so it is no multi-task prompt.")
    task = config.prompt_tuning_init_task or 0
    if how == MultitaskPromptTuningInit.EXACT_SOURCE_TASK and not 0 <= task < source["prefix_task_cols"].shape[0]:
        raise IngraftError(f"prompt_tuning_init_task = {task}: {path} has {source['prefix_task_cols'].shape[0]} tasks.")

    @torch.no_grad()
    def fill(adapter: Any, parts: Mapping[str, nn.Module], shared: nn.Module | None) -> None:
        del shared
        part = next(part for path, part in parts.items() if adapter.sites[path] == "input")
        for name, key in names.items():
            value, own = source[key], part.get_parameter(name)
            if name != "prompt":
                if how == MultitaskPromptTuningInit.ONLY_SOURCE_SHARED:
                    continue
                value = (
                    value[task][None]
                    if how == MultitaskPromptTuningInit.EXACT_SOURCE_TASK
                    else value.mean(0, keepdim=True)
                )
            if value.shape != own.shape:
                raise IngraftError(f"{path}: {key} has shape {list(value.shape)}; this prompt needs {list(own.shape)}.")
            own.copy_(value)

    return fill
