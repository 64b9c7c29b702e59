"""One adapter in training: its tensors, its optimiser, and what it has achieved.

Everything that belongs to an adapter rather than to the run is here, so that several adapters over one base are several of these and
nothing else. Its state is tensors and plain numbers; the learning rate is a function of the step and has no state.

The step is torch's fused one over all tensors. One flat buffer for them would take 3.6 ms less of the 18 ms that the step and the gradients' way into
their places take for the 420 tensors of a LoRA on SmolLM2 (docs/lab-notes.md), a step of a second and more; it would also tie all tensors of an
adapter to one storage, which copies, files and offloading would have to know of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft.adapt import grouped
from ingraft.errors import IngraftError
from ingraft.recipe import Recipe

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
        aide: whether it is trained for another's sake (a value function): it is not evaluated, and its loss is not the run's.
        skipped, skipped_in_row: steps left out because something was not finite.
    """

    name: str
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    state: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    scale: float = 1.0
    best: float | None = None
    best_step: int = 0
    best_tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    waited: int = 0
    aide: bool = False
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
                moments |= {f"{self.name}/{name}/{key}": _as_tensor(value) for key, value in state.items()}
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
        for place, value in tensors["optimizer"].items():
            name, _, key = place.removeprefix(prefix).rpartition("/")
            if place.startswith(prefix):
                parameter = self.parameters[name]
                self.optimizer.state[parameter][key] = _from_tensor(value, parameter.device)
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
    groups = grouped(parameters, recipe.weight_decay, factor)
    betas, epsilon = (recipe.adam_beta1, recipe.adam_beta2), recipe.adam_epsilon
    if recipe.optim == "adamw_8bit":
        from bitsandbytes.optim.adamw import AdamW8bit

        optimizer = cast(torch.optim.Optimizer, AdamW8bit(groups, betas=betas, eps=epsilon))
    else:
        optimizer = torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=True)
    return Learner(
        name=name, parameters=parameters, optimizer=optimizer, state=state or {}, scale=FIRST_SCALE if half else 1.0
    )


def check_optimiser(recipe: Recipe) -> None:
    """Refuse an optimiser that this machine does not have.

    Raises:
        IngraftError: saying what is missing.
    """
    if recipe.optim != "adamw_8bit":
        return
    if not torch.cuda.is_available():
        raise IngraftError(
            "optim: adamw_8bit keeps its state on a CUDA device, and there is none here; use adamw_torch."
        )
    if find_spec("bitsandbytes") is None:
        raise IngraftError(
            "optim: adamw_8bit is bitsandbytes' and that is not installed; `pip install bitsandbytes`, or use adamw_torch."
        )


def _as_tensor(value: Any) -> Tensor:
    """An entry of an optimiser's state for a file: numbers as tensors, and tables that several tensors share as copies."""
    if not isinstance(value, Tensor):
        return torch.tensor(value)
    return value.clone() if value.numel() <= 256 else value


def _from_tensor(value: Tensor, device: torch.device) -> Any:
    """The entry again: whole numbers as numbers, the rest on the trained tensor's device."""
    return int(value) if value.dtype == torch.int64 else value.to(device).clone()


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in source.items():
            target[name].copy_(tensor)
