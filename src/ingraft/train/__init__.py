"""Training: from a recipe to a run folder. `train` is imported when it is used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingraft.train.run import Run, train

__all__ = ["Run", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ingraft.train import run

    return getattr(run, name)
