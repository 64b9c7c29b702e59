"""Which modules Hugging Face PEFT adapts when `target_modules` is left out, by `config.model_type`.

Facts of the incumbent (peft 0.21), kept because scripts rely on them. Natively Ingraft adapts every linear layer but the head, which trains
better; here the habit counts.
"""

from __future__ import annotations

_QV = ("q_proj", "v_proj")
_QUERY_VALUE = ("query", "value")
_FUSED = ("query_key_value",)

LORA: dict[str, tuple[str, ...] | str] = {
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("bart", "opt", "gptj", "gpt_neo", "llama", "llama4", "mistral", "mixtral", "stablelm"), _QV),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), _QV),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), _QUERY_VALUE),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "deberta-v2": ("query_proj", "value_proj"),
    "deberta": ("in_proj",),
    "mpt": ("Wqkv",),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
"""LoRA and its variants."""

_T5 = ("q", "k", "v", "o")

ADALORA: dict[str, tuple[str, ...]] = {
    "t5": (*_T5, "wi", "wo"),
    "mt5": (*_T5, "wi_0", "wi_1", "wo"),
    **dict.fromkeys(("bart", "opt"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}
"""AdaLoRA, where it differs from LoRA."""

IA3: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t5": (("k", "v"), ("wo",)),
    "mt5": (("k", "v", "wi_1"), ()),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), (("c_attn",), ("mlp.c_proj",))),
    "bloom": (_FUSED, ("mlp.dense_4h_to_h",)),
    **dict.fromkeys(("bert", "roberta"), (("key", "value"), ("output.dense",))),
    "opt": (("q_proj", "k_proj"), ("fc2",)),
    "gptj": (_QV, ("fc_out",)),
    **dict.fromkeys(("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon"), (_FUSED, ("dense_4h_to_h",))),
    "gpt_neo": (_QV, ("c_proj",)),
    **dict.fromkeys(("bart", "phi"), (_QV, ("fc2",))),
    **dict.fromkeys(("llama", "mistral"), (("k_proj", "v_proj"), ("down_proj",))),
    **dict.fromkeys(("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3"), (_QV, ("down_proj",))),
    "mixtral": (("k_proj", "v_proj"), ("w2",)),
    "deberta-v2": (("key_proj", "value_proj"), ("output.dense",)),
    "deberta": (("in_proj",), ("output.dense",)),
}
"""IA3: modules scaled at their output, and feed-forward modules scaled at their input."""

_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")
_GEMMA_NORMS = (*_NORMS[:2], "pre_feedforward_layernorm", "post_feedforward_layernorm", "norm")

LN_TUNING: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama", "mistral", "gemma"), _NORMS),
    **dict.fromkeys(("gemma2", "gemma3_text"), _GEMMA_NORMS),
    **dict.fromkeys(("bloom", "falcon"), (*_NORMS[:2], "ln_f")),
    **dict.fromkeys(("t5", "mt5"), ("layer_norm", "final_layer_norm")),
    **dict.fromkeys(("qwen2", "qwen3"), ("post_attention_layernorm",)),
    "llava": ("multi_modal_projector", *_NORMS, "embed_tokens", "lm_head"),
    "bart": ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2", "ln_f"),
    "gptj": ("ln_1", "ln_f"),
    "blip-2": ("layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"),
    "phi": ("input_layernorm", "final_layernorm"),
}
"""LN tuning, which has nothing in common with LoRA's."""

_PROJECTIONS = dict.fromkeys(("gpt2", "gpt_bigcode"), ("mlp.c_proj",))
_PHI = {"phi": _QV}

BY_TYPE: dict[str, dict[str, tuple[str, ...] | str]] = {
    "ADALORA": {**LORA, **ADALORA},
    "VBLORA": {**LORA, **ADALORA, "roberta": _QUERY_VALUE},
    "LN_TUNING": {**LN_TUNING},
    **{key: {**LORA, **_PROJECTIONS} for key in ("FOURIERFT", "C3A")},
    **{key: {**LORA, **_PHI} for key in ("SHIRA", "VERA")},
}
"""By peft_type, where it differs from LoRA."""
