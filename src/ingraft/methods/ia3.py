"""IA3: one trained factor for every key, value and feed-forward activation.

    keys, values:          W' = diag(l) W,  b' = l b
    feed-forward's output: W' = W diag(l)   (the factor acts on the layer's input)

Paper: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning", NeurIPS 2022
(arXiv:2205.05638), section 3.3.
Read against: Hugging Face PEFT's `ia3`.
What differs: keys, values and feed-forward layers are found by structure where no names are given; several IA3 adapters multiply.

Legend: O out, I columns of the weight; in a convolution G groups of C channels each, K entries of the kernel (elsewhere G = K = 1).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.adapterhub import factored
from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, tuple_of_names
from ingraft.methods.layout import HubLayout

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")


@dataclass(frozen=True, kw_only=True)
class IA3Config(MethodConfig):
    """IA3's hyperparameters.

    Attributes:
        feedforward_modules: which of `target_modules`, by name, are scaled at their input; without names of your own, the last
            projection of every MLP.
    """

    method: ClassVar[str] = "ia3"

    feedforward_modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "feedforward_modules", tuple_of_names(self.feedforward_modules))
        super().__post_init__()

    def idle(self, paths: Iterable[str]) -> list[str]:
        known = list(paths)
        return super().idle(known) + [
            f"feedforward_modules: {name!r} matches none of the adapted modules; name the ones to scale at their input as in target_modules."
            for name in self.feedforward_modules
            if not any(means(name, path) for path in known)
        ]


class IA3(ShortcutPart):
    """See the file's header."""

    composition = "chain"
    stacks: ClassVar[Mapping[str, int | None] | None] = {"l": None}
    neutral = 1.0

    def __init__(self, config: IA3Config, facts: SiteFacts) -> None:
        super().__init__()
        self.on_input, self.groups = on_input(facts), groups_and_inputs(facts)[0]
        self.l = nn.Parameter(torch.ones(count(config, facts), device=facts.matrix().device))

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        factor = self.l.to(W.dtype)
        if not self.on_input:
            return W * factor[:, None], self.bias(b)
        factor_G1C1 = factor.reshape(self.groups, 1, -1, 1)
        W_GOCK = W.reshape(self.groups, W.shape[0] // self.groups, factor_G1C1.shape[2], -1)
        return (W_GOCK * factor_G1C1).reshape(W.shape), b

    def before(self, x: Tensor, site: Site) -> Tensor:
        return x * site.inp(self.l.to(x.dtype)) if self.on_input else x

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y if self.on_input else y * site.out(self.l.to(y.dtype))

    def bias(self, b: Tensor | None) -> Tensor | None:
        return b if b is None or self.on_input else b * self.l.to(b.dtype)


def on_input(facts: SiteFacts) -> bool:
    """Whether the factors are one an input; a lookup has no input to scale."""
    return facts.role == "mlp-out" and facts.kind in ("linear", "conv1d-transposed", *CONVOLUTIONS)


def groups_and_inputs(facts: SiteFacts) -> tuple[int, int]:
    """Groups and inputs of a layer. A convolution's inputs are channels; its columns are those of a group, entry by entry of the kernel."""
    layer: object = facts.module
    convolves = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    return (layer.groups, layer.in_channels) if convolves else (1, facts.shape[1])


def means(name: str, path: str) -> bool:
    """Whether a listed name means this module."""
    return path == name or path.endswith("." + name)


def role(config: IA3Config, path: str) -> str:
    """Which modules named by the user are feed-forward ones."""
    return "mlp-out" if any(means(name, path) for name in config.feedforward_modules) else "weight"


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """One factor for every output, or for every input of a feed-forward layer."""
    del config
    return groups_and_inputs(facts)[1] if on_input(facts) else facts.shape[0]


def read_hub(settings: Mapping[str, Any]) -> IA3Config | None:
    """From AdapterHub's settings, where it is a LoRA of rank 1 that scales, at the outputs of the modules it names."""
    alike = factored(settings, "scale") and settings["r"] == settings["alpha"] == 1
    return IA3Config() if alike else None


METHOD = Method(
    name="ia3",
    config=IA3Config,
    part=IA3,
    sites=("attention-kv", "mlp-out"),
    identity_at_init=True,
    count=count,
    role=role,
    hub=HubLayout(read=read_hub, tensors={"lora_B": "l"}, by_module=True),
    peft=PeftLayout(
        peft_type="IA3",
        ignored=("init_ia3_weights",),
        role_fields={"feedforward_modules": "mlp-out"},
        transposed_field="fan_in_fan_out",
        tensors={"l": "ia3_l"},
        # It has no convolutions of one dimension.
        shapes={"l": {"": (-1, 1), "mlp-out": (1, -1), "conv": (1, -1, "ones"), "conv1d": None}},
    ),
)
