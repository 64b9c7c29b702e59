"""What the machine is, what it is told before training, and how much of it was used."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

log = logging.getLogger(__name__)

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3


def keep_freed_memory() -> bool:
    """Tell glibc's allocator to keep memory that is freed instead of giving it back to the system, for the rest of the process.

    Training allocates and frees the same large tensors in every step. By default each of them is mapped anew, and the system zeroes its
    pages again; keeping them takes that time away. The few largest blocks (32 MiB and more, as large a threshold as glibc takes) are still
    mapped one by one: with everything in one heap, peak memory went on growing (docs/lab-notes.md). What a
    person has set by environment stays.

    Returns:
        whether it was done.
    """
    if any(
        name in os.environ
        for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
    ):
        return False
    if sys.platform != "linux" or platform.libc_ver()[0] != "glibc" or torch.cuda.is_available():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    done = [mallopt(_MMAP_THRESHOLD, 32 << 20), mallopt(_TRIM_THRESHOLD, 2**31 - 1), mallopt(_TOP_PAD, 64 << 20)]
    if all(done):
        log.info("Freed memory is kept for reuse (mallopt); set MALLOC_TOP_PAD_ to decide otherwise.")
    return all(done)


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes: of the GPU if one is in use, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment() -> dict[str, Any]:
    """Versions and machine, as JSON data, for manifests and reports."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for name in ("ingraft", "torch", "transformers", "accelerate", "safetensors"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    return {"versions": versions, "machine": machine}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"
