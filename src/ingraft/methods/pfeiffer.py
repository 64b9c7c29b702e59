"""Pfeiffer adapters: one bottleneck at the output of every block.

    pre-norm blocks:   y' = y + f(y)
    post-norm blocks:  y' = norm(u + f(norm(u))),    u = what the block's last norm sees

Paper: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", EACL 2021 (arXiv:2005.00247), section 4.
Read against: AdapterHub's `seq_bn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from ingraft.methods.adapterhub import BOTTLENECK, bottleneck_options
from ingraft.methods.bottleneck import Bottleneck, BottleneckConfig, count
from ingraft.methods.contract import Method, Site
from ingraft.methods.layout import HubLayout


@dataclass(frozen=True, kw_only=True)
class PfeifferConfig(BottleneckConfig):
    """See `BottleneckConfig`; the nonlinearity is relu, as in AdapterHub."""

    method: ClassVar[str] = "pfeiffer"


class Pfeiffer(Bottleneck):
    """See the file's header."""

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.through(y, site)


def read(settings: Mapping[str, Any]) -> PfeifferConfig | None:
    """From AdapterHub's settings."""
    options = bottleneck_options(settings, parallel=False, of_block=True)
    return None if options is None else PfeifferConfig(**options)


METHOD = Method(
    name="pfeiffer",
    config=PfeifferConfig,
    part=Pfeiffer,
    sites=("block",),
    identity_at_init=True,
    count=count,
    hub=HubLayout(read=read, tensors=BOTTLENECK),
)
