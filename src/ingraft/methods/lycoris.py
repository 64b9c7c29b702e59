"""What files of kohya-ss' scripts, LyCORIS and diffusers mean: tensors and an alpha for each module, and no config.

The names are LyCORIS' (Yeh et al., arXiv:2309.14859). A module without an alpha has its rank for one, so that its scale is 1. Sizes are not
compared here: the tensors are, when they are put in place.

Legend: R rank, I in, C channels of a kernel's input, K its positions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ingraft.errors import IngraftError
from ingraft.methods.layout import Modules
from ingraft.methods.ranked import by_site

LYCORIS_LORA = frozenset({"lora_down", "lora_up"})

Found = tuple[dict[str, Any], dict[str, dict[str, Tensor]]]
"""Options of a config, and tensors by path and our name."""


def _alphas(modules: Modules, ranks: Mapping[str, int]) -> dict[str, float]:
    return {path: float(own["alpha"]) if "alpha" in own else float(ranks[path]) for path, own in modules.items()}


def lora_options(modules: Modules) -> Found:
    """`lora_down` and `lora_up`; a core between them (`lora_mid`, for kernels) is multiplied into the lower one, which changes nothing."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for path, own in modules.items():
        A_RI = own["lora_down"].flatten(1)
        if "lora_mid" in own:
            A_RI = torch.einsum("abK,bC->aCK", own["lora_mid"].flatten(2), A_RI).flatten(1)
        tensors[path] = {"lora_A": A_RI, "lora_B": own["lora_up"].flatten(1)}
    ranks = {path: len(own["lora_A"]) for path, own in tensors.items()}
    return by_site(ranks, _alphas(modules, ranks), "lora_alpha"), tensors


def dora_options(modules: Modules) -> Found:
    """The same with a norm for each output, `dora_scale`."""
    options, tensors = lora_options(modules)
    for path, own in modules.items():
        scale = own["dora_scale"]
        if scale.numel() != len(own["lora_up"]) or (scale.dim() > 1 and scale.shape[0] == 1 != scale.numel()):
            raise IngraftError(
                f"{path}: dora_scale has shape {list(scale.shape)}: norms over each input, as older versions of LyCORIS took them, are another method; "
                "convert the file with a version that writes norms of outputs (wd_on_out)."
            )
        tensors[path]["magnitude"] = scale.flatten()
    return options, tensors


def loha_options(modules: Modules) -> Found:
    """`hada_w1_a` to `hada_w2_b`, with cores `hada_t1`, `hada_t2` for kernels."""
    tensors = {path: {name: value for name, value in own.items() if name != "alpha"} for path, own in modules.items()}
    ranks = {path: len(own["hada_w1_b"]) for path, own in tensors.items()}
    options = by_site(ranks, _alphas(modules, ranks), "alpha")
    return options | {"use_effective_conv2d": any("hada_t1" in own for own in tensors.values())}, tensors


def lokr_options(modules: Modules) -> Found:
    """`lokr_w1`, `lokr_w2`, either as two factors, with a core `lokr_t2` for kernels. Where both are whole the scale is 1, whatever alpha says."""
    tensors = {path: {name: value for name, value in own.items() if name != "alpha"} for path, own in modules.items()}
    ranks: dict[str, int] = {}
    for path, own in tensors.items():
        thin = own.get("lokr_w2_b", own.get("lokr_w1_b"))
        ranks[path] = len(thin) if thin is not None else max(own["lokr_w2"].shape[:2])
    alphas = _alphas(modules, ranks)
    alphas |= {path: float(ranks[path]) for path, own in tensors.items() if "lokr_w1" in own and "lokr_w2" in own}
    return by_site(ranks, alphas, "alpha") | {
        "use_effective_conv2d": any("lokr_t2" in own for own in tensors.values()),
        "decompose_both": any("lokr_w1_a" in own for own in tensors.values()),
        "decompose_factor": _factor(tensors.values()),
    }, tensors


def factors(size: int, wanted: int) -> tuple[int, int]:
    """Two numbers whose product is `size`: `wanted` first if it divides it, else the largest divisor up to it and to the square root."""
    if wanted > 0 and size % wanted == 0:
        return wanted, size // wanted
    most = math.isqrt(size) if wanted < 0 else min(wanted, math.isqrt(size))
    first = next(n for n in range(most, 0, -1) if size % n == 0)
    return first, size // first


def _factor(modules: Iterable[Mapping[str, Tensor]]) -> int:
    """The option `decompose_factor` that splits every layer the way these tensors are: -1 where that is as near to square as divisors allow."""
    splits: set[tuple[int, int]] = set()
    for own in modules:
        first = own["lokr_w1"].shape if "lokr_w1" in own else (len(own["lokr_w1_a"]), own["lokr_w1_b"].shape[1])
        if "lokr_w2" in own:
            second = own["lokr_w2"].shape[:2]
        elif "lokr_t2" in own:
            second = (own["lokr_w2_a"].shape[1], own["lokr_w2_b"].shape[1])
        else:
            second = (len(own["lokr_w2_a"]), 0)  # its columns may run over a kernel too
        splits |= {(small, small * large) for small, large in zip(first, second, strict=True) if large}
    candidates = [-1, *sorted({small for small, _ in splits}, reverse=True)]
    for wanted in candidates:
        if all(factors(size, wanted)[0] == small for small, size in splits):
            return wanted
    raise IngraftError(f"LoKr: no decompose_factor splits the layers as this file has it ({sorted(splits)[:6]}).")
