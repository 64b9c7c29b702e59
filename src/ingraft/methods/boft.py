"""BOFT: inputs turned by a butterfly, so that few small blocks reach everywhere.

    W' = diag(s) W T',    T = T_m ... T_1,    T_i = P_i blockdiag(C_i1 ... C_iN) P_i',    C = (I - Q)(I + Q)^-1,    Q = (R - R') / 2

P_i reorders half blocks so that a block of the i-th factor mixes what lies 2^(i-1) blocks apart; R starts at zero, s at one.

Paper: Liu et al., "Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization", ICLR 2024 (arXiv:2311.06243), section 4.
Read against: Hugging Face PEFT's `boft`.
What differs: the factors are products of small blocks and reshapes, never dense matrices; several factors run everywhere (without a CUDA
extension PEFT uses one, says another number in its files, and loads none of several); blocks are not dropped in training.

Legend: O out, D the width that is turned, M number of factors, N number of blocks, S their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, PeftLayout, SiteFacts
from ingraft.methods.layout import Tensors
from ingraft.methods.rotation import Rotation, blockwise, cayley, divisors, turned_width, uneven_kernel


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(MethodConfig):
    """BOFT's hyperparameters.

    Attributes:
        boft_block_size: size S of a block; times 2^(factors - 1) it must divide the layer's inputs. 0 if `boft_block_num` is given.
        boft_block_num: number of blocks N, 0 if `boft_block_size` is given.
        boft_n_butterfly_factor: number of factors M. With M, a block reaches 2^(M - 1) times as far.
        init_weights: start as the identity; False starts at random (tests).
    """

    method: ClassVar[str] = "boft"

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    init_weights: bool = True

    def problems(self) -> list[str]:
        size, number, factors = self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor
        found: list[str] = []
        if size < 0 or number < 0 or (size == 0) == (number == 0):
            found.append(f"give either boft_block_size or boft_block_num, the other 0; got {size} and {number}.")
        if size == 1:
            found.append("boft_block_size must be at least 2: there is nothing to turn in one dimension.")
        if factors < 1:
            found.append(f"boft_n_butterfly_factor must be at least 1, got {factors}.")
        if factors > 1 and size % 2:
            found.append(
                f"boft_block_size must be even where factors are several (halves of blocks are exchanged), got {size}."
            )
        return found

    def blocks(self, facts: SiteFacts) -> tuple[int, int]:
        """N and S at a site."""
        width = turned_width(facts)
        if self.boft_block_num:
            return self.boft_block_num, width // self.boft_block_num
        return width // self.boft_block_size, self.boft_block_size


class BOFT(Rotation):
    """See the file's header."""

    def __init__(self, config: BOFTConfig, facts: SiteFacts) -> None:
        super().__init__(facts)
        number, size = config.blocks(facts)
        R_MNSS, s_O = torch.zeros(config.boft_n_butterfly_factor, number, size, size), torch.ones(facts.shape[0])
        if not config.init_weights:
            nn.init.normal_(R_MNSS, std=0.1)
            nn.init.normal_(s_O, mean=1.0, std=0.1)
        device = facts.matrix().device
        self.boft_R, self.boft_s = nn.Parameter(R_MNSS.to(device)), nn.Parameter(s_O.to(device))

    def factor(self) -> Tensor:
        return self.boft_s

    def turn(self, x: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
        R_MNSS = self.boft_R.to(dtype).float()
        change_MNSS = cayley((R_MNSS - R_MNSS.transpose(2, 3)) / 2)
        order, size = range(R_MNSS.shape[0]), R_MNSS.shape[-1]
        for level in order if back else reversed(order):
            change_NSS = change_MNSS[level].transpose(1, 2) if back else change_MNSS[level]
            x = _exchanged(blockwise(_exchanged(x, level, size, gather=True), change_NSS), level, size, gather=False)
        return x


def _exchanged(x: Tensor, level: int, size: int, *, gather: bool) -> Tensor:
    """x with half blocks reordered inside each run of 2^level blocks: gathered (all that will meet comes together), or put back."""
    if level == 0:
        return x
    run = (2, 2**level) if gather else (2**level, 2)
    return x.reshape(*x.shape[:-1], -1, *run, size // 2).transpose(-2, -3).reshape(x.shape)


def refuses(config: BOFTConfig, facts: SiteFacts) -> str | None:
    """Blocks that do not make up the inputs, or cannot be exchanged."""
    width, (number, size), runs = turned_width(facts), config.blocks(facts), 2 ** (config.boft_n_butterfly_factor - 1)
    if number * size == width and size > 1 and number % runs == 0 and (runs == 1 or size % 2 == 0):
        return None
    if runs > 1 and width % (2 * runs):
        return f"boft: {facts.path}: {config.boft_n_butterfly_factor} factors need {2 * runs} to divide the {width} dimensions that are turned. Take fewer."
    given = f"boft_block_num = {number}" if config.boft_block_num else f"boft_block_size = {size}"
    fitting = divisors(width // runs, of=2 if runs > 1 else 1)
    return f"boft: {facts.path}: {given} with {config.boft_n_butterfly_factor} factors cannot make up the {width} dimensions that are turned. Block sizes that do: {fitting}."


def count(config: BOFTConfig, facts: SiteFacts) -> int:
    """A block for every factor and place, and a factor for every output."""
    number, size = config.blocks(facts)
    return config.boft_n_butterfly_factor * number * size**2 + facts.shape[0]


def reread(fields: Mapping[str, Any], tensors: Tensors) -> tuple[Mapping[str, Any], Tensors, None]:
    """As many factors as there are, whatever the config says (see the header)."""
    M = next((R.shape[0] for key, R in tensors.items() if key.rpartition(".")[2] == "boft_R" and R.dim() == 4), None)
    return fields if M is None else {**fields, "boft_n_butterfly_factor": M}, tensors, None


METHOD = Method(
    name="boft",
    config=BOFTConfig,
    part=BOFT,
    sites=("all-linear",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="BOFT",
        kinds=frozenset({"linear", "conv2d"}),
        accepted={"bias": ("none",)},
        written={"bias": "none"},
        ignored=("boft_dropout",),
        transposed_field="fan_in_fan_out",
        tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
        shapes={"boft_s": {"": (-1, 1), "conv2d": (1, -1)}},
        otherwise=uneven_kernel,
        reread=reread,
    ),
)
