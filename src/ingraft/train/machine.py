"""What the machine is, what it is told before training, and how much of it was used."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
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


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still take: on a GPU what nobody holds, else the least of what the system has available, what the control
    groups of the process (a container's limit) leave, and what its own limit of address space (`ulimit -v`) leaves. None where none of them is told.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = [_available(), _left_by_groups(), _left_by_limit()]
    return min((room for room in found if room is not None), default=None)


def _available(file: Path = Path("/proc/meminfo")) -> int | None:
    lines = _text(file).splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def _left_by_groups(member: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """The least that any control group of this process leaves, of version 2 or 1; cached file pages count as free.

    In a container the path that is told may be the host's, and the group itself lies at the root.
    """
    rooms: list[int] = []
    for line in _text(member).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, names = (root, ("memory.max", "memory.current", "inactive_file"))
        if controllers:
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        place = base / path.lstrip("/")
        for group in (place, *place.parents):
            limit, used = _text(group / names[0]).strip(), _text(group / names[1]).strip()
            if limit.isdigit() and used.isdigit() and int(limit) < 1 << 60:  # version 1 says "none" by a huge number
                counts = dict(line.split() for line in _text(group / "memory.stat").splitlines() if " " in line)
                rooms.append(max(0, int(limit) - int(used) + int(counts.get(names[2], 0))))
            if group == base:
                break
    return min(rooms, default=None)


def _left_by_limit() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    sizes = _text(Path("/proc/self/statm")).split()
    if limit == resource.RLIM_INFINITY or not sizes:
        return None
    return max(0, limit - int(sizes[0]) * resource.getpagesize())


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


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
