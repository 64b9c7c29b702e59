"""The names of Hugging Face PEFT with its meaning, over Ingraft: `from peft import X` becomes `from ingraft.peft import X`.

What differs, because the incumbent's behaviour is a defect or a silence: names in a config that match nothing are reported, an option that has
no effect here is refused by name, adapters that were frozen stay frozen, `unload` gives the base back as it was, and files go through the same
checks as `ingraft.load`'s.
"""

from __future__ import annotations

from ingraft.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from ingraft.peft.configs import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    get_peft_config,
)
from ingraft.peft.lora_configs import AdaLoraConfig, EvaConfig, LoftQConfig, initialize_lora_eva_weights
from ingraft.peft.model import (
    LoraModel,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
    get_peft_model,
    inject_adapter_in_model,
)
from ingraft.peft.soft_configs import (
    AdaptionPromptConfig,
    MultitaskPromptTuningConfig,
    MultitaskPromptTuningInit,
    PromptEncoderConfig,
    PromptEncoderReparameterizationType,
)
from ingraft.peft.state import get_peft_model_state_dict, prepare_model_for_kbit_training, set_peft_model_state_dict

__all__ = [
    "AdaLoraConfig",
    "AdaptionPromptConfig",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
    "EvaConfig",
    "IA3Config",
    "LoftQConfig",
    "LoraConfig",
    "LoraModel",
    "MultitaskPromptTuningConfig",
    "MultitaskPromptTuningInit",
    "PeftConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction",
    "PeftModelForQuestionAnswering",
    "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification",
    "PeftModelForTokenClassification",
    "PeftType",
    "PrefixTuningConfig",
    "PromptEncoderConfig",
    "PromptEncoderReparameterizationType",
    "PromptLearningConfig",
    "PromptTuningConfig",
    "PromptTuningInit",
    "TaskType",
    "get_peft_config",
    "get_peft_model",
    "get_peft_model_state_dict",
    "initialize_lora_eva_weights",
    "inject_adapter_in_model",
    "prepare_model_for_kbit_training",
    "set_peft_model_state_dict",
]
