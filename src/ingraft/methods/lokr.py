"""LoKr: the change is a Kronecker product of two small matrices.

    W' = W + s W1 (x) W2,    s = alpha / r,    out = a b, in = c d,    W1 (a, c) starts at zero, W2 (b, d)

    W2 = A2 B2 of rank r where 2 r is below its longer side, else whole; with `decompose_both` also W1 = A1 B1; convolutions: W2 holds the
    kernel, with `use_effective_conv2d` as T x1 A2 x2 B2 with a core T (r, r, kernel)

Paper: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", ICLR 2024 (arXiv:2309.14859).
Read against: Hugging Face PEFT's `lokr` (which factors are decomposed, sizes, initial values, scale).
What differs: linear layers multiply by W2 and then by W1 and never make the product; PEFT builds it at every forward. Neither rank_dropout nor
module_dropout: they draw one number for a whole batch, so a row would depend on its neighbours.

Legend: O out, I in, R rank, A B the factors of O, C D those of I (D with the kernel where the matrix is a convolution's).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.layout import Foreign, Modules
from ingraft.methods.loha import core_kernel, product
from ingraft.methods.lycoris import factors, lokr_options
from ingraft.methods.pieces import kernel_of, used
from ingraft.methods.ranked import RankedConfig, thin_above


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(RankedConfig):
    """LoKr's hyperparameters; see `RankedConfig` for r (the rank of W2 and of W1 where they have one, at most their shorter side) and its patterns.

    Attributes:
        alpha: the change is scaled by alpha / r, whichever factors are decomposed.
        decompose_both: W1 too is a product of rank r, where that is smaller.
        decompose_factor: the size of W1's side, if it divides the layer's; otherwise the largest divisor below it. -1: as near to square as
            divisors allow.
        use_effective_conv2d: convolutions with a kernel above one: W2 as factors over channels and a core over the kernel.
        init_weights: True: W1 zero; "lycoris": W2 zero, W1 random; False: both random (tests).
    """

    method: ClassVar[str] = "lokr"

    alpha: float = 8
    decompose_both: bool = False
    decompose_factor: int = -1
    use_effective_conv2d: bool = False
    init_weights: bool | str = True

    def problems(self) -> list[str]:
        found = super().problems()
        if (size := self.decompose_factor) < 1 and size != -1:
            found.append(f"decompose_factor must be at least 1, or -1 for near-square, got {size}.")
        if self.init_weights not in (True, False, "lycoris"):
            found.append(f"init_weights must be true, false or 'lycoris', got {self.init_weights!r}.")
        return found

    def shapes(self, facts: SiteFacts) -> dict[str, tuple[int, ...]]:
        """The tensors at a site, with their shapes."""
        r, kernel = self.r, kernel_of(facts)
        a, b = factors(facts.shape[0], self.decompose_factor)
        c, d = factors(facts.shape[1] // math.prod(kernel), self.decompose_factor)
        core = core_kernel(self.use_effective_conv2d, facts)
        halved = self.decompose_both and 2 * r < max(a, c)
        first = {"lokr_w1_a": (a, r), "lokr_w1_b": (r, c)} if halved else {"lokr_w1": (a, c)}
        if 2 * r >= max(b, d):
            return {**first, "lokr_w2": (b, d, *kernel)}
        if core:
            return {**first, "lokr_w2_a": (r, b), "lokr_w2_b": (r, d), "lokr_t2": (r, r, *core)}
        return {**first, "lokr_w2_a": (b, r), "lokr_w2_b": (r, d * math.prod(kernel))}


class LoKr(ShortcutPart):
    """See the file's header."""

    additive = True
    kinds = frozenset({"linear", "conv1d-transposed"})

    def __init__(self, config: LoKrConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.scale = config.alpha / config.r
        for name, shape in config.shapes(facts).items():
            setattr(self, name, nn.init.kaiming_uniform_(fresh(*shape, like=facts.W), a=math.sqrt(5)))
        zero = {True: {"lokr_w1", "lokr_w1_a"}, "lycoris": {"lokr_w2", "lokr_w2_b"}}.get(config.init_weights, set())
        for name in zero & self._parameters.keys():
            nn.init.zeros_(self.get_parameter(name))

    def halves(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """s W1 (A, C) and W2 (B, D) in float32, from their factors as they are used in this dtype."""
        own = {name: used(p, dtype) for name, p in self.named_parameters()}
        w1_AC, w2_BD = (
            product(own.get(f"lokr_t{n}"), own[f"lokr_w{n}_a"], own[f"lokr_w{n}_b"])
            if whole is None
            else whole.flatten(1)
            for n, whole in ((n, own.get(f"lokr_w{n}")) for n in (1, 2))
        )
        return self.scale * w1_AC, w2_BD

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (W.float() + torch.kron(*self.halves(W.dtype))).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        w1_AC, w2_BD = (half.to(y.dtype) for half in self.halves(y.dtype))
        u_CB = F.linear(x.unflatten(-1, (w1_AC.shape[1], w2_BD.shape[1])), w2_BD)
        return y + (w1_AC @ u_CB).flatten(-2)


def count(config: LoKrConfig, facts: SiteFacts) -> int:
    """a c + r (b + d), or b d where that is not larger than half of it; with decompose_both r (a + c) where that is smaller."""
    return sum(math.prod(shape) for shape in config.shapes(facts).values())


def otherwise(config: LoKrConfig, facts: SiteFacts) -> str | None:
    """A whole W2 over the kernel of a Conv1d: LyCORIS' product, and ours, leaves the kernel to W2."""
    other = facts.kind == "conv1d" and "lokr_w2" in config.shapes(facts)
    return "PEFT's LOKR multiplies W1 with the kernel's dimension" if other else None


def read(modules: Modules) -> tuple[MethodConfig, Modules]:
    """From the tensors of a LyCORIS file."""
    options, tensors = lokr_options(modules)
    return LoKrConfig(**options), tensors


METHOD = Method(
    name="lokr",
    config=LoKrConfig,
    part=LoKr,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=thin_above,
    foreign=Foreign(
        names=frozenset(f"lokr_{n}" for n in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        marks=frozenset(),
        read=read,
    ),
    peft=PeftLayout(
        peft_type="LOKR",
        kinds=frozenset({"linear", "conv1d", "conv2d"}),
        ignored=("rank_dropout", "module_dropout", "rank_dropout_scale"),
        shapes={"lokr_t2": {"conv1d": (0, 0, 0, 1)}},
        otherwise=otherwise,
    ),
)
