"""What answers earn: a reward model's number, a person's Python function, a pattern that an answer has to match; or the sum of several.

A function is called with four lists of the same length (prompts, answers, what the rows expect or None, the rows' own fields) and returns as many numbers. It
is the user's own code, named in a recipe; it runs in this process, and what it raises stops the run with the last complete step kept.
"""

from __future__ import annotations

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingraft.data.prompts import expected, prompt_text
from ingraft.errors import IngraftError
from ingraft.evaluate.judges import REWARD, Judge, judged, load_judge
from ingraft.evaluate.loss import Poll
from ingraft.evaluate.scorer import scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.data.dataset import Part
    from ingraft.data.examples import Example
    from ingraft.recipe import Recipe, RlRecipe


@dataclass(frozen=True, kw_only=True)
class Answered:
    """An answer to a row.

    Attributes:
        prompt, text: what was asked, and what was said, without special tokens.
        expected: the row's own answer, if it has one. row: its fields.
        place: the row's, for messages.
        sequence: prompt and answer as tokens.
        ended: whether the answer came to its end.
    """

    prompt: str
    text: str
    expected: str | None
    row: Mapping[str, Any]
    place: str
    sequence: Example
    ended: bool


class Reward(ABC):
    """One source of rewards. Abstract."""

    @abstractmethod
    def of(self, answers: Sequence[Answered], batch_size: int, poll: Poll | None) -> list[float]:
        """What each answer earns."""


class ModelReward(Reward):
    """A reward model over the same base."""

    def __init__(self, model: PreTrainedModel, judge: Judge, pad_id: int) -> None:
        self.judge = judge
        self._model, self._pad_id = model, pad_id

    def of(self, answers: Sequence[Answered], batch_size: int, poll: Poll | None) -> list[float]:
        return judged(self._model, self.judge, [one.sequence for one in answers], self._pad_id, batch_size, poll)


class PatternReward(Reward):
    """A format, and what stands in its place."""

    def __init__(self, settings: RlRecipe) -> None:
        assert settings.reward_pattern is not None
        self._pattern = re.compile(settings.reward_pattern)
        self._format, self._correct = settings.format_weight, settings.correct_weight

    def of(self, answers: Sequence[Answered], batch_size: int, poll: Poll | None) -> list[float]:
        return [self._one(answer) for answer in answers]

    def _one(self, answer: Answered) -> float:
        found = self._pattern.search(answer.text)
        if found is None:
            return 0.0
        wanted = None if answer.expected is None else self._pattern.search(answer.expected)
        right = wanted is not None and same(found[1] or "", wanted[1] or "")
        return self._format + (self._correct if right else 0.0)


def same(said: str, wanted: str) -> bool:
    """Whether two answers are the same number (commas and a point at the end aside) or, where one is none, the same words."""
    numbers = [_number(text) for text in (said, wanted)]
    if None not in numbers:
        return numbers[0] == numbers[1]
    return said.strip().casefold() == wanted.strip().casefold()


def _number(text: str) -> float | None:
    try:
        value = float(text.strip().rstrip(".").replace(",", "").replace("$", ""))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class FunctionReward(Reward):
    """A person's own function."""

    def __init__(self, named: str, function: Callable[..., Any]) -> None:
        self._named, self._function = named, function

    def of(self, answers: Sequence[Answered], batch_size: int, poll: Poll | None) -> list[float]:
        try:
            found = self._function(
                [one.prompt for one in answers],
                [one.text for one in answers],
                [one.expected for one in answers],
                [dict(one.row) for one in answers],
            )
            said = list(found)
        except Exception as error:
            rows = ", ".join(dict.fromkeys(one.place for one in answers[:3]))
            raise IngraftError(
                f"reward_function: {self._named} raised {type(error).__name__}: {' '.join(str(error).split())[:300]} (for rows {rows}, ...)."
            ) from error
        if len(said) != len(answers):
            raise IngraftError(
                f"reward_function: {self._named} returned {len(said)} numbers for {len(answers)} answers."
            )
        numbers: list[float] = []
        for value, answer in zip(said, answers, strict=True):
            try:
                number = float(value)
            except (TypeError, ValueError):
                number = math.nan
            if not math.isfinite(number):
                raise IngraftError(
                    f"reward_function: {self._named} returned {value!r} for {answer.place}; every answer needs a finite number."
                )
            numbers.append(number)
        return numbers


