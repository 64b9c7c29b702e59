"""LoHa: the change is the entrywise (Hadamard) product of two low-rank ones, of rank up to r^2.

    W' = W + s (A1 B1) * (A2 B2),    s = alpha / r,    B2 starts at zero

    convolutions, with `use_effective_conv2d`: A B becomes T x1 A x2 B, with a core T (r, r, kernel)

Paper: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", ICLR 2022 (arXiv:2108.06098),
propositions 1 and 3; as an adapter: Yeh et al., LyCORIS (arXiv:2309.14859).
Read against: Hugging Face PEFT's `loha` (initial values, scale, cores).
What differs: while r^2 is small against the layer, the change is applied as the product of two thin matrices that it is, so that nothing of
the weight's size is made; PEFT builds the change at every forward. Neither rank_dropout nor module_dropout: they draw one number for a
whole batch, so a row would depend on its neighbours. PEFT's backward of cores (written by hand) gives A1 a gradient made of T2 and B2, and
A2 one made of T1 and B1; here they are the derivatives.

Legend: O out, I in, R rank, C input channels of a kernel, K its positions, Q pairs of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Factors, Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.layout import Foreign, Modules
from ingraft.methods.lycoris import loha_options
from ingraft.methods.pieces import kernel_of, used
from ingraft.methods.ranked import RankedConfig, rank_above


@dataclass(frozen=True, kw_only=True)
class LoHaConfig(RankedConfig):
    """LoHa's hyperparameters; see `RankedConfig` for r and its patterns.

    Attributes:
        alpha: the change is scaled by alpha / r.
        use_effective_conv2d: convolutions with a kernel above one: factors over channels and a core over the kernel, instead of factors
            over channels times kernel.
        init_weights: False starts B2 at random too (tests).
    """

    method: ClassVar[str] = "loha"

    alpha: float = 8
    use_effective_conv2d: bool = False
    init_weights: bool = True


class LoHa(ShortcutPart):
    """See the file's header."""

    additive = True

    def __init__(self, config: LoHaConfig, facts: SiteFacts) -> None:
        super().__init__()
        W_OI, r, kernel = facts.matrix(), config.r, core_kernel(config.use_effective_conv2d, facts)
        wide, high = W_OI.shape[1] // math.prod(kernel), W_OI.shape[0]
        self.scale = config.alpha / r
        self.hada_w1_a, self.hada_w2_a = (fresh(*(r, high) if kernel else (high, r), like=W_OI) for _ in range(2))
        self.hada_w1_b, self.hada_w2_b = (fresh(r, wide, like=W_OI) for _ in range(2))
        self.hada_t1, self.hada_t2 = (fresh(r, r, *kernel, like=W_OI) if kernel else None for _ in range(2))
        self.thin = not kernel and r * r * (high + wide) <= high * wide
        for parameter in self.parameters():
            nn.init.kaiming_uniform_(parameter, a=math.sqrt(5))
        if config.init_weights:
            nn.init.zeros_(self.hada_w2_b)

    def tensors(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Its tensors in float32, as they are used in this dtype."""
        return {name: used(parameter, dtype) for name, parameter in self.named_parameters()}

    def low_rank(self) -> Factors | None:
        return self._thin(torch.float32) if self.thin else None

    def delta(self, W_OI: Tensor) -> Tensor:
        """The change in float32, from the factors as they are used beside W."""
        own = self.tensors(W_OI.dtype)
        first_OI, second_OI = (product(own.get(f"hada_t{n}"), own[f"hada_w{n}_a"], own[f"hada_w{n}_b"]) for n in (1, 2))
        return self.scale * first_OI * second_OI

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (W.float() + self.delta(W)).to(W.dtype), b

    def holds(self, kind: str) -> bool:
        return self.thin

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        change = self._thin(y.dtype)
        return site.low_rank(x, y, change.scale * change.A_RI, change.B_OR)

    def _thin(self, dtype: torch.dtype) -> Factors:
        """The change as a product of rank r^2: the columns of A1 and A2, and the rows of B1 and B2, multiplied pair by pair."""
        own = self.tensors(dtype)
        down_QI = (own["hada_w1_b"][:, None] * own["hada_w2_b"]).flatten(0, 1)
        up_OQ = (own["hada_w1_a"][:, :, None] * own["hada_w2_a"][:, None]).flatten(1)
        return Factors(B_OR=up_OQ, A_RI=down_QI, scale=self.scale)


def product(core: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """A (O, R) times B (R, I); with a core (R, R, kernel), A (R, O) and B (R, C): the kernel (O, C, K), flat."""
    return a @ b if core is None else torch.einsum("ijK,iO,jC->OCK", core.flatten(2), a, b).flatten(1)


def core_kernel(effective: bool, facts: SiteFacts) -> tuple[int, ...]:
    """The sizes of a convolution's kernel where a core stands for it, () elsewhere."""
    kernel = kernel_of(facts)
    return kernel if effective and math.prod(kernel) > 1 else ()


def count(config: LoHaConfig, facts: SiteFacts) -> int:
    """2 r (out + in); with cores of k positions 2 (r (out + in / k) + r^2 k)."""
    k = math.prod(kernel) if (kernel := core_kernel(config.use_effective_conv2d, facts)) else 1
    return 2 * (config.r * (facts.shape[0] + facts.shape[1] // k) + (config.r**2 * k if kernel else 0))


def read(modules: Modules) -> tuple[MethodConfig, Modules]:
    """From the tensors of a LyCORIS file."""
    options, tensors = loha_options(modules)
    return LoHaConfig(**options), tensors


METHOD = Method(
    name="loha",
    config=LoHaConfig,
    part=LoHa,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=rank_above,
    foreign=Foreign(
        names=frozenset(f"hada_{name}" for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        marks=frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"}),
        read=read,
    ),
    peft=PeftLayout(
        peft_type="LOHA",
        kinds=frozenset({"linear", "conv1d", "conv2d"}),
        ignored=("rank_dropout", "module_dropout"),
        shapes={name: {"conv1d": (0, 0, 0, 1)} for name in ("hada_t1", "hada_t2")},
    ),
)
