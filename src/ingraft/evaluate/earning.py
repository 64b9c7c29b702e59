"""Policies that learn from rewards, judged by what their likeliest answers earn, and by how far they have gone from the reference for it.

Length and distance stand beside the reward, because a policy that only learned to please its judge shows there first.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from ingraft.data.prompts import expected, prompt_text, prompt_tokens
from ingraft.errors import IngraftError
from ingraft.evaluate.generation import end_tokens, sample
from ingraft.evaluate.loss import Poll, score_loss
from ingraft.evaluate.outcomes import Outcomes, Ratio, column, mean
from ingraft.evaluate.rewards import answered
from ingraft.evaluate.roles import as_reference
from ingraft.evaluate.writing import SftScorer

if TYPE_CHECKING:
    from ingraft.data.dataset import DataSet, Part
    from ingraft.data.examples import Example
    from ingraft.data.records import Record


@dataclass(frozen=True, kw_only=True, eq=False)
class EarnedOutcomes(Outcomes):
    """Of a policy: by row what its answer earns, its distance from the reference in nats, its tokens, and whether it ends."""

    yes_or_no: ClassVar[frozenset[str]] = frozenset({"ended"})

    rewards: Sequence[float] = column()
    kl: Sequence[float] = column()
    lengths: Sequence[int] = column()
    ended: Sequence[float] = column()

    def metrics(self) -> dict[str, float]:
        columns = {"reward": self.rewards, "kl": self.kl, "length": self.lengths, "ended": self.ended}
        return {name: statistics.fmean(values) for name, values in columns.items()}

    def bounds(self) -> dict[str, float]:
        mean, count = statistics.fmean(self.rewards), self.count
        error = statistics.stdev(self.rewards) / math.sqrt(count) if count > 1 else 0.0
        return {"reward_low": mean - 1.96 * error, "reward_high": mean + 1.96 * error}

    def ratios(self) -> dict[str, Ratio]:
        columns = {"reward": self.rewards, "kl": self.kl, "length": self.lengths, "ended": self.ended}
        return {name: mean(values) for name, values in columns.items()}


class PpoScorer(SftScorer):
    """The mean reward of greedy answers with its 95 % interval, their distance from the reference in nats an answer, their length, and how many of them end."""

    task: ClassVar[str] = "ppo"
    headline: ClassVar[str] = "reward"
    cheap: ClassVar[tuple[str, ...]] = ("reward", "reward_low", "reward_high", "kl", "length", "ended")
    rewarded: ClassVar[bool] = True
    prompted: ClassVar[str | None] = None

    def outcomes(
        self, data: DataSet, part: str, batch_size: int = 8, *, whole: bool = True, poll: Poll | None = None
    ) -> EarnedOutcomes:
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
        return EarnedOutcomes(
            rewards=earned,
            kl=[reference - policy for policy, reference in zip(own, theirs, strict=True)],
            lengths=[len(tokens) for tokens in said],
            ended=[float(one.ended) for one in answers],
        )

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
