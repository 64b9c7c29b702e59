"""The incumbent's config classes that are nothing but fields with defaults, made from the table of them (`registry.incumbents`).

A method that is added to the table needs one line here, and its member in `PeftType`. What such a config means for a model is worked out as
for a file (`convert.py`), and a field without effect here is refused by name unless it is left as it is.
"""

from __future__ import annotations

import copy
import dataclasses
from functools import partial
from typing import Any

from ingraft.methods.registry import incumbents
from ingraft.peft.configs import CLASSES, PeftConfig, PeftType


class TableConfig(PeftConfig):
    """What the classes of this file share."""


def _made(kind: PeftType) -> Any:
    """The class for a type. Its fields are known when it is made, so it is no type to a type checker."""
    own = incumbents()[kind.value]
    fields = [
        (name, Any, dataclasses.field(default_factory=partial(copy.copy, own.defaults.get(name))))
        for name in own.fields
    ]
    made = dataclasses.make_dataclass(
        own.name,
        fields,
        bases=(TableConfig,),
        kw_only=True,
        namespace={
            "__doc__": f"{own.name}: fields and defaults as in the incumbent.",
            "__module__": __name__,
            "kind": kind,
        },
    )
    CLASSES[kind.value] = made
    return made


BOFTConfig: Any = _made(PeftType.BOFT)
C3AConfig: Any = _made(PeftType.C3A)
FourierFTConfig: Any = _made(PeftType.FOURIERFT)
GraloraConfig: Any = _made(PeftType.GRALORA)
HiraConfig: Any = _made(PeftType.HIRA)
HRAConfig: Any = _made(PeftType.HRA)
LNTuningConfig: Any = _made(PeftType.LN_TUNING)
LoHaConfig: Any = _made(PeftType.LOHA)
LoKrConfig: Any = _made(PeftType.LOKR)
MissConfig: Any = _made(PeftType.MISS)
OFTConfig: Any = _made(PeftType.OFT)
RandLoraConfig: Any = _made(PeftType.RANDLORA)
RoadConfig: Any = _made(PeftType.ROAD)
ShiraConfig: Any = _made(PeftType.SHIRA)
TrainableTokensConfig: Any = _made(PeftType.TRAINABLE_TOKENS)
VBLoRAConfig: Any = _made(PeftType.VBLORA)
VeraConfig: Any = _made(PeftType.VERA)
