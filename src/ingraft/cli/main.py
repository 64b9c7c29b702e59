"""Entry point of `ingraft`: finds the verb, runs it, and turns whatever happens into a message and an exit code.

Two promises are kept here. `ingraft --help` answers at once: a verb's module is imported only when that verb is used, and this file imports
nothing outside the standard library before `main` runs. And Ctrl-C never shows a traceback, wherever it lands: the handler notes the signal
before it raises, because libraries may turn the exception into another one. While something is being imported it does not raise at all but
ends the process: torch's compiled parts call Python as they load, and an exception there aborts with a dump of the stack; Python interrupted
in an `exec` of text (dataclasses are made so) ends itself by the signal, whatever code was asked for. Nothing is lost by that: what is being
written meanwhile has a temporary name until it is whole.

Exit codes: 0 done, 1 a defect of ours, 2 bad input, 130 Ctrl-C, 143 SIGTERM.
"""

from __future__ import annotations

import os
import signal
import sys
import warnings
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TextIO

if TYPE_CHECKING:
    from collections.abc import Sequence

    import click


_STOPPED: dict[int, str] = {signal.SIGINT: "interrupted.", signal.SIGTERM: "stopped by SIGTERM."}


class Terminated(BaseException):
    """SIGTERM, raised in the main thread so that `with` blocks and `finally` clauses run before the process ends."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        argv: the words after `ingraft`; the process's own by default.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> NoReturn:
        if _importing(frame):
            _complain(_STOPPED[number])
            os._exit(128 + number)
        received.append(number)
        if number == signal.SIGTERM:
            raise Terminated
        raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _run(args)
    except BaseException as error:
        if isinstance(error, BrokenPipeError):
            return _reader_gone()
        for number in before:  # from here on a second Ctrl-C ends the process at once
            signal.signal(number, signal.SIG_DFL)
        if debug and not isinstance(error, SystemExit):
            import traceback

            traceback.print_exc()
        return _exit_code(error, received, debug=debug)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _reader_gone() -> int:
    """`ingraft methods | head` has read enough. Python would complain once more when it flushes at exit, so give it somewhere to write."""
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - a descriptor is wanted, not a path
        os.dup2(nowhere.fileno(), sys.__stdout__.fileno() if sys.__stdout__ is not None else 1)
    return 0


def _run(args: list[str]) -> int:
    # What libraries would print in the middle of our output; `setdefault`, because a person may have asked for it.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.showwarning = _show_warning
    from click.exceptions import Exit

    from ingraft.cli.verbs import cli

    # Not `cli.main`: it would turn a closed pipe and Ctrl-C into exit codes of its own.
    try:
        with cli.make_context("ingraft", args) as context:
            cli.invoke(context)
    except Exit as done:
        return done.exit_code
    return 0


def _exit_code(error: BaseException, received: list[int], *, debug: bool) -> int:
    from click import Abort, ClickException

    from ingraft.errors import IngraftError

    if signal.SIGTERM in received or isinstance(error, Terminated):
        _complain(_STOPPED[signal.SIGTERM])
        return 143
    if signal.SIGINT in received or isinstance(error, KeyboardInterrupt | Abort):
        _complain(
            f"interrupted. {error}" if isinstance(error, KeyboardInterrupt) and str(error) else _STOPPED[signal.SIGINT]
        )
        return 130
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, IngraftError):
        _complain(*error.problems)
        return 2
    if isinstance(error, ClickException):
        _complain(*_usage(error))
        return 2
    _complain(
        f"a defect of ours: {type(error).__name__}: {error}",
        "nothing of yours is the cause as far as we know."
        + ("" if debug else " Run again with --debug for the traceback to report."),
    )
    return 1


def _usage(error: click.ClickException) -> list[str]:
    lines = error.format_message().splitlines()
    context = getattr(error, "ctx", None)
    if context is not None:
        lines.append(f"`{context.command_path} --help` explains every option.")
    return lines


def _complain(*problems: str) -> None:
    sys.stdout.flush()
    for problem in problems:
        print(f"ingraft: {problem}", file=sys.stderr)  # noqa: T201


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line a warning: where in which library it was raised helps no user of a command."""
    del category, filename, lineno, line
    print(f"note: {message}", file=file or sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