def function_of(named: str) -> FunctionReward:
    """The function `file.py:name`.

    Raises:
        IngraftError: there is no such file or function in it, or the file itself raises.
    """
    file, _, name = named.rpartition(":")
    path = Path(file)
    if not path.is_file():
        raise IngraftError(f"reward_function: {file} does not exist.")
    spec = importlib.util.spec_from_file_location("ingraft_reward_function", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise IngraftError(f"reward_function: {file} raised {type(error).__name__} as it was read: {error}.") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise IngraftError(f"reward_function: {file} has no function called {name}.")
    return FunctionReward(named, function)


@dataclass(frozen=True, kw_only=True, eq=False)
class Rewards:
    """Everything that answers earn from, added up.

    Attributes:
        missing_end: taken off for an answer that does not end.
        longest: where an answer is cut, in tokens.
    """

    sources: tuple[Reward, ...]
    missing_end: float = 0.0
    longest: int = 64

    def of(self, answers: Sequence[Answered], batch_size: int = 8, poll: Poll | None = None) -> list[float]:
        """What each answer earns."""
        total = [0.0 if one.ended else -self.missing_end for one in answers]
        for source in self.sources:
            total = [a + b for a, b in zip(total, source.of(answers, batch_size, poll), strict=True)]
        return total


def check_rewards(recipe: Recipe) -> None:
    """Refuse a recipe that learns from rewards and names none, or a function that is not there, before anything is loaded.

    Raises:
        IngraftError: what is missing.
    """
    if not scorer_of(recipe.task).rewarded:
        return
    given = {
        "reward_adapter": recipe.reward_adapter,
        "reward_function": recipe.reward_function,
        "rl.reward_pattern": recipe.rl.reward_pattern,
    }
    if all(value is None for value in given.values()):
        raise IngraftError(f"task: {recipe.task} needs a reward: give {', '.join(given)} or several of them.")
    if recipe.reward_function is not None:
        function_of(recipe.reward_function)


def rewards_of(
    recipe: Recipe, model: PreTrainedModel, pad_id: int, run: Path | None = None, *, allow_base_mismatch: bool = False
) -> Rewards:
    """The rewards that a recipe names; a reward model is put into the model as a frozen adapter.

    Args:
        run: a run's folder, whose own copy of the reward model comes first.

    Raises:
        IngraftError: something that is named is not there or does not fit.
    """
    sources: list[Reward] = []
    if recipe.reward_adapter is not None:
        kept = run / REWARD if run is not None else None
        folder = kept if kept is not None and kept.is_dir() else Path(recipe.reward_adapter)
        judge = load_judge(model, folder, REWARD, allow_base_mismatch=allow_base_mismatch)
        sources.append(ModelReward(model, judge, pad_id))
    if recipe.reward_function is not None:
        sources.append(function_of(recipe.reward_function))
    if recipe.rl.reward_pattern is not None:
        sources.append(PatternReward(recipe.rl))
    return Rewards(sources=tuple(sources), missing_end=recipe.rl.missing_eos_penalty, longest=recipe.rl.max_new_tokens)


def answered(
    part: Part,
    examples: Sequence[Example],
    answers: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    ends: set[int],
) -> list[Answered]:
    """Sampled tokens, with what a reward looks at.

    Args:
        examples: by answer the row that was asked.
    """
    from ingraft.data.examples import IGNORED, Example

    found: list[Answered] = []
    for example, said in zip(examples, answers, strict=True):
        record, row = part.records[example.row_id], part.rows[example.row_id]
        text = tokenizer.decode(list(said), skip_special_tokens=True)
        found.append(
            Answered(
                prompt=prompt_text(record),
                text=text.strip() if isinstance(text, str) else "",
                expected=expected(record),
                row=row.values,
                place=row.place,
                sequence=Example(
                    input_ids=[*example.input_ids, *said],
                    labels=[IGNORED] * len(example.input_ids) + list(said),
                    row_id=example.row_id,
                ),
                ended=bool(said) and said[-1] in ends,
            )
        )
    return found
