"""From an adapter's folder to base and adapter in one call."""

from __future__ import annotations

import os
from typing import Any

from ingraft.adapt.files.peft_heads import task_named
from ingraft.errors import IngraftError
from ingraft.peft.configs import PeftConfig
from ingraft.peft.hub import folder_of
from ingraft.peft.model import PeftModel

_HUB = ("subfolder", "revision", "token", "cache_dir", "local_files_only")


def _class_name(config: PeftConfig) -> str:
    """The base's class as the file calls it, where it has no task. It is only a name here: nothing is imported by it."""
    name = (config.auto_mapping or {}).get("base_model_class")
    return name if isinstance(name, str) else ""


class AutoPeftModel:
    """Loads the base an adapter names, and the adapter into it. `AutoPeftModel` itself takes the class from the adapter's task."""

    auto_class: str | None = None
    """Name of the class in transformers that loads the base."""

    _BY_TASK = {
        "CAUSAL_LM": "AutoModelForCausalLM",
        "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
        "SEQ_CLS": "AutoModelForSequenceClassification",
        "TOKEN_CLS": "AutoModelForTokenClassification",
        "QUESTION_ANS": "AutoModelForQuestionAnswering",
        "FEATURE_EXTRACTION": "AutoModel",
    }

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        **options: Any,
    ) -> Any:
        """Base and adapter.

        Args:
            options: `subfolder` and what the hub needs go to finding the adapter; `allow_base_mismatch` to loading it; the rest
                (`dtype`, `num_labels`, `device_map`, ...) to the base's `from_pretrained`.

        Raises:
            IngraftError: no adapter there, no base named in it, or everything in which they differ.
        """
        import transformers

        folder = folder_of(pretrained_model_name_or_path, **{key: options.pop(key) for key in _HUB if key in options})
        config = config or PeftConfig.from_pretrained(folder)
        if not config.base_model_name_or_path:
            raise IngraftError(
                f"{folder}: does not say which base it belongs to; load the base yourself and use PeftModel.from_pretrained."
            )
        task = getattr(config.task_type, "value", config.task_type) or task_named(_class_name(config))
        wanted = cls.auto_class or cls._BY_TASK.get(str(task), "AutoModel")
        allow = bool(options.pop("allow_base_mismatch", False))
        base = getattr(transformers, wanted).from_pretrained(config.base_model_name_or_path, **options)
        return PeftModel.from_pretrained(base, folder, adapter_name, is_trainable, allow_base_mismatch=allow)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """A causal language model."""

    auto_class = "AutoModelForCausalLM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """An encoder-decoder."""

    auto_class = "AutoModelForSeq2SeqLM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """A classifier."""

    auto_class = "AutoModelForSequenceClassification"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """A tagger."""

    auto_class = "AutoModelForTokenClassification"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """An extractive question answerer."""

    auto_class = "AutoModelForQuestionAnswering"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """A model without a head."""

    auto_class = "AutoModel"
