"""Parallel adapters: a bottleneck beside the MLP of every block.

    y' = MLP(x) + s f(x)

Paper: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022 (arXiv:2110.04366), table 1.
Read against: AdapterHub's `par_bn` (scaling 4, reduction 2).
What differs: on pre-norm models AdapterHub's bottleneck sees the residual stream ahead of the norm; this one sees x, what the MLP sees, on
every model. On post-norm models the two are the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ingraft.methods.adapterhub import BOTTLENECK, bottleneck_options
from ingraft.methods.bottleneck import Bottleneck, BottleneckConfig, count
from ingraft.methods.contract import Method, MethodConfig, Site, SiteFacts
from ingraft.methods.layout import HubLayout


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(BottleneckConfig):
    """See `BottleneckConfig`; reduction and scaling are the paper's."""

    method: ClassVar[str] = "parallel"

    reduction_factor: float = 2.0
    scaling: float = 4.0


class Parallel(Bottleneck):
    """See the file's header. x is the MLP's input, remembered by the host where the MLP begins."""

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.through(x, site)


def refuses(config: MethodConfig, facts: SiteFacts) -> str | None:
    """A named layer that does not return as many features as it takes."""
    del config
    if facts.role != "weight" or len(facts.shape) != 2 or facts.shape[0] == facts.shape[1]:
        return None
    return (
        f"parallel: {facts.path} goes from {facts.shape[1]} features to {facts.shape[0]}; a bottleneck beside it needs as many out as in. "
        "Name the whole MLP, or leave target_modules out."
    )


def read(settings: Mapping[str, Any]) -> ParallelConfig | None:
    """From AdapterHub's settings."""
    options = bottleneck_options(settings, parallel=True, of_block=False)
    return None if options is None else ParallelConfig(**options)


METHOD = Method(
    name="parallel",
    config=ParallelConfig,
    part=Parallel,
    sites=("mlp",),
    identity_at_init=True,
    count=count,
    hub=HubLayout(read=read, tensors=BOTTLENECK, post_norm=True),
    refuses=refuses,
)
