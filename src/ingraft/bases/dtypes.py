"""Which dtype and device a base is held in where the user leaves it open.

torch is imported by the functions, so `ingraft models` answers at once.
"""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING

from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def as_dtype(dtype: str | torch.dtype, device: str | torch.device | None = None) -> torch.dtype:
    """The torch dtype that a recipe's `dtype` means here.

    Raises:
        IngraftError: not a dtype that a base can be held in.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fast_dtype(str(device if device is not None else default_device()))
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise IngraftError(f"dtype: {dtype!r} is none of auto, {', '.join(known)}{nearest(dtype, ['auto', *known])}.")
    return known[dtype]


def default_device() -> torch.device:
    """The device used where none is named: CUDA if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where a product of a model's shape is at least 1.3 times as fast in it as in float32, else float32. Measured once.

    The two are timed in turn and the best of each counts, so that work beside this one slows both or neither: a machine's answer must not
    depend on what else it does, since the dtype decides a run's digits.
    """
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    dtypes = (torch.float32, torch.bfloat16)
    pairs = [tuple(torch.ones(n, 576, dtype=dtype, device=device) for n in (512, 1536)) for dtype in dtypes]
    best = [float("inf")] * len(dtypes)
    for _ in range(25):
        for i, (x, w) in enumerate(pairs):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w).sum().item()
            best[i] = min(best[i], time.perf_counter() - began)
    full, half = best
    chosen = torch.bfloat16 if half * 1.3 < full else torch.float32
    log.info("dtype auto: bfloat16 runs %.1f times as fast as float32 here; using %s.", full / half, str(chosen)[6:])
    return chosen
