"""Answers that a policy samples, and what they are worth: the rows of PPO and GRPO.

A rollout asks the policy every prompt of a batch, scores the answers, and notes by token what policy, reference and value function say of them. The optimiser steps
that follow learn from those numbers. Everything is a function of the weights at its beginning and of (seed, number of the rollout): sampling draws from a generator
that is seeded with both and put back. In the middle of a rollout's steps the weights are others already, so a checkpoint holds the rollout that is being
learned from; between two of them it holds only the price of distance, which may have been adapted.

What the policy says of its answers is worked out by a forward pass as training makes it and not taken from generation, whose numbers come from single tokens over
a cache and round otherwise: the ratio at the first step is 1.

Legend: N answers of a rollout, T tokens; what is told of the token at t + 1 stands at t.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ingraft.data.batching import longest_first
from ingraft.data.examples import IGNORED, Example
from ingraft.evaluate.generation import end_tokens, sample
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.judges import Judge, judging
from ingraft.evaluate.loss import Poll, by_length, device_of
from ingraft.evaluate.modes import unnoticed
from ingraft.evaluate.rewards import Rewards, answered
from ingraft.evaluate.roles import as_reference
from ingraft.train.objectives.policy_gradient import adapted, gae, group_advantages, token_rewards, whitened
from ingraft.train.objectives.sampled import TOLD, Sampled

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.data.dataset import Part
    from ingraft.recipe import Recipe
    from ingraft.train.schedule import Plan

GENERATIONS = {"ppo": 1, "grpo": 4}
"""Answers to a prompt, where the recipe leaves it open."""


class Rollouts:
    """The rows of each step, sampled when they are first wanted.

    It is kept in checkpoints beside the adapters, as one of them is: `name`, `tensors`, `numbers`, `restore`.
    """

    name = "rollout"

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        part: Part,
        prompts: Callable[[int], Sequence[Example]],
        rewards: Rewards,
        judge: Judge | None,
        pad_id: int,
    ) -> None:
        """Args:
        part: the training rows. prompts: those of a step, by the number of its rollout's first.
        judge: the value function; None compares the answers to a prompt with each other.
        """
        self._recipe, self._plan, self._model, self._tokenizer = recipe, plan, model, tokenizer
        self._part, self._prompts, self._rewards, self._judge, self._pad_id = part, prompts, rewards, judge, pad_id
        self._number, self._rows = -1, list[Sampled]()
        self._coefficient = recipe.rl.kl_coef
        self._noticed: dict[str, tuple[float, float]] = {}

    @property
    def generations(self) -> int:
        """Answers to a prompt."""
        return self._recipe.rl.num_generations or GENERATIONS[self._recipe.task]

    @property
    def longest(self) -> list[Example]:
        """A row as long as any can become."""
        prompt = max(self._part.examples, key=len)
        return [self._sampled(prompt, [self._pad_id] * self._recipe.rl.max_new_tokens, 0)]

    def rows(self, step: int, poll: Poll) -> list[Example]:
        """The rows of a step, longest first.

        Args:
            poll: may raise to stop; the step is then as if it had not been asked for.
        """
        number, within = divmod(step, self._plan.repeats)
        if number != self._number:
            self._make(number, poll)
        minis = self._recipe.rl.num_mini_batches
        epoch, mini = divmod(within, minis)
        order = list(range(len(self._rows)))
        random.Random(f"ingraft rollout {self._recipe.seed} {number} {epoch}").shuffle(order)
        size = -(-len(order) // minis)
        chosen = (
            order[mini * size : (mini + 1) * size] or order
        )  # the last prompts of an epoch may be fewer than the steps
        return longest_first(self._rows[i] for i in chosen)

    def taken(self) -> dict[str, tuple[float, float]]:
        """Sums and counts of what was noticed since the last call."""
        noticed, self._noticed = self._noticed, {}
        return noticed

    def behind(self, step: int) -> None:
        """Nothing: the next rows are asked for when they are wanted."""

    def _make(self, number: int, poll: Poll) -> None:
        began, recipe, settings = time.perf_counter(), self._recipe, self._recipe.rl
        asked = [row for row in self._prompts(number * self._plan.repeats) for _ in range(self.generations)]
        devices = [device_of(self._model)] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(random.Random(f"ingraft sampling {recipe.seed} {number}").getrandbits(63))
            said = sample(
                self._model,
                self._tokenizer,
                [row.input_ids for row in asked],
                settings.max_new_tokens,
                recipe.per_device_train_batch_size,
                poll,
                do_sample=True,
                top_k=0,
            )
        seconds = time.perf_counter() - began
        ends = end_tokens(self._model, self._tokenizer)
        answers = answered(self._part, asked, said, self._tokenizer, ends)
        scores = self._rewards.of(answers, recipe.per_device_eval_batch_size, poll)
        rows = [self._sampled(row, tokens, i) for i, (row, tokens) in enumerate(zip(asked, said, strict=True))]
        told = self._told(rows, torch.tensor(scores), torch.tensor([row.row_id for row in asked]), poll)
        for i, row in enumerate(rows):
            row.told.update({name: x_NT[i, : len(row)].tolist() for name, x_NT in told.items()})
        mask_NT = _mask(rows)
        ratio_NT = torch.where(mask_NT, told["old"] - told["reference"], 0.0)
        kl, count = float(ratio_NT.sum()), len(rows)
        spread = torch.tensor(scores).std(unbiased=False)
        self._noticed = {
            "reward": (sum(scores), count),
            "reward_std": (float(spread), 1),
            "kl": (kl, count),
            "kl_token": (kl, int(mask_NT.sum())),
            "kl_coef": (self._coefficient, 1),
            "length": (float(sum(map(len, said))), count),
            "ended": (float(sum(one.ended for one in answers)), count),
            "sampling_seconds": (seconds, 1),
        }
        if settings.kl_target is not None:
            self._coefficient = adapted(self._coefficient, kl / count, settings.kl_target, count, settings.kl_horizon)
        self._number, self._rows = number, rows

    def _sampled(self, prompt: Example, tokens: Sequence[int], number: int) -> Sampled:
        ids = [*prompt.input_ids, *tokens]
        names = TOLD if self._judge is not None else TOLD[:3]
        return Sampled(
            input_ids=ids,
            labels=[IGNORED] * len(prompt) + list(tokens),
            row_id=number,
            told={name: [0.0] * len(ids) for name in names},
        )

    def _told(self, rows: Sequence[Sampled], scores_N: Tensor, prompts_N: Tensor, poll: Poll) -> dict[str, Tensor]:
        """What stands in `TOLD`, each (N, T) float32 on the CPU."""
        settings, mask_NT = self._recipe.rl, _mask(rows)
        head = CausalHead(self._model)
        logps = self._by_token(rows, lambda batch: -head.by_token(batch), poll)
        with as_reference(self._model):
            reference = self._by_token(rows, lambda batch: -head.by_token(batch), poll)
        told = {"old": logps, "reference": reference}
        judge = self._judge
        if judge is None:
            worth_N = group_advantages(scores_N, prompts_N, scale=settings.scale_rewards)
            return told | {"advantages": torch.where(mask_NT, worth_N[:, None], 0.0)}
        with judging(self._model, judge):
            values = self._by_token(rows, lambda batch: judge.numbers(head.states(batch)), poll)
        values = torch.where(mask_NT, values, 0.0)
        rewards_NT = token_rewards(scores_N, logps - reference, mask_NT, self._coefficient)
        advantages, returns = gae(rewards_NT, values, mask_NT, settings.gamma, settings.lam)
        if settings.whiten_advantages:
            advantages = whitened(advantages, mask_NT)
        return told | {"advantages": advantages, "values": values, "returns": returns}

    def _by_token(self, rows: Sequence[Sampled], run: Callable[[dict[str, Tensor]], Tensor], poll: Poll) -> Tensor:
        """(N, T) a number of each token, from forward passes without a gradient."""
        found = torch.zeros(len(rows), max(map(len, rows)))
        size = self._recipe.per_device_train_batch_size
        with unnoticed(self._model):
            for positions, batch in by_length(rows, self._pad_id, size, device_of(self._model), poll):
                numbers_BT = run(batch).float().cpu()
                found[positions, : numbers_BT.shape[1]] = numbers_BT
        return found

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The rollout that is being learned from, as tensors of one file."""
        found: dict[str, Tensor] = {}
        for i, row in enumerate(self._rows):
            found[f"{self.name}/{i}/input_ids"] = torch.tensor(row.input_ids)
            found[f"{self.name}/{i}/labels"] = torch.tensor(row.labels)
            found |= {f"{self.name}/{i}/{name}": torch.tensor(values) for name, values in row.told.items()}
        return {self.name: found} if found else {}

    def numbers(self) -> dict[str, Any]:
        """The rest of its state."""
        return {"number": self._number, "rows": len(self._rows), "coefficient": self._coefficient}

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Take the state back that `tensors` and `numbers` gave."""
        self._number, self._coefficient = numbers["number"], numbers["coefficient"]
        kept = tensors.get(self.name, {})
        self._rows = []
        for i in range(numbers["rows"]):
            own = {
                key.rpartition("/")[2]: value.tolist()
                for key, value in kept.items()
                if key.startswith(f"{self.name}/{i}/")
            }
            ids, labels = own.pop("input_ids"), own.pop("labels")
            self._rows.append(Sampled(input_ids=ids, labels=labels, row_id=i, told=own))


def _mask(rows: Sequence[Sampled]) -> Tensor:
    """(N, T) which places tell of an answer's token."""
    return pad_sequence(
        [torch.tensor([*(label != IGNORED for label in (row.labels or [])[1:]), False]) for row in rows],
        batch_first=True,
    )
