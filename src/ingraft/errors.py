"""The one exception a user is meant to read.

Every refusal in Ingraft is an `IngraftError`: it names what was wrong, where, and what to do, and it lists all problems found rather than
the first. The command line prints it without a traceback and exits with code 2; anything else that escapes is a defect of ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(word: str, known: Iterable[str], *, count: int = 3) -> str:
    """A hint naming the known words closest to `word`, or an empty string: `" (did you mean 'q_proj'?)"`."""
    close = get_close_matches(word, list(known), n=count, cutoff=0.55)
    if not close:
        return ""
    return " (did you mean " + " or ".join(repr(name) for name in close) + "?)"


class IngraftError(Exception):
    """One or more problems, each a complete sentence addressed to the user.

    Attributes:
        problems: every problem found, in the order in which a user would meet them.
    """

    def __init__(self, *problems: str) -> None:
        self.problems: tuple[str, ...] = problems
        super().__init__("\n".join(problems))
