"""Policies that learn from rewards, judged by what their likeliest answers earn, and by how far they have gone from the reference for it.

Length and distance stand beside the reward, because a policy that only learned to please its judge shows there first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, ClassVar

from ingraft.data.prompts import expected, prompt_text, prompt_tokens
from ingraft.errors import IngraftError
from ingraft.evaluate.generation import end_tokens, sample
from ingraft.evaluate.loss import Poll, score_loss
from ingraft.evaluate.rewards import answered
from ingraft.evaluate.roles import as_reference
from ingraft.evaluate.writing import SftScorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.examples import Example
    from ingraft.data.records import Record


class PpoScorer(SftScorer):
    """The mean reward of greedy answers with its 95 % interval, their distance from the reference in nats an answer, their length, and how many of them end."""

    task: ClassVar[str] = "ppo"
    headline: ClassVar[str] = "reward"
    cheap: ClassVar[tuple[str, ...]] = ("reward", "reward_low", "reward_high", "kl", "length", "ended")

    def evaluate(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> dict[str, float]:
        del whole
        if self.rewards is None:
            raise IngraftError(
                f"task {self.task}: say what answers earn: --reward-adapter, --reward-function or --rl.reward-pattern; a function is not taken from a run's recipe."
            )
        rows = data.parts[part].examples
        prompts = [row.input_ids for row in rows]
        said = sample(self.model, self.tokenizer, prompts, self.rewards.longest, batch_size, poll)
        answers = answered(data.parts[part], rows, said, self.tokenizer, end_tokens(self.model, self.tokenizer))
        earned = self.rewards.of(answers, batch_size, poll)
        sequences = [one.sequence for one in answers]
        own = score_loss(self.model, sequences, self.pad_id, batch_size, poll).sums
        with as_reference(self.model):
            theirs = score_loss(self.model, sequences, self.pad_id, batch_size, poll).sums
        mean = statistics.fmean(earned)
        error = statistics.stdev(earned) / math.sqrt(len(earned)) if len(earned) > 1 else 0.0
        return {
            "reward": mean,
            "reward_low": mean - 1.96 * error,
            "reward_high": mean + 1.96 * error,
            "kl": statistics.fmean(reference - policy for policy, reference in zip(own, theirs, strict=True)),
            "length": statistics.fmean(map(len, said)),
            "ended": statistics.fmean(float(one.ended) for one in answers),
        }

    def before(self) -> AbstractContextManager[None]:
        return as_reference(self.model)

    def questions(self, part: Part, examples: Sequence[Example]) -> list[dict[str, str]]:
        records = [part.records[example.row_id] for example in examples]
        return [{"prompt": prompt_text(record), "expected": expected(record) or ""} for record in records]

    def answers(self, part: Part, examples: Sequence[Example], poll: Poll | None = None) -> list[str]:
        longest = self.rewards.longest if self.rewards is not None else 64
        said = sample(self.model, self.tokenizer, [one.input_ids for one in examples], longest, 8, poll)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in said]
        return [text.strip() if isinstance(text, str) else "" for text in texts]

    def prompt(self, record: Record) -> list[int]:
        return prompt_tokens(record, self.tokenizer)


class GrpoScorer(PpoScorer):
    """The same."""

    task: ClassVar[str] = "grpo"
