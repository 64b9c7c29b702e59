"""C3A: a change made of circulant blocks, which a vector passes through by fast Fourier transform.

    W' = W + C / in,    block (m, n) of C is circulant: C_mn[t, s] = k_mn[(s - t) mod b]

Paper: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", ACL Findings 2025 (arXiv:2407.19342), equations 4-6.
Read against: Hugging Face PEFT's `c3a` (orientation of the blocks, the division by the inputs).
What differs: kernels start at zero, so that a fresh adapter is the identity (PEFT's default start is random); blocks of 64 unless asked, which
divide the layers of more models than PEFT's 256; two active adapters are the sum of both (in PEFT the second one sees the first one's
output); transforms of real numbers, half the work, made again in backward instead of kept. PEFT's backward (written by hand) correlates where
it should convolve, so what reaches the layers below an adapted one is no gradient; here it is.

Legend: O out, I in, M = O / B and N = I / B blocks, B their size, S = B // 2 + 1 frequencies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, PeftLayout, ShortcutPart, Site, SiteFacts, fresh
from ingraft.methods.pattern import PatternedConfig
from ingraft.methods.pieces import divisors, recomputed, used


@dataclass(frozen=True, kw_only=True)
class C3AConfig(PatternedConfig):
    """C3A's hyperparameters.

    Attributes:
        block_size: side of a block; divides inputs and outputs of every layer. The larger, the fewer trained numbers.
        block_size_pattern: other sizes by the end of the module's path (a regular expression), the first that matches.
        init_weights: True: zero; "xavier_uniform" (or False), "kaiming_uniform", "gaussian": random.
    """

    method: ClassVar[str] = "c3a"
    patterns: ClassVar[Mapping[str, str]] = {"block_size_pattern": "block_size"}

    block_size: int = 64
    block_size_pattern: Mapping[str, int] = field(default_factory=dict[str, int], hash=False)
    init_weights: bool | str = True

    def problems(self) -> list[str]:
        found = super().problems() + self.below_one("block_size_pattern")
        if self.init_weights not in (True, False, "xavier_uniform", "kaiming_uniform", "gaussian"):
            found.append(
                "init_weights must be true, false, 'xavier_uniform', 'kaiming_uniform' or 'gaussian', "
                f"got {self.init_weights!r}."
            )
        return found


class C3A(ShortcutPart):
    """See the file's header."""

    additive = True
    kinds = frozenset({"linear", "conv1d-transposed"})

    def __init__(self, config: C3AConfig, facts: SiteFacts) -> None:
        super().__init__()
        (high, wide), size = facts.matrix().shape, config.block_size
        self.c3a_kernel = fresh(high // size, wide // size, size, like=facts.W)
        if config.init_weights is True:
            nn.init.zeros_(self.c3a_kernel)
        elif config.init_weights == "gaussian":
            nn.init.normal_(self.c3a_kernel)
        else:
            bound = math.sqrt(1 / wide if config.init_weights == "kaiming_uniform" else 6 / (high + wide))
            nn.init.uniform_(self.c3a_kernel, -bound, bound)

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        place_B = torch.arange(self.c3a_kernel.shape[2], device=W.device)
        blocks_MNBB = used(self.c3a_kernel, W.dtype)[:, :, (place_B - place_B[:, None]) % len(place_B)]
        return (W.float() + blocks_MNBB.transpose(1, 2).reshape(W.shape) / W.shape[1]).to(W.dtype), b

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        if not x.numel():  # no transform takes an empty batch
            return y + 0 * self.c3a_kernel.sum().to(y.dtype)
        return y + recomputed(self._branch, x, self.c3a_kernel).to(y.dtype)

    def _branch(self, x: Tensor, kernel_MNB: Tensor) -> Tensor:
        """Every block's product with its piece of x, in frequencies."""
        size = kernel_MNB.shape[2]
        x_NS = torch.fft.rfft(x.float().unflatten(-1, (-1, size)))
        kernel_MNS = torch.fft.rfft(used(kernel_MNB, x.dtype) / x.shape[-1]).conj()
        y_MS = torch.einsum("...ns,mns->...ms", x_NS, kernel_MNS)
        return torch.fft.irfft(y_MS, n=size).flatten(-2)


def refuses(config: C3AConfig, facts: SiteFacts) -> str | None:
    """A block that does not divide the layer; a lookup, whose inputs lie in no circle."""
    high, wide = facts.shape
    if facts.kind == "embedding":
        return f"c3a: {facts.path}: a circular convolution over the numbers of tokens has no meaning. Leave embeddings out of target_modules."
    if high % config.block_size == 0 and wide % config.block_size == 0:
        return None
    sizes = divisors(math.gcd(high, wide))
    return f"c3a: {facts.path}: block_size = {config.block_size} does not divide a weight of {high} x {wide}. Sizes that do: {sizes}."


def count(config: C3AConfig, facts: SiteFacts) -> int:
    """out in / block_size."""
    return facts.shape[0] * facts.shape[1] // config.block_size


METHOD = Method(
    name="c3a",
    config=C3AConfig,
    part=C3A,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="C3A",
        kinds=frozenset({"linear"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
    ),
)
