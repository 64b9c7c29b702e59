"""Where the time of one step goes: `ingraft train --profile`.

A step of the run itself is looked at, the eighth of this process or its last, because the first ones pay for what happens once. torch's profiler
writes down every operation, which makes that step some percent slower; shares are what to read. Self time of an operation is what it
spends itself, in none of the operations that it calls; on a GPU it is the time of its kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from ingraft import durable

AT = 8
"""Which step of a process is looked at."""
MOST = 15
"""Operations that a profile names."""
PHASES = ("forward", "backward", "optimiser")

_PRODUCTS = frozenset(
    f"aten::{name}"
    for name in (
        "mm",
        "addmm",
        "addmm_",
        "bmm",
        "baddbmm",
        "baddbmm_",
        "mv",
        "mkldnn_convolution",
        "convolution_backward",
    )
)
_ATTENTION = frozenset(
    f"aten::_scaled_dot_product_{kind}_attention{place}{end}"
    for kind in ("flash", "efficient", "cudnn")
    for place in ("", "_for_cpu")
    for end in ("", "_backward")
) | {f"aten::_{kind}_attention_{end}" for kind in ("flash", "efficient") for end in ("forward", "backward")}


@contextlib.contextmanager
def phase(name: str) -> Iterator[None]:
    """A part of a step, by its name in `PHASES`. Costs nothing to speak of where nobody profiles."""
    with torch.profiler.record_function(name):
        yield
        if torch.cuda.is_available() and cast(Any, torch.autograd)._profiler_enabled():
            torch.cuda.synchronize()  # or the part would end before its kernels do


class Profiler:
    """Looks at one step of a run.

    Attributes:
        found: the profile, once there is one: step, seconds, rows and tokens of the step, `roofline`, `phases` (seconds by name), `products` and
            `attention` (shares of all self time), `operations` (the longest: name, calls, seconds, share).
    """

    def __init__(self, file: Path, first: int, total: int) -> None:
        """Args:
        file: where the profile is kept, as JSON.
        first: steps made before this process. total: steps of the run.
        """
        self.file, self.step = file, max(first, min(first + AT, total) - 1)
        self.found: dict[str, Any] | None = None

    @contextlib.contextmanager
    def around(self, step: int, about: Mapping[str, Any]) -> Iterator[None]:
        """Around the step after `step` others.

        Args:
            about: what else the profile says; read when the step is made.
        """
        if step != self.step:
            yield
            return
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=True) as watched:
            yield
        self.found = {"step": step + 1, **about, **summary(watched.key_averages())}
        durable.write_json(self.file, self.found)


def summary(events: Sequence[Any]) -> dict[str, Any]:
    """What a profile says, from torch's averages by name."""
    phases = dict.fromkeys(PHASES, 0.0)
    own: list[tuple[str, int, float]] = []
    on_device = any(event.self_device_time_total for event in events)
    for event in events:
        name = cast(str, event.key)
        if name in phases:
            phases[name] += event.cpu_time_total / 1e6
        else:
            own.append(
                (name, event.count, (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6)
            )
    whole = sum(seconds for _, _, seconds in own) or 1.0
    own.sort(key=lambda one: -one[2])
    return {
        "phases": phases,
        "products": sum(seconds for name, _, seconds in own if name in _PRODUCTS) / whole,
        "attention": sum(seconds for name, _, seconds in own if name in _ATTENTION) / whole,
        "operations": [
            {"name": name, "calls": count, "seconds": seconds, "share": seconds / whole}
            for name, count, seconds in own[:MOST]
        ],
    }
