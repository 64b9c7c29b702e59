"""A weighted sum of LoRA adapters as a LoRA adapter of its own.

With changes D_i = s_i B_i A_i and weights w_i the sum is D = sum(w_i D_i). Its factors, with scale 1:

* cat: the factors side by side; exact, the ranks add up.
* svd: the best approximation of D at a given rank; exact where that is the sum of the ranks.
* linear: A = sum(c_i A_i), B = sum(c_i B_i) with c_i = sqrt(w_i s_i); the incumbent's way, cheap and not D (its mixed terms stay).

The matrices are those of `adapt.weights` (out, in), so any kind of layer is served by the same lines. Because the scale s_i is read from the
adapter and not worked out again, one adapter with weight 1 gives itself back, whatever its variant's scale.

Legend: O out, I in, R rank.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt.building import WHOLE_ROLE
from ingraft.adapt.control import Adapter, part_of, require_control
from ingraft.adapt.lifecycle import attach
from ingraft.adapt.peft_format import names_for
from ingraft.adapt.select import base_modules
from ingraft.errors import IngraftError
from ingraft.methods.contract import Part
from ingraft.methods.lora import LoRA, LoraConfig

WAYS = ("svd", "linear", "cat")


def combine(model: Any, weights: Mapping[str, float], name: str, *, how: str = "svd", rank: int | None = None) -> None:
    """Attach the weighted sum of LoRA adapters as a new one, which then acts alone.

    Args:
        weights: factor of each adapter.
        how: svd, linear or cat; see the header.
        rank: of the new adapter (svd only); the largest of the given ones by default.

    Raises:
        IngraftError: for adapters that are no LoRA, that train whole modules, or whose ranks do not fit the way. Nothing is then changed.
    """
    control = require_control(model)
    adapters = [control.require(other) for other in weights]
    problems = [
        f"{adapter.name}: {why}, so it cannot be combined."
        for adapter in adapters
        if (
            why := "is no LoRA"
            if adapter.method.part is not LoRA
            else "trains modules in full"
            if adapter.saved_whole
            else ""
        )
    ]
    if how not in WAYS:
        problems.append(f"combination_type must be one of {', '.join(WAYS)}, got {how!r}.")
    ranks = [adapter.config.r for adapter in adapters if isinstance(adapter.config, LoraConfig)]
    if how == "linear" and len(set(ranks)) > 1:
        problems.append(f"linear: the ranks differ ({ranks}); use svd or cat.")
    if how == "linear" and any(weight < 0 for weight in weights.values()):
        problems.append("linear: weights must not be negative; use svd or cat.")
    if not adapters:
        problems.append("no adapter was given.")
    if problems:
        raise IngraftError(*problems)
    r = {"cat": sum(ranks), "linear": ranks[0], "svd": rank or max(ranks)}[how]
    modules = base_modules(model)
    paths = {path for adapter in adapters for path in adapter.sites}
    config = LoraConfig(r=r, lora_alpha=r, target_modules=tuple(names_for(paths, modules)))

    @torch.no_grad()
    def fill(adapter: Adapter, parts: dict[str, Part], shared: nn.Module | None) -> None:
        del shared
        for path, part in parts.items():
            assert adapter.sites[path] != WHOLE_ROLE and isinstance(part, LoRA)
            found = [
                (weights[a.name], own) for a in adapters if isinstance(own := part_of(modules[path], a.name), LoRA)
            ]
            A_RI, B_OR = _factors(found, how, r)
            part.lora_A.zero_()[: A_RI.shape[0]] = A_RI
            part.lora_B.zero_()[:, : B_OR.shape[1]] = B_OR

    attach(model, config, name, fill=fill)


def _factors(found: list[tuple[float, LoRA]], how: str, rank: int) -> tuple[Tensor, Tensor]:
    """A and B of the sum at one site, of at most this rank."""
    if how == "cat":
        return torch.cat([w * part.scale * part.lora_A for w, part in found]), torch.cat(
            [part.lora_B for _, part in found], dim=1
        )
    if how == "linear":
        shares = [(math.sqrt(w * part.scale), part) for w, part in found]
        return sum_of([c * part.lora_A for c, part in shares]), sum_of([c * part.lora_B for c, part in shares])
    D_OI = sum_of([w * part.scale * (part.lora_B @ part.lora_A) for w, part in found])
    U_OR, S_R, V_RI = torch.linalg.svd(D_OI.float(), full_matrices=False)
    return V_RI[:rank], U_OR[:, :rank] * S_R[:rank]


def sum_of(tensors: list[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack(tensors).sum(0)
