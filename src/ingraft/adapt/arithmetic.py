"""Ways of mixing several adapters' tensors into one: plain sums, and the pruned ones of the merging literature.

* sum: sum(w_i T_i) (task arithmetic, Ilharco et al. 2023, arXiv:2212.04089).
* magnitude_prune: of each T_i only the share `density` of largest entries is kept before summing.
* dare: of each T_i a random share `density` is kept and divided by it, so that the expectation stays (Yu et al. 2024, arXiv:2311.03099).
* ties: pruned by magnitude; then every entry elects a sign, and only the tensors that agree with it are averaged (Yadav et al. 2023,
  arXiv:2306.01708). dare_ties: the same behind random pruning.

Each may run over the factors of low-rank changes (cheap, the incumbent's plain names, with the mixed terms that a product of sums has), or over
the changes themselves (`..._svd`), which is what the papers describe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Prune = Literal["", "magnitude", "random"]


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of combining.

    Attributes:
        over: what is mixed: the factors "apart" from each other, the factors "side by side" (exact, ranks add up), or the "changes".
        prune: which entries of each tensor are kept: all (""), the largest, or random ones.
        elect: whether entries elect a sign.
    """

    over: Literal["apart", "side by side", "changes"]
    prune: Prune = ""
    elect: bool = False


WAYS: Mapping[str, Way] = {
    "svd": Way(over="changes"),
    "cat": Way(over="side by side"),
    "linear": Way(over="apart"),
    "ties": Way(over="apart", prune="magnitude", elect=True),
    "ties_svd": Way(over="changes", prune="magnitude", elect=True),
    "dare_linear": Way(over="apart", prune="random"),
    "dare_linear_svd": Way(over="changes", prune="random"),
    "dare_ties": Way(over="apart", prune="random", elect=True),
    "dare_ties_svd": Way(over="changes", prune="random", elect=True),
    "magnitude_prune": Way(over="apart", prune="magnitude"),
    "magnitude_prune_svd": Way(over="changes", prune="magnitude"),
}
"""The ways by name, Hugging Face PEFT's names."""

ALIASES = {"dare": "dare_linear", "dare_svd": "dare_linear_svd"}


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """A way with its settings.

    Attributes:
        way: see `WAYS`.
        density: the share of entries that pruning keeps.
        majority: how a sign is elected: by the "total" of the values, or by the "frequency" of the signs.
    """

    way: Way
    density: float = 1.0
    majority: Literal["total", "frequency"] = "total"

    @property
    def plain(self) -> bool:
        """Whether it is a weighted sum and nothing else."""
        return self.way.prune == "" and not self.way.elect

    def __call__(self, tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Mix tensors of one shape."""
        pruned = torch.stack([self._pruned(tensor) for tensor in tensors])
        factors = torch.tensor(weights, dtype=pruned.dtype, device=pruned.device)
        weighted = pruned * factors.reshape(-1, *[1] * (pruned.dim() - 1))
        if not self.way.elect:
            return weighted.sum(0)
        votes = (pruned if self.majority == "total" else pruned.sign()).sum(0)
        agrees = pruned.sign() == torch.where(votes >= 0, 1.0, -1.0)
        return (weighted * agrees).sum(0) / agrees.sum(0).clamp(min=1)

    def _pruned(self, tensor: Tensor) -> Tensor:
        if self.way.prune == "" or self.density >= 1:
            return tensor
        if self.way.prune == "random":
            return tensor * torch.bernoulli(torch.full_like(tensor, self.density)) / self.density
        kept = torch.zeros_like(tensor).flatten()
        kept[tensor.abs().flatten().topk(int(self.density * tensor.numel())).indices] = 1
        return tensor * kept.reshape(tensor.shape)
