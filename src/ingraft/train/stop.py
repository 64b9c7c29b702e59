"""Ctrl-C and SIGTERM while training: finish what must be finished, save, leave. A second signal ends at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """Raised at a safe point after a signal. No `Exception`, so that nothing on the way takes it for an error."""


class Stop:
    """Whether a signal has come.

    Attributes:
        received: its number, 0 if none.
    """

    def __init__(self) -> None:
        self.received = 0

    def check(self) -> None:
        """A safe point: raises if a signal has come.

        Raises:
            Stopped: see above.
        """
        if self.received:
            raise Stopped

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Inside the block the first SIGINT or SIGTERM is noted; what was installed before gets the second."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread install handlers
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            del frame
            self.received = number
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
