"""A run folder belongs to one process at a time. The system releases the lock when the process ends, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ingraft.errors import IngraftError

NAME = ".lock"


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is missing.

    Raises:
        IngraftError: another process holds it, or it cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # a system without such locks; two runs in one folder are then the user's to avoid
        run.mkdir(parents=True, exist_ok=True)
        yield
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / NAME).open("a")
    except OSError as error:
        raise IngraftError(f"{run}: cannot be written: {error.strerror or error}.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise IngraftError(
                f"{run}: another process is training in this folder; wait for it, or choose another."
            ) from error
        try:
            yield
        finally:
            (run / NAME).unlink(missing_ok=True)
