"""Freezing by layer: some blocks of the model are trained in full, everything else stays frozen.

    P' = M for every parameter P of the chosen blocks,    M starts as a float32 copy of P

Paper: none; the oldest way of fine-tuning with less memory. LLaMA-Factory calls it freeze tuning.
What differs: the base's own parameters stay as they are, as with full tuning; a head or an embedding joins through `modules_to_save`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ingraft.methods.contract import Method, MethodConfig
from ingraft.methods.full import Full, count


@dataclass(frozen=True, kw_only=True)
class FreezeConfig(MethodConfig):
    """Which blocks are trained.

    Attributes:
        num_layers_trainable: that many blocks at the end of the model (of each stack, where there are two); a negative number counts from the
            start. Not used where layers_to_transform or target_modules say which.
    """

    method: ClassVar[str] = "freeze"

    num_layers_trainable: int = 2

    def __post_init__(self) -> None:
        n = self.num_layers_trainable
        if n and self.layers_to_transform is None and self.target_modules is None:
            object.__setattr__(self, "layers_to_transform", tuple(range(-n, 0) if n > 0 else range(-n)))
        super().__post_init__()

    def problems(self) -> list[str]:
        return [] if self.num_layers_trainable else ["num_layers_trainable is 0, so nothing would be trained."]


METHOD = Method(
    name="freeze",
    config=FreezeConfig,
    part=Full,
    sites=("blocks",),
    identity_at_init=True,
    count=count,
    hint="No block has these numbers.",
)
