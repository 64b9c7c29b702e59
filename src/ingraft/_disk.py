"""Single operations on the disk, each announced to a test's hook before it happens.

`ingraft.durable` composes them into saves; nothing else imports this file. They are apart because what is true of one operation (it is
announced, it is flushed, its temporary name says whose it is) and what is true of a whole save are read, and tested, separately.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

Fault = Callable[[int, str, Path], int | None]
"""`hook(n, kind, path)` before operation n. It may raise, or exit; for "write" it may return how many bytes still fit the disk."""

_TEMPORARY = re.compile(r"(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{8}\.(?P<kind>tmp|old)")
_PIECE = 1 << 24
LIVE: set[str] = set()
"""Temporary names that this process is using now."""


class _Hook:
    """The test hook and the number of operations since it was set."""

    fault: Fault | None = None
    count = 0


def set_fault(hook: Fault | None) -> None:
    """Install a hook that is called before every operation on the disk, counted from 0; None removes it. For tests."""
    _Hook.fault, _Hook.count = hook, 0


def announce(kind: str, path: Path) -> int | None:
    """Tell the hook what comes next. It may raise instead; for a write it may say how many bytes still fit."""
    n, _Hook.count = _Hook.count, _Hook.count + 1
    return _Hook.fault(n, kind, path) if _Hook.fault is not None else None


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def temporary(path: Path, kind: str) -> Path:
    """A sibling's name that says whose it is: "tmp" is being made, "old" is being replaced."""
    return path.with_name(f".{path.name[:120]}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.{kind}")


def leftovers(path: Path) -> list[tuple[Path, str]]:
    """Temporary siblings of `path` whose process is gone, by name."""
    prefix = f".{path.name[:120]}."
    found: list[tuple[Path, str]] = []
    with contextlib.suppress(OSError):
        for item in sorted(path.parent.iterdir()):
            match = _TEMPORARY.fullmatch(item.name, len(prefix)) if item.name.startswith(prefix) else None
            if match and match["host"] == _host() and item.name not in LIVE and not _alive(int(match["pid"])):
                found.append((item, match["kind"]))
    return found


def _alive(pid: int) -> bool:
    if pid == os.getpid():
        return False  # ours, and not in LIVE: the save was given up
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    return True


def make_parents(path: Path) -> None:
    """The folder and those above it, as far as they are missing."""
    if not path.is_dir():
        make_parents(path.parent)
        announce("mkdir", path)
        path.mkdir(exist_ok=True)


def write_new(path: Path, data: bytes) -> None:
    """A new file, flushed to the disk."""
    announce("open", path)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        write_all(descriptor, path, data)
        announce("fsync", path)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, path: Path, data: bytes) -> None:
    """Write to an open file, however few bytes the system takes at a time."""
    view = memoryview(data)
    while view:
        piece = view[:_PIECE]
        room = announce("write", path)
        try:
            if room is not None and room < len(piece):
                os.write(descriptor, piece[:room])
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            view = view[os.write(descriptor, piece) :]
        except OSError as error:
            error.needed = len(data)  # pyright: ignore[reportAttributeAccessIssue]  # for durable's message
            raise


def sync(path: Path) -> None:
    """Flush a file, or a folder with all it holds, that someone else wrote."""
    if path.is_dir():
        for item in sorted(path.iterdir()):
            sync(item)
        sync_folder(path)
    else:
        _flush(path, os.O_RDWR)


def _flush(path: Path, flags: int) -> None:
    announce("fsync", path)
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Flush a folder's list of names."""
    if os.name != "nt":  # a folder cannot be opened there, and its entries are journalled
        _flush(path, os.O_RDONLY)


def rename(old: Path, new: Path) -> None:
    """Give a file or folder its final name; a file there is replaced in the same instant."""
    announce("rename", new)
    old.replace(new)


def discard(path: Path) -> None:
    """Remove a temporary; if that fails it is left to `recover`."""
    with contextlib.suppress(OSError):
        remove(path)


def remove(path: Path) -> None:
    """Remove a file, link or whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        announce("rmtree", path)
        shutil.rmtree(path)
    elif path.exists() or path.is_symlink():
        announce("unlink", path)
        path.unlink()
