"""What a run says while it runs: `log.jsonl` for programs, a progress bar or plain lines for people.

What its lines hold is described in docs/log.md. The log is the run's record and survives a restart: going on from a checkpoint first takes back the lines of steps that will be made again.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ingraft import durable

RATE = "_per_second"
"""How the names of rates end: what is counted depends on the task."""

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Journal:
    """See the module docstring. Everything for people goes to standard error."""

    def __init__(self, path: Path, *, quiet: bool = False) -> None:
        self.path, self.quiet = path, quiet
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._handler: logging.Handler | None = None
        self._first = self._total = 0
        self._shown = ""
        self._began = time.perf_counter()

    def rewind(self, step: int) -> None:
        """Take back the lines of steps after `step`, and a last line that was cut short."""
        kept = [line for line in entries(self.path) if line.get("step", 0) <= step]
        durable.write_file(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """A line of the log. Numbers that JSON does not know become null."""
        durable.append_line(self.path, json.dumps(_jsonable(values)))

    def say(self, text: str) -> None:
        """A line for people."""
        if self.quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False)
        else:
            sys.stderr.write(text + "\n")
            sys.stderr.flush()

    def step(self, done: int, values: Mapping[str, float]) -> None:
        """A step was made; `values` are shown on a bar, and as a line where there is no bar and a log line was written."""
        if self._bar is not None and self._task is not None:
            if "loss" in values:
                self._shown = f"loss {values['loss']:.3f}"
            self._bar.update(self._task, completed=done, shown=self._shown)
        elif "loss" in values:
            rate, unit = rate_of(values)
            left = (time.perf_counter() - self._began) / max(1, done - self._first) * (self._total - done)
            self.say(
                f"step {done}/{self._total}  loss {values['loss']:.4f}  lr {values['learning_rate']:.2e}  "
                f"{values['step_seconds']:.2f} s/step  {rate:.0f} {unit}/s  {_clock(left)} left"
            )

    def begin(self, done: int, total: int) -> None:
        """Start showing progress, at step `done` of `total`."""
        self._first, self._total, self._began = done, total, time.perf_counter()
        if self.quiet or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._bar.add_task("training", total=total, completed=done, shown="")
        self._bar.start()

    def end(self) -> None:
        """Stop showing progress."""
        if self._bar is not None:
            self._bar.stop()
        self._bar = None

    def listen(self) -> None:
        """Show what the package's own loggers have to say, until `hush`."""
        self._handler = _Handler(self)
        logger = logging.getLogger("ingraft")
        self._level = logger.level
        logger.addHandler(self._handler)
        logger.setLevel(logging.INFO)

    def hush(self) -> None:
        """Undo `listen`."""
        if self._handler is not None:
            logger = logging.getLogger("ingraft")
            logger.removeHandler(self._handler)
            logger.setLevel(self._level)
            self._handler = None


class _Handler(logging.Handler):
    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.INFO)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.say(record.getMessage())


def rate_of(line: Mapping[str, Any]) -> tuple[float, str]:
    """How much a line of steps says was done a second, and of what."""
    name = next(name for name in line if name.endswith(RATE) and not name.startswith("learned_"))
    return line[name], name.removesuffix(RATE)


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log, without one that a crash cut short."""
    if not path.is_file():
        return []
    found: list[dict[str, Any]] = []
    for line in durable.read_bytes(path).decode("utf-8", "replace").splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(cast(dict[str, Any], value))
    return found


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in cast(dict[str, Any], value).items()}
    return value


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
