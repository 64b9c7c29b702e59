"""What methods share that turn a weight's inputs: rows x become x T, and so W' = W T'. T is orthogonal, or nearly so.

A layer with inputs worth turning sees x T ahead of its own product, which costs a product with T's factors and never forms W'. An embedding's
inputs are ids; there the vectors it returns are turned instead. A convolution's columns are a kernel's entries, which no input lies along:
there the definition runs by itself.

Legend: O out, I in, D the width that is turned, N number of blocks, S their size.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from ingraft.methods.contract import MethodConfig, ShortcutPart, Site, SiteFacts


def turned_width(facts: SiteFacts) -> int:
    """D: the inputs of a layer, the vector of an embedding."""
    return facts.shape[0] if facts.kind == "embedding" else facts.shape[1]


def divisors(width: int, of: int = 1) -> str:
    """The sizes of two and more that divide a width, in words; multiples of `of` alone."""
    found = [str(size) for size in range(2, width + 1) if width % size == 0 and size % of == 0]
    return ", ".join(found) or "none"


def cayley(Q_NSS: Tensor) -> Tensor:
    """What (I - Q)(I + Q)^-1, orthogonal for skew-symmetric Q, differs by from I: -2 Q (I + Q)^-1."""
    eye_SS = torch.eye(Q_NSS.shape[-1], device=Q_NSS.device, dtype=Q_NSS.dtype)
    return torch.linalg.solve(eye_SS + Q_NSS, -2 * Q_NSS, left=False)


def series(Q_NSS: Tensor, terms: int) -> Tensor:
    """What the first terms of (I + Q)(I - Q)^-1 = I + 2 Q + 2 Q^2 + ... differ by from I. The last has a factor of one, as in PEFT, where four
    terms are those that three are too."""
    change_NSS = 2 * Q_NSS
    if terms == 2:
        return change_NSS
    power_NSS = Q_NSS
    for _ in range(max(terms, 4) - 3):
        power_NSS = power_NSS @ Q_NSS
        change_NSS = change_NSS + 2 * power_NSS
    return change_NSS + power_NSS @ Q_NSS


def skew(R_NE: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from the entries above their diagonals, row by row."""
    rows, columns = torch.triu_indices(size, size, 1, device=R_NE.device)
    Q_NSS = R_NE.new_zeros(R_NE.shape[0], size, size)
    Q_NSS[:, rows, columns] = R_NE
    return Q_NSS - Q_NSS.transpose(1, 2)


def blockwise(x: Tensor, change_NSS: Tensor) -> Tensor:
    """Rows of x (..., N S) times the block-diagonal matrix of blocks I + change; the change apart, whose small numbers half precision keeps."""
    blocks = x.reshape(*x.shape[:-1], *change_NSS.shape[:2])
    return x + torch.einsum("...ns,nst->...nt", blocks, change_NSS.to(x.dtype)).reshape(x.shape)


def uneven_kernel(_: MethodConfig, facts: SiteFacts) -> str | None:
    """Why PEFT computes something else by a convolution whose call it rebuilds: from one number for both dimensions, without groups."""
    layer: object = facts.module
    if not isinstance(layer, nn.Conv2d):
        return None
    pairs = (layer.kernel_size, layer.stride, layer.padding)
    even = not isinstance(layer.padding, str) and all(len(set(pair)) == 1 for pair in pairs)
    if even and set(layer.dilation) == {1} and layer.groups == 1 and layer.padding_mode == "zeros":
        return None
    return "PEFT takes every convolution for one with a square kernel, even strides and zero padding, without dilation or groups"


class Rotation(ShortcutPart):
    """A part that turns. Abstract."""

    composition = "chain"
    kinds = frozenset({"linear", "conv1d-transposed", "embedding"})

    def __init__(self, facts: SiteFacts) -> None:
        super().__init__()
        self.on_output = facts.kind == "embedding"

    @abstractmethod
    def turn(self, x: Tensor, dtype: torch.dtype, *, back: bool = False) -> Tensor:
        """x T (with `back` x T'), in the dtype of x, from parameters as they are used beside tensors of `dtype`."""

    def factor(self) -> Tensor | None:
        """A factor for every output besides (O), or None."""
        return None

    def weight(self, W: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        turned = self.turn(W.T.float(), W.dtype).T if self.on_output else self.turn(W.float(), W.dtype, back=True)
        if (s_O := self.factor()) is not None:
            turned = turned * s_O.to(W.dtype).float()[:, None]
        return turned.to(W.dtype), b

    def before(self, x: Tensor, site: Site) -> Tensor:
        return x if self.on_output else self.turn(x, x.dtype)

    def after(self, x: Tensor, y: Tensor, site: Site) -> Tensor:
        y = self.turn(y, y.dtype) if self.on_output else y
        return y if (s_O := self.factor()) is None else y * site.out(s_O.to(y.dtype))
