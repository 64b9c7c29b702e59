"""Two adapters, or an adapter and its base, over one base in memory: who answers when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.cli.sources import Opened

BASE = "base"
"""What --against calls the base alone."""

SECOND = "against"
"""The second adapter's name in the model."""


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One of those that are compared.

    Attributes:
        shown: its folder, or `base`. name: its name in the model; None for the base alone.
        scale: mean and standard deviation of the labels that it learned from, where it says numbers.
    """

    shown: str
    name: str | None
    scale: tuple[float, float] | None = None

    @contextmanager
    def answering(self, model: Any) -> Iterator[None]:
        """Inside the block it answers."""
        from ingraft import adapt
        from ingraft.adapt.control import control_of
        from ingraft.adapt.lifecycle import acting_kept
        from ingraft.bases.heads import scale_of

        before = scale_of(model)
        with acting_kept(model):
            if control_of(model) is not None:
                adapt.activate(model, *([] if self.name is None else [self.name]))
            try:
                if self.scale is not None:
                    model.config.label_mean, model.config.label_std = self.scale
                yield
            finally:
                if self.scale is not None:
                    model.config.label_mean, model.config.label_std = before


def folders(adapter: str | None, against: str | None) -> list[str]:
    """The adapter folders among those that are compared, the first of which says how the base is opened.

    Raises:
        IngraftError: there is nothing to compare.
    """
    if against == BASE and adapter is None:
        raise IngraftError("--against base: without --adapter that is the base against itself.")
    return [folder for folder in (adapter, against) if folder not in (None, BASE)]


def contenders(
    opened: Opened, adapter: str | None, against: str, *, allow_base_mismatch: bool = False
) -> tuple[Contender, Contender]:
    """The two, in a model that was opened with the first of their folders.

    Raises:
        IngraftError: the second adapter does not fit the base, or has other labels.
    """
    import ingraft
    from ingraft.adapt.lifecycle import acting_kept

    first, *rest = folders(adapter, against)
    found = {first: Contender(shown=first, name=opened.adapter, scale=_facts(first).get("scale"))}
    for folder in rest:
        ours, theirs = (_facts(one).get("labels") for one in (first, folder))
        if ours != theirs:
            told = " and ".join(", ".join(cast("list[str]", labels or ["none"])) for labels in (ours, theirs))
            raise IngraftError(f"--against {folder}: its labels are others than those of {first}: {told}.")
        with acting_kept(opened.model):
            name = ingraft.load(opened.model, folder, name=SECOND, allow_base_mismatch=allow_base_mismatch)
        found[folder] = Contender(shown=folder, name=name, scale=_facts(folder).get("scale"))
    opened.model.eval()
    base = Contender(shown=BASE, name=None)
    return found.get(adapter or BASE, base), found.get(against, base)


def _facts(folder: str) -> dict[str, Any]:
    """What a run's folder tells of its run."""
    from ingraft.cli.sources import adapter_folder, manifest_facts, run_facts

    return run_facts(manifest_facts(adapter_folder(folder))) if Path(folder).is_dir() else {}
