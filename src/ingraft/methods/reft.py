"""LoReFT: an edit of the hidden state in a low-rank subspace, at chosen tokens of the prompt.

    h' = h + R^T (W h + b - R h),    R (r, width) with orthonormal rows
    DiReFT (`orthogonality` and `subtract_projection` false):    h' = h + R^T (W h + b)

Paper: Wu et al., "ReFT: Representation Finetuning for Language Models", NeurIPS 2024 (arXiv:2404.03592), equations 2 and 4.
Read against: `pyreft` (maths, notation of positions) and AdapterHub's `loreft`, `noreft`, `direft` (names of the options).
What differs: R is the orthogonal factor of a free matrix M (M^T = R^T T, T triangular with a positive diagonal): orthonormal after every
step, and the same again from a saved M. W starts as R and b at zero (DiReFT: both zero), so that a fresh edit is the identity; theirs start at
random. First and last tokens share one edit (their `share_weights`, `tied_weights`), and one that is both is edited once. With a cache only
the prompt is edited: decoding is the base's own.

Legend: W width, R rank, B rows, T tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ingraft.methods.contract import Method, MethodConfig, OutputPart, Site, SiteFacts, fresh

POSITIONS = re.compile(r"all|f(\d+)|l(\d+)|f(\d+)\+l(\d+)")


@dataclass(frozen=True, kw_only=True)
class ReftConfig(MethodConfig):
    """ReFT's hyperparameters.

    Attributes:
        r: rank of the subspace, at least 1.
        positions: "f4+l4": the first four and the last four tokens of the prompt; "f1", "l1": one side alone; "all": the whole prompt.
        orthogonality: keep R's rows orthonormal.
        subtract_projection: set the subspace to W h + b (LoReFT); false adds W h + b to it (DiReFT).
        dropout: probability of dropping an entry of the edit, in [0, 1).
    """

    method: ClassVar[str] = "reft"

    r: int = 4
    positions: str = "f4+l4"
    orthogonality: bool = True
    subtract_projection: bool = True
    dropout: float = 0.0

    def problems(self) -> list[str]:
        found: list[str] = []
        if self.r < 1:
            found.append(f"r must be at least 1, got {self.r}.")
        if not POSITIONS.fullmatch(self.positions) or not self.first_last:
            found.append(f"positions must be 'all', or like 'f4+l4', 'f1' or 'l1', got {self.positions!r}.")
        if not 0.0 <= self.dropout < 1.0:
            found.append(f"dropout must lie in [0, 1), got {self.dropout}.")
        return found

    @property
    def first_last(self) -> tuple[int, int] | None:
        """How many first and last tokens; None where that makes none."""
        if self.positions == "all":
            return (2**31, 0)
        counts = {part[:1]: int(part[1:]) for part in self.positions.split("+")}
        both = counts.get("f", 0), counts.get("l", 0)
        return both if any(both) else None


class Reft(OutputPart):
    """See the file's header."""

    reads_context = True

    def __init__(self, config: ReftConfig, facts: SiteFacts) -> None:
        super().__init__()
        like = next(iter(facts.module.parameters()), None)
        self.orthogonality, self.subtract, self.p = config.orthogonality, config.subtract_projection, config.dropout
        self.first, self.last = config.first_last or (0, 0)
        self.rotation = fresh(config.r, facts.width, like=like)
        nn.init.orthogonal_(self.rotation)
        start = self.subspace(torch.float32).detach().clone() if self.subtract else torch.zeros_like(self.rotation)
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(config.r, device=start.device))

    def subspace(self, dtype: torch.dtype) -> Tensor:
        """R (r, width) in float32, from M as it is used beside tensors of this dtype."""
        M_RW = self.rotation.to(dtype).float()
        if not self.orthogonality:
            return M_RW
        Q_WR, T_RR = torch.linalg.qr(M_RW.mT)
        # Without the signs, R would jump where an entry of M passes through zero.
        return (Q_WR * torch.where(T_RR.diagonal() < 0, -1.0, 1.0)).mT

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        R_RW = self.subspace(y.dtype)
        W_RW = self.weight.to(y.dtype).float() - R_RW if self.subtract else self.weight
        edit_BTR = site.dropout(F.linear(y, W_RW.to(y.dtype), self.bias.to(y.dtype)), self.p)
        return torch.where(self.chosen(site.prompt_mask(y))[..., None], y + edit_BTR @ R_RW.to(y.dtype), y)

    def chosen(self, prompt_BT: Tensor) -> Tensor:
        """The first and the last tokens among these."""
        order_BT = prompt_BT.long().cumsum(-1)
        return prompt_BT & ((order_BT <= self.first) | (order_BT > order_BT[..., -1:] - self.last))


def refuses(config: ReftConfig, facts: SiteFacts) -> str | None:
    """A subspace larger than the state, or a layer whose output has no tokens."""
    if config.r > facts.width:
        return f"reft: r={config.r} is more than the width {facts.width} of {facts.path}; choose a smaller r."
    layers = [facts.module, *facts.module.children()]
    norms = {p.shape[0] for layer in layers if (p := layer._parameters.get("weight")) is not None and p.dim() == 1}
    if norms and facts.width not in norms:
        return (
            f"reft: {facts.path} works at a width of {min(norms)}, not at the model's {facts.width}, which differs from stage to stage here. Name modules "
            "of that width in target_modules, or choose a weight method."
        )
    return None


def count(config: ReftConfig, facts: SiteFacts) -> int:
    """R, W and b."""
    return config.r * (2 * facts.width + 1)


METHOD = Method(
    name="reft", config=ReftConfig, part=Reft, sites=("block",), identity_at_init=True, count=count, refuses=refuses
)
