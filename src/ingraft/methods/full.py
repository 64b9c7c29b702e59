"""Full tuning: every parameter of the chosen modules has a trained float32 copy.

    P' = M,    M starts as a float32 copy of P

The base's own parameters stay as they are, so detaching gives the base back, and the same part trains a new classification head beside any
other method (`modules_to_save`).

Paper: none; ordinary fine-tuning. In Hugging Face PEFT this is `modules_to_save`.
What differs: two adapters may hold heads of different label counts at one module; tied parameters stay tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, ParameterPart, SiteFacts


@dataclass(frozen=True, kw_only=True)
class FullConfig(MethodConfig):
    """Full tuning has no hyperparameters; `target_modules` chooses modules (default: all that own parameters)."""

    method: ClassVar[str] = "full"


class Full(ParameterPart):
    """See the file's header."""

    def __init__(self, config: FullConfig, facts: SiteFacts) -> None:
        del config
        super().__init__()
        for name, parameter in facts.parameters.items():
            self.register_parameter(name, nn.Parameter(parameter.detach().float().clone()))

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {
            name: master.to(parameters[name].dtype) for name, master in self._parameters.items() if master is not None
        }


def count(config: MethodConfig, facts: SiteFacts) -> int:
    """The parameters themselves."""
    del config
    return sum(parameter.numel() for parameter in facts.parameters.values())


METHOD = Method(
    name="full",
    config=FullConfig,
    part=Full,
    sites=("parameters",),
    identity_at_init=True,
    count=count,
)
