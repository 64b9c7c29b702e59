"""Parallel adapters: a bottleneck beside the MLP of every block.

    y' = MLP(x) + s f(x)

Paper: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", ICLR 2022 (arXiv:2110.04366), table 1.
Read against: AdapterHub's `par_bn` (scaling 4, reduction 2).
What differs: on pre-norm models AdapterHub's bottleneck sees the residual stream ahead of the norm; this one sees x, what the MLP sees, on
every model. On post-norm models the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ingraft.errors import IngraftError
from ingraft.methods.bottleneck import Bottleneck, BottleneckConfig, count
from ingraft.methods.contract import Method, Site, SiteFacts


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(BottleneckConfig):
    """See `BottleneckConfig`; reduction and scaling are the paper's."""

    method: ClassVar[str] = "parallel"

    reduction_factor: float = 2.0
    scaling: float = 4.0


class Parallel(Bottleneck):
    """See the file's header. x is the MLP's input, remembered by the host where the MLP begins."""

    def __init__(self, config: ParallelConfig, facts: SiteFacts) -> None:
        if (
            facts.role == "weight"
            and facts.W is not None
            and facts.W.dim() == 2
            and facts.W.shape[0] != facts.W.shape[1]
        ):
            raise IngraftError(
                f"parallel: {facts.path} goes from {facts.W.shape[1]} features to {facts.W.shape[0]}; a bottleneck beside it needs as many out "
                "as in. Name the whole MLP, or leave target_modules out."
            )
        super().__init__(config, facts)

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return y + self.change(x, site)


METHOD = Method(
    name="parallel", config=ParallelConfig, part=Parallel, sites=("mlp",), identity_at_init=True, count=count
)
