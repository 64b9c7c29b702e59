"""Small pieces that several methods on weights are made of.

`used` is the rule of numerics in one place: a parameter is rounded to the dtype of what it meets before anything is made of it, so that a
file in that dtype gives the same bits. `recomputed` keeps a branch from holding what is as large as a weight until backward. A `Bank` holds
frozen random matrices that all sites of an adapter use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ingraft.methods.contract import Part, SiteFacts


def used(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter as it is used beside a weight of this dtype, in float32."""
    return parameter.to(dtype).float()


def recomputed(run: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`run(*inputs)`, of which backward is left the inputs alone."""
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return run(*inputs)
    result = checkpoint(run, *inputs, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(result, Tensor)
    return result


def divisors(number: int) -> str:
    """Every divisor, for a message."""
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def kernel_of(facts: SiteFacts) -> tuple[int, ...]:
    """The sizes of a convolution's kernel, () for other layers."""
    return tuple(facts.module.kernel_size) if facts.kind in ("conv1d", "conv2d", "conv3d") else ()  # type: ignore[arg-type]


def groups_of(facts: SiteFacts) -> int:
    """How many groups of channels a convolution treats alike; 1 for other layers."""
    return int(facts.module.groups) if kernel_of(facts) else 1  # type: ignore[arg-type]


class Bank(nn.Module):
    """Frozen matrices that all sites of an adapter use, drawn from a key; kept in its file or drawn again.

    They lie in the dtype of the base beside which they are used, so that no layer makes a copy of its own.
    """

    def __init__(self, tensors: Mapping[str, Tensor], sites: tuple[SiteFacts, ...], *, saved: bool) -> None:
        super().__init__()
        beside = next((p for site in sites for p in site.parameters.values() if p.is_floating_point()), None)
        for name, tensor in tensors.items():
            if beside is not None:
                here = tensor.is_meta or beside.is_meta  # where only sizes are asked for, and beside offloaded weights
                tensor = tensor.to(tensor.device if here else beside.device, beside.dtype)
            self.register_buffer(name, tensor, persistent=saved)


def frozen(part: Part, name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    """One of the matrices of a part's bank, as it is used beside a tensor of this dtype."""
    (bank,) = part.bank
    return bank.get_buffer(name).to(device, dtype)


def bank_of(facts: SiteFacts) -> tuple[Bank]:
    """The bank that the adapter's sites share, as a part keeps it."""
    assert isinstance(facts.shared, Bank)
    return (facts.shared,)


def largest(sites: tuple[SiteFacts, ...]) -> tuple[int, int]:
    """The largest (out, in) among the sites, each on its own."""
    high, wide = (max((site.shape[side] for site in sites), default=1) for side in (0, 1))
    return high, wide
