"""What an adapter changes at a site, as tensors: its parameters' values minus the base's, for any method that states them.

This is how adapters of different methods become comparable: combining and converting ask here and know no method. Where a method gives its
change as two thin matrices (`WeightPart.low_rank`) they are kept apart, which is exact and cheap; elsewhere the definition is computed in
float32 on the base's weight and the weight taken off again.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ingraft.adapt.compose import own_parameters
from ingraft.adapt.control import host_state
from ingraft.errors import IngraftError
from ingraft.methods.contract import Factors, ParameterPart, Part, WeightPart


@dataclass(frozen=True, kw_only=True, eq=False)
class Change:
    """What one adapter alone changes at one site, float32.

    Attributes:
        factors: of the change of the weight, where the method gives them.
        matrix: that change itself, (out, in), where it does not; None too where the weight stays.
        others: changes of vectors by parameter name: the bias, a norm's weight.
    """

    factors: Factors | None
    matrix: Tensor | None
    others: dict[str, Tensor]

    @property
    def on_weight(self) -> bool:
        """Whether the matrix changes."""
        return self.factors is not None or self.matrix is not None

    def dense(self) -> Tensor:
        """The change of the matrix, (out, in)."""
        if self.factors is not None:
            return self.factors.scale * (self.factors.B_OR.float() @ self.factors.A_RI.float())
        assert self.matrix is not None
        return self.matrix


@torch.no_grad()
def change_of(module: nn.Module, path: str, part: Part) -> Change:
    """What a part changes of the module it sits in.

    Raises:
        IngraftError: its values have another shape than the base's (a head with other labels), so there is no difference.
    """
    state = host_state(module)
    assert state is not None
    kind = state.kind
    if isinstance(part, ParameterPart):
        own = {name: p.detach().float() for name, p in own_parameters(module).items() if p is not None}
        new = part.values(own)
        if unlike := [name for name, value in new.items() if value.shape != own[name].shape]:
            raise IngraftError(
                f"{path}.{unlike[0]}: the adapter holds {list(new[unlike[0]].shape)}, the base {list(own[unlike[0]].shape)}; there is no difference to take."
            )
        others = {name: value.float() - own[name] for name, value in new.items()}
        matrix = others.pop("weight", None) if kind is not None and kind.matrix else None
        return _change(None, None if matrix is None or kind is None else kind.dense(matrix), others)
    assert isinstance(part, WeightPart)
    if (factors := part.low_rank()) is not None:
        return _of_factors(factors)
    own = own_parameters(module)
    stored, b = own["weight"], own.get("bias")
    assert kind is not None and stored is not None
    change = change_of_matrix(part, kind.dense(stored.detach()).float(), None if b is None else b.detach().float())
    if kind.matrix or change.matrix is None:
        return change
    return _change(None, None, {"weight": change.matrix, **change.others})


@torch.no_grad()
def change_of_matrix(part: WeightPart, W: Tensor, b: Tensor | None) -> Change:
    """What a part changes of a weight and a bias, both in float32."""
    if (factors := part.low_rank()) is not None:
        return _of_factors(factors)
    W_new, b_new = part.weight(W, b)
    others = {} if b_new is None else {"bias": b_new - b if b is not None else b_new}
    return _change(None, W_new - W, others)


def _of_factors(factors: Factors) -> Change:
    return _change(factors, None, {} if factors.bias is None else {"bias": factors.bias.float()})


def _change(factors: Factors | None, matrix: Tensor | None, others: dict[str, Tensor]) -> Change:
    """Without what is exactly zero: a method that leaves a parameter alone does not change it."""
    return Change(
        factors=factors,
        matrix=matrix if matrix is not None and bool(matrix.any()) else None,
        others={name: value.detach() for name, value in others.items() if bool(value.any())},
    )


# ----------------------------------------------------------------------------------------------------------------- of low rank


def side_by_side(factors: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum of products as one product, exact: the ranks add up. Scales and weights go into A."""
    A_RI = torch.cat([w * f.scale * f.A_RI.float() for f, w in zip(factors, weights, strict=True)])
    return Factors(B_OR=torch.cat([f.B_OR.float() for f in factors], dim=1), A_RI=A_RI)


@dataclass(frozen=True, kw_only=True, eq=False)
class Spectrum:
    """A change by its singular values: D = U diag(S) V, largest first."""

    U_OR: Tensor
    S_R: Tensor
    V_RI: Tensor

    @property
    def norm(self) -> float:
        """The Frobenius norm of D."""
        return float(self.S_R.double().square().sum().sqrt())

    def error(self, rank: int) -> float:
        """The Frobenius norm of what the best approximation of this rank leaves out."""
        return float(self.S_R[rank:].double().square().sum().sqrt())

    def rank_for(self, share: float) -> int:
        """The smallest rank, at least 1, that leaves out at most this share of the norm."""
        left = self.S_R.double().square().flip(0).cumsum(0).flip(0).sqrt()  # left[k]: what rank k leaves out
        return max(1, int((left > share * self.norm).sum()))

    def factors(self, rank: int, clamp: float | None = None) -> Factors:
        """The best approximation of this rank.

        Args:
            clamp: clip the entries of both factors at this quantile, as Hugging Face PEFT can.
        """
        B_OR, A_RI = self.U_OR[:, :rank] * self.S_R[:rank], self.V_RI[:rank]
        if clamp is not None:
            high = torch.quantile(torch.cat([B_OR.flatten(), A_RI.flatten()]), clamp)
            B_OR, A_RI = B_OR.clamp(-high, high), A_RI.clamp(-high, high)
        return Factors(B_OR=B_OR.contiguous(), A_RI=A_RI.contiguous())


@torch.no_grad()
def spectrum(change: Tensor | Factors) -> Spectrum:
    """Singular values of a change. That of a product of thin matrices is found in their few dimensions (QR of both, then a small matrix)."""
    if isinstance(change, Tensor):
        U_OR, S_R, V_RI = torch.linalg.svd(change.float(), full_matrices=False)
        return Spectrum(U_OR=U_OR, S_R=S_R, V_RI=V_RI)
    if change.A_RI.shape[0] >= min(change.B_OR.shape[0], change.A_RI.shape[1]):
        return spectrum(change.scale * (change.B_OR.float() @ change.A_RI.float()))
    Q_OR, left = torch.linalg.qr(change.B_OR.float())
    P_IR, right = torch.linalg.qr(change.A_RI.float().T)
    U, S_R, V = torch.linalg.svd(change.scale * left @ right.T)
    return Spectrum(U_OR=Q_OR @ U, S_R=S_R, V_RI=V @ P_IR.T)
