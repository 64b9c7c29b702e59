"""OFT: inputs turned block by block.

    W' = W T',    T = blockdiag(T_1 ... T_N),    T_i = (I - Q_i)(I + Q_i)^-1,    Q_i skew-symmetric, zero at the start

or the first terms of the inverse's series, with the opposite sign of Q: T_i = I + 2 Q_i + 2 Q_i^2 + ... (Cayley-Neumann).

Paper: Qiu et al., "Controlling Text-to-Image Diffusion by Orthogonal Finetuning", NeurIPS 2023 (arXiv:2306.07280); for the series arXiv:2506.19847.
Read against: Hugging Face PEFT's `oft`.
What differs: on a convolution the kernel is turned, not patches of the picture (which PEFT then adds up where they overlap); a block size that
does not divide is refused, not changed; blocks are not dropped in training (the option does nothing in PEFT).

Legend: D the width that is turned, N number of blocks, S their size, E = S (S - 1) / 2 entries above a block's diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, Moment, PeftLayout, SiteFacts
from ingraft.methods.rotation import Rotation, blockwise, cayley, divisors, series, skew, turned_width


@dataclass(frozen=True, kw_only=True)
class OFTConfig(MethodConfig):
    """OFT's hyperparameters.

    Attributes:
        oft_block_size: size S of a block; it must divide the layer's inputs. 0 if `r` says how many blocks there are.
        r: number of blocks N, 0 if `oft_block_size` is given. Larger blocks train more.
        block_share: one block, used N times.
        use_cayley_neumann, num_cayley_neumann_terms: the series, of at least 2 terms, instead of the exact inverse: cheaper, a little less orthogonal.
        coft, eps: keep every Q_i within a distance of eps / sqrt(N) from zero.
        init_weights: start as the identity; False starts at random (tests).
    """

    method: ClassVar[str] = "oft"

    oft_block_size: int = 32
    r: int = 0
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5
    coft: bool = False
    eps: float = 6e-5
    init_weights: bool = True

    def problems(self) -> list[str]:
        size, terms = self.oft_block_size, self.num_cayley_neumann_terms
        one = f"give exactly one of oft_block_size and r, and 0 for the other; got oft_block_size = {size} and r = {self.r}."
        checks = (
            (min(self.r, size) != 0 or max(self.r, size) < 1, one),
            (size == 1, "oft_block_size must be at least 2: there is nothing to turn in one dimension."),
            (self.use_cayley_neumann and terms < 2, f"num_cayley_neumann_terms must be at least 2, got {terms}."),
            (self.eps <= 0, f"eps must be positive, got {self.eps}."),
        )
        return [text for wrong, text in checks if wrong]

    def blocks(self, facts: SiteFacts) -> tuple[int, int]:
        """N and S at a site."""
        width = turned_width(facts)
        return (self.r, width // self.r) if self.r else (width // self.oft_block_size, self.oft_block_size)


class OFT(Rotation):
    """See the file's header."""

    def __init__(self, config: OFTConfig, facts: SiteFacts) -> None:
        super().__init__(facts)
        self.config = config
        self.number, self.size = config.blocks(facts)
        shape = (1 if config.block_share else self.number, self.size * (self.size - 1) // 2)
        start_NE = torch.zeros(shape) if config.init_weights else 0.1 * torch.randn(shape)
        self.oft_R = nn.Parameter(start_NE.to(facts.matrix().device))

    def blocks(self, dtype: torch.dtype) -> Tensor:
        """What T's blocks differ by from I (N, S, S), in float32."""
        R_NE, options = self.oft_R.to(dtype).float(), self.config
        if options.coft:
            R_NE = R_NE + (self.held(R_NE) - R_NE).detach()  # the gradient is that at the held values
        Q_NSS = skew(R_NE, self.size)
        change_NSS = series(Q_NSS, options.num_cayley_neumann_terms) if options.use_cayley_neumann else cayley(Q_NSS)
        return change_NSS.expand(self.number, -1, -1)

    @torch.no_grad()
    def held(self, R_NE: Tensor) -> Tensor:
        """The entries with every block brought back to where coft allows it."""
        bound = self.config.eps / R_NE.shape[0] ** 0.5
        norm_N1 = R_NE.norm(dim=1, keepdim=True) * 2**0.5  # every entry stands in Q twice
        return torch.where(norm_N1 <= bound, R_NE, R_NE * (bound / norm_N1))

    def turn(self, x: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
        change_NSS = self.blocks(dtype)
        return blockwise(x, change_NSS.transpose(1, 2) if back else change_NSS)


def refuses(config: OFTConfig, facts: SiteFacts) -> str | None:
    """Blocks that do not make up the inputs."""
    width, (number, size) = turned_width(facts), config.blocks(facts)
    given = f"r = {config.r} blocks" if config.r else f"oft_block_size = {config.oft_block_size}"
    words = f"oft: {facts.path}: {given} cannot make up the {width} dimensions that are turned. Block sizes that do: {divisors(width)}."
    return words if number * size != width or size < 2 else None


def count(config: OFTConfig, facts: SiteFacts) -> int:
    """S (S - 1) / 2 for every block, or for the one that is shared."""
    number, size = config.blocks(facts)
    return (1 if config.block_share else number) * (size * (size - 1) // 2)


def otherwise(_: MethodConfig, facts: SiteFacts) -> str | None:
    """A convolution for which PEFT computes something else."""
    words = "PEFT turns overlapping patches of the picture and adds them up, where the kernel is turned here"
    return words if isinstance(facts.module, nn.Conv2d) and facts.module.kernel_size != (1, 1) else None


def update(config: OFTConfig, parts: Mapping[str, Any], moment: Moment) -> None:
    """Write what coft allows back into the trained values, as the paper does after a step."""
    del moment
    for part in parts.values() if config.coft else ():
        part.oft_R.copy_(part.held(part.oft_R))


METHOD = Method(
    name="oft",
    config=OFTConfig,
    part=OFT,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    update=update,
    peft=PeftLayout(
        peft_type="OFT",
        kinds=frozenset({"linear", "embedding", "conv2d"}),
        accepted={"bias": ("none",)},
        written={"bias": "none", "peft_version": "0.18.0"},
        changed_in={"use_cayley_neumann": ("0.18", "PEFT's series ended otherwise before")},
        ignored=("module_dropout",),
        transposed_field="fan_in_fan_out",
        tensors={"oft_R": "oft_R.weight"},
        embedding_tensors={"oft_R": "oft_embedding_R.weight"},
        otherwise=otherwise,
    ),
)
