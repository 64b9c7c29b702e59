"""What a person has before them: prompts whose answers wait for an order, and the file in which the orders are kept.

Every order is a line of the file as soon as it is given, so that nothing is lost with the page or the process; what the file holds already is not asked
again. The answers are shown in an order of their own, drawn from the prompt, because people like what comes first.
"""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ingraft import durable
from ingraft.errors import IngraftError

Prompt = str | list[dict[str, str]]
"""As a row has it: a question, or the turns of a conversation."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt with its answers."""

    prompt: Prompt
    responses: list[str]


class Desk:
    """Holds questions and takes their orders. Safe to use from several threads."""

    def __init__(self, target: Path, prompts: Iterable[Prompt]) -> None:
        """Args:
        target: the file of ranked rows; it may hold some already.
        prompts: those that are to be ranked.

        Raises:
            IngraftError: the file holds something else, or its folder is not there.
        """
        if not target.parent.is_dir():
            raise IngraftError(f"--output {target}: there is no folder {target.parent}.")
        self.target = target
        self.complete = threading.Event()
        self.known = {as_key(row["prompt"]) for row in _ranked(target)}
        self.total = len(self.known.union(map(as_key, prompts)))
        self._lock = threading.Lock()
        self._open: dict[int, Question] = {}
        self._given: list[tuple[int, Question]] = []
        self._number = self._skipped = 0
        self._earlier, self._filling = len(self.known), True

    def put(self, question: Question) -> None:
        """Lay a question on the desk."""
        shown = list(question.responses)
        random.Random(f"ingraft rank {as_key(question.prompt)}").shuffle(shown)
        with self._lock:
            self._open[self._number] = Question(prompt=question.prompt, responses=shown)
            self._number += 1

    def full(self) -> None:
        """No further question comes."""
        with self._lock:
            self._filling = False
            self._look()

    @property
    def given(self) -> int:
        """Orders given since this desk was opened."""
        return len(self._given)

    def state(self) -> dict[str, Any]:
        """The first open question and how far the person is, for the page."""
        with self._lock:
            number = next(iter(self._open), None)
            asked = self._open[number] if number is not None else None
            return {
                "ranked": self._earlier + len(self._given),
                "skipped": self._skipped,
                "total": self.total,
                "waiting": len(self._open),
                "more": self._filling,
                "undo": bool(self._given),
                "question": None
                if asked is None
                else {"number": number, "prompt": _turns(asked.prompt), "responses": asked.responses},
            }

    def rank(self, number: int, places: Sequence[int]) -> None:
        """Keep the order of a question's answers: the place of each in turn, 1 the best; equal places are a tie.

        Raises:
            IngraftError: no such open question, or no such order; the disk refused. Nothing is changed then.
        """
        with self._lock:
            question = self._question(number)
            wanted = len(question.responses)
            whole = all(type(place) is int and 1 <= place <= wanted for place in places)
            if len(places) != wanted or not whole or len(set(places)) < 2:
                raise IngraftError(
                    f"ranking: {wanted} places from 1 to {wanted} are needed, not all the same, got {list(places)!r}."
                )
            row = {"prompt": question.prompt, "responses": question.responses, "ranking": list(places)}
            durable.append_line(self.target, json.dumps(row, ensure_ascii=False))
            del self._open[number]
            self._given.append((number, question))
            self._look()

    def skip(self, number: int) -> None:
        """Put a question aside; it is asked again the next time.

        Raises:
            IngraftError: no such open question.
        """
        with self._lock:
            self._question(number)
            del self._open[number]
            self._skipped += 1
            self._look()

    def undo(self) -> None:
        """Take the last order back, and ask again.

        Raises:
            IngraftError: none was given since this desk was opened; the disk refused.
        """
        with self._lock:
            if not self._given:
                raise IngraftError("There is no ranking to take back.")
            held = durable.read_bytes(self.target).rstrip(b"\n")
            durable.write_file(self.target, held[: held.rfind(b"\n") + 1])
            number, question = self._given.pop()
            self._open = {number: question, **self._open}

    def _question(self, number: int) -> Question:
        if number not in self._open:
            raise IngraftError(f"question {number}: is not open.")
        return self._open[number]

    def _look(self) -> None:
        if not self._filling and not self._open:
            self.complete.set()


def as_key(prompt: Prompt) -> str:
    """A prompt as a text that tells it from others."""
    return json.dumps(prompt, ensure_ascii=False, sort_keys=True)


def _turns(prompt: Prompt) -> list[Mapping[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _ranked(target: Path) -> list[dict[str, Any]]:
    """The rows of an output file of former times."""
    if not target.exists():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(durable.read_bytes(target).decode("utf-8", "replace").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"prompt", "responses", "ranking"} <= set(row):
            raise IngraftError(
                f"{target}:{number}: is no ranked row, so nothing is added to this file; name another with --output."
            )
        found.append(row)
    return found
