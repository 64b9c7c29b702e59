"""One adapter in training: its tensors, its optimiser, and what it has achieved.

Everything that belongs to an adapter rather than to the run is here, so that several adapters over one base are several of these and
nothing else. Its state is tensors and plain numbers; the learning rate is a function of the step and has no state.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt import grouped
from ingraft.recipe import Recipe

_MOMENTS = ("exp_avg", "exp_avg_sq")
FIRST_SCALE = 2.0**16
"""What a float16 loss is multiplied by at first, so that small gradients do not vanish."""


@dataclass(kw_only=True, eq=False)
class Learner:
    """See the module docstring.

    Attributes:
        name: of the adapter.
        parameters: its trained tensors by stable name.
        optimizer: AdamW over them, each group with a factor on the learning rate.
        state: what else training changes in the adapter (a method's own book-keeping).
        scale: what the loss is multiplied by before backward; 1 except in float16.
        best, best_step, best_tensors: the best evaluation so far, and a copy of the tensors then if it may be wanted back.
        waited: evaluations since.
        skipped, skipped_in_row: steps left out because something was not finite.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.AdamW
    state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    scale: float = 1.0
    best: float | None = None
    best_step: int = 0
    best_tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    waited: int = 0
    skipped: int = 0
    skipped_in_row: int = 0
    good_in_row: int = 0

    def apply(self, learning_rate: float, max_norm: float, behind: Callable[[], None] | None = None) -> float | None:
        """One optimiser step from the gradients at hand, which are used up.

        Args:
            behind: called behind the step, while the gradients are there.

        Returns:
            the gradients' norm before clipping, or None if it was not finite; then nothing has changed but the counters.
        """
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        if self.scale != 1.0:
            for grad in grads:
                grad.mul_(1.0 / self.scale)
        norm = torch.nn.utils.get_total_norm(grads) if grads else torch.zeros(())
        value = float(norm)
        if not math.isfinite(value):
            self.skip()
            return None
        if max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), max_norm, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group["factor"]
        self.optimizer.step()
        if behind is not None:
            behind()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped_in_row = 0
        self.good_in_row += 1
        if self.scale != 1.0 and self.good_in_row % 2000 == 0:
            self.scale *= 2.0
        return value

    def skip(self) -> None:
        """Leave a step out: its gradients go, tensors and moments stay as they are."""
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += 1
        self.good_in_row = 0
        if self.scale > 1.0:
            self.scale /= 2.0  # the usual cause in float16, and cured by this
        else:
            self.skipped_in_row += 1

    def consider(self, value: float, step: int, *, lower: bool, keep: bool) -> bool:
        """Take note of an evaluation; returns whether it is the best so far.

        Args:
            lower: whether lower is better.
            keep: whether the tensors of the best may be wanted back.
        """
        better = math.isfinite(value) and (self.best is None or (value < self.best if lower else value > self.best))
        if not better:
            self.waited += 1
            return False
        self.best, self.best_step, self.waited = value, step, 0
        if keep:
            self.best_tensors = {name: p.detach().clone() for name, p in self._held().items()}
        return True

    def use_best(self) -> None:
        """Put the tensors of the best evaluation back."""
        _copy(self.best_tensors, self._held())

    def _held(self) -> dict[str, Tensor]:
        return {**self.parameters, **self.state}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Its state as tensors, by file: adapter, optimizer and, where it is kept, best."""
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            state = self.optimizer.state.get(parameter)
            if state:
                moments |= {f"{self.name}/{name}/{key}": state[key] for key in _MOMENTS}
                moments[f"{self.name}/{name}/step"] = state["step"]
        found = {
            "adapter": {f"{self.name}/{name}": p.detach() for name, p in self.parameters.items()},
            "optimizer": moments,
        }
        if self.state:
            found["state"] = {f"{self.name}/{name}": tensor for name, tensor in self.state.items()}
        if self.best_tensors:
            found["best"] = {f"{self.name}/{name}": tensor for name, tensor in self.best_tensors.items()}
        return found

    def numbers(self) -> dict[str, Any]:
        """The rest of its state."""
        return {
            "scale": self.scale,
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "skipped": self.skipped,
            "skipped_in_row": self.skipped_in_row,
            "good_in_row": self.good_in_row,
        }

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Take the state back that `tensors` and `numbers` gave."""
        prefix = f"{self.name}/"
        _copy({name: tensors["adapter"][prefix + name] for name in self.parameters}, self.parameters)
        _copy({name: tensors["state"][prefix + name] for name in self.state}, self.state)
        moments = tensors["optimizer"]
        for name, parameter in self.parameters.items():
            if f"{prefix}{name}/step" in moments:
                state = {key: moments[f"{prefix}{name}/{key}"].to(parameter.device).clone() for key in _MOMENTS}
                self.optimizer.state[parameter] = {"step": moments[f"{prefix}{name}/step"].clone(), **state}
        best = tensors.get("best", {})
        self.best_tensors = {
            name: best[prefix + name].to(p.device).clone() for name, p in self._held().items() if prefix + name in best
        }
        for key, value in numbers.items():
            setattr(self, key, value)


def make_learner(
    name: str,
    parameters: dict[str, nn.Parameter],
    recipe: Recipe,
    half: bool,
    *,
    factor: Callable[[str], float] = lambda _: 1.0,
    state: Mapping[str, Tensor] | None = None,
) -> Learner:
    """A learner at its start.

    Args:
        half: whether the base computes in float16.
        factor: on the learning rate, by tensor.
        state: what else training changes in the adapter.
    """
    optimizer = torch.optim.AdamW(
        grouped(parameters, recipe.weight_decay, factor),
        lr=recipe.peak_rate,
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        eps=recipe.adam_epsilon,
        fused=True,
    )
    return Learner(
        name=name, parameters=parameters, optimizer=optimizer, state=state or {}, scale=FIRST_SCALE if half else 1.0
    )


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
