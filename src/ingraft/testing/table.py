"""The table of methods: the options each is tried with under the laws.

A new method costs one entry in `_OPTIONS`. Which subjects it may be tried on follows from its kind of part and from what it refuses
(`why_not` in `cases.py`); only what those cannot know stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ingraft.methods import registry
from ingraft.methods.contract import MethodConfig


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method in the table.

    Attributes:
        config: the options it is tried with everywhere.
        elsewhere: other options on some subjects, by name.
        dropout: the name of its dropout option, None if it has none.
        companions: adapters that one of this method acts on, by name; they are attached, and do not act by themselves, wherever the laws
            speak of the base.
        equation: changes a bare base as the method's equation says, given the adapter's tensors by path: the reference of law 22 for a method
            that the package does not know.
        inexact: why its backward is not the derivative of its forward, None if it is.
    """

    config: MethodConfig
    elsewhere: Mapping[str, MethodConfig] = field(default_factory=dict[str, MethodConfig])
    dropout: str | None = None
    inexact: str | None = None
    companions: Mapping[str, MethodConfig] = field(default_factory=dict[str, MethodConfig])
    equation: Callable[[Mapping[str, Tensor], nn.Module], None] | None = None


_OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 12},
    "dora": {"r": 4, "lora_alpha": 12},
    "loha": {"r": 2, "alpha": 12},
    "lokr": {"r": 2, "alpha": 3},
    "vera": {"r": 6, "d_initial": 0.7},
    "randlora": {"r": 4, "randlora_alpha": 8},
    "fourierft": {"n_frequency": 60, "scaling": 60.0},
    "c3a": {"block_size": 4},
    "shira": {"r": 2},
    "miss": {"r": 4},
    "hira": {"r": 6},
    "vblora": {"r": 2, "num_vectors": 6, "vector_length": 4, "init_vector_bank_bound": 0.5},
    "gralora": {"r": 4, "alpha": 8},
    "rslora": {"r": 4, "lora_alpha": 6},
    "lora-plus": {"r": 4, "lora_alpha": 12},
    "pissa": {"r": 3, "lora_alpha": 6},
    "olora": {"r": 3, "lora_alpha": 3},
    "loftq": {"r": 3, "lora_alpha": 6},
    "eva": {"r": 3, "lora_alpha": 6},
    "lora-fa": {"r": 4, "lora_alpha": 12},
    "adalora": {"init_r": 4, "target_r": 2, "lora_alpha": 40, "total_step": 20},
    "oft": {"oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 2},
    "road": {"group_size": 4},
    "ia3": {},
    "bitfit": {},
    "ln-tuning": {},
    "freeze": {"num_layers_trainable": 1},
    "trainable-tokens": {"token_indices": [3, 14, 16, 19, 20, 25, 45, 47]},
    "full": {},
    "houlsby": {"reduction_factor": 4.0},
    "pfeiffer": {"reduction_factor": 4.0},
    "parallel": {"reduction_factor": 4.0, "scaling": 2.0},
    "compacter": {"reduction_factor": 4.0, "phm_dim": 2},
    "reft": {"r": 3, "positions": "f2+l1"},
    "fusion": {"adapters": ["one", "two"]},
    "routing": {"adapters": ["one", "two"], "temperature": 0.8},
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "p-tuning-v2": {"num_virtual_tokens": 3},
    "llama-adapter": {"adapter_len": 3},
    "multitask-prompt": {"num_virtual_tokens": 3, "num_tasks": 2, "num_ranks": 2},
    "p-tuning": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
}
"""The options each method is tried with."""

_ELSEWHERE: dict[str, dict[str, dict[str, Any]]] = {
    # A kernel of 3 x 3 over one input has nine entries.
    "oft": {"conv2d-groups": {"oft_block_size": 3}},
    "boft": {"conv2d-groups": {"boft_block_size": 3}, "t5": {"boft_block_size": 8}, "vit": {"boft_block_size": 8}},
    # No blocks to count.
    "freeze": {
        "embedding": {"target_modules": ["plain"]},
        **{
            name: {"target_modules": ["second"]}
            for name in ("linear", "conv1d-transposed", "conv2d", "conv2d-groups", "conv1d", "conv3d")
        },
    },
    "trainable-tokens": {"embedding": {"target_modules": ["plain", "rescaled"]}},
    # A Llama and a T5 have no biases.
    "bitfit": {
        **{name: {"add_bias": True} for name in ("llama", "mixtral", "t5")},
        **{
            name: {"add_bias": True, "target_modules": ["first", "second"]}
            for name in ("linear", "conv2d", "conv2d-groups")
        },
    },
}

_DROPOUT = {
    "lora": "lora_dropout",
    **dict.fromkeys(
        ("dora", "rslora", "lora-plus", "pissa", "olora", "loftq", "eva", "lora-fa", "adalora"), "lora_dropout"
    ),
    "houlsby": "dropout",
    "pfeiffer": "dropout",
    "parallel": "dropout",
    "compacter": "dropout",
    "reft": "dropout",
    "fusion": "dropout",
    **{name: f"{name}_dropout" for name in ("vera", "randlora", "miss", "vblora")},
}


_INEXACT = {
    "dora": "its norm is held constant in backward (section 4.3 of the paper); law 22 compares its gradients with PEFT's"
}


_COMPANIONS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "fusion": {
        "one": ("pfeiffer", {"reduction_factor": 4.0}),
        "two": ("pfeiffer", {"reduction_factor": 2.0, "non_linearity": "tanh"}),
    },
    "routing": {
        "one": ("lora", {"r": 4, "lora_alpha": 12}),
        "two": ("lora", {"r": 2}),
    },
}


def row(name: str) -> Row:
    """The table's row for a method, made when asked for, since it imports the method's file."""
    options = _OPTIONS[name]
    return Row(
        config=registry.make_config(name, options),
        elsewhere={
            where: registry.make_config(name, {**options, **other}) for where, other in _ELSEWHERE.get(name, {}).items()
        },
        dropout=_DROPOUT.get(name),
        inexact=_INEXACT.get(name),
        companions={
            other: registry.make_config(method, options)
            for other, (method, options) in _COMPANIONS.get(name, {}).items()
        },
    )


METHODS: tuple[str, ...] = tuple(_OPTIONS)
"""Methods of the table, in its order."""
