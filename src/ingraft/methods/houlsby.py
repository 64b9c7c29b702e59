"""Houlsby adapters: a bottleneck behind the attention and behind the MLP of every block.

    y' = y + f(y),    y = the output of the last projection, ahead of the residual and the norm

Paper: Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019 (arXiv:1902.00751), figure 2.
Read against: AdapterHub's `double_seq_bn`.
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
class HoulsbyConfig(BottleneckConfig):
    """See `BottleneckConfig`; the nonlinearity is swish, as in AdapterHub."""

    method: ClassVar[str] = "houlsby"

    non_linearity: str = "swish"


class Houlsby(Bottleneck):
    """See the file's header."""

    def change(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        return self.through(y, site)


def read(settings: Mapping[str, Any]) -> HoulsbyConfig | None:
    """From AdapterHub's settings."""
    options = bottleneck_options(settings, parallel=False, of_block=False)
    return None if options is None else HoulsbyConfig(**options)


METHOD = Method(
    name="houlsby",
    config=HoulsbyConfig,
    part=Houlsby,
    sites=("attention-out", "mlp-out"),
    identity_at_init=True,
    count=count,
    hub=HubLayout(read=read, tensors=BOTTLENECK),
)
