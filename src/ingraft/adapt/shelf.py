"""Many adapters on the disk, a few of them in the model.

A server has more adapters than memory. A `Shelf` knows where they lie and has those in the model that are needed now; where there is no room left, the one
that was needed longest ago goes. Going is `detach` and coming back is `load`, so nothing else has to know: an adapter that comes back gives the bits
it gave before. There is no tier of our own between disk and device: the system keeps files that are read again in the host's memory, and from there a
load is one reading, one check and one copy to the device (`files/moulds.py`).

What acts is never taken away, nor what is trainable, merged, or acted over by another adapter, nor what was attached by others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import nn

from ingraft.adapt.control import Control, control_of
from ingraft.adapt.files import load
from ingraft.adapt.lifecycle import acting_kept, check_adapter_name, detach, is_trainable
from ingraft.errors import IngraftError, nearest


class Shelf:
    """See the file's docstring.

    Args:
        model: that the adapters are for.
        folders: of the adapters, by the name they get in the model.
        room: how many of them the model has at once; for the length of a change one more.

    Raises:
        IngraftError: no room, or what can be no adapter's name.
    """

    def __init__(self, model: nn.Module, folders: Mapping[str, str | os.PathLike[str]], room: int) -> None:
        if room < 1:
            raise IngraftError(f"Shelf: room must be at least 1, got {room}.")
        for name in folders:
            check_adapter_name(name)
        self.model, self.room = model, room
        self.folders = {name: Path(folder) for name, folder in folders.items()}
        self._held: dict[str, None] = {}

    @property
    def held(self) -> tuple[str, ...]:
        """Those in the model, the one needed longest ago first."""
        control = control_of(self.model)
        attached = {} if control is None else control.adapters
        return tuple(name for name in self._held if name in attached)

    def need(self, *names: str) -> None:
        """Have these in the model; which adapters act stays as it is.

        Raises:
            IngraftError: for names that are not on the shelf, where there is not enough room, or as `load`. What the model had it still has, but
                for those that made room for adapters that came before the one that failed.
        """
        wanted = list(dict.fromkeys(names))
        if unknown := [name for name in wanted if name not in self.folders]:
            raise IngraftError(
                *(f"Shelf: there is no adapter {name!r} on it{nearest(name, self.folders)}." for name in unknown)
            )
        held = self.held
        missing = [name for name in wanted if name not in held]
        going = [name for name in held if name not in wanted and not self._in_use(name)]
        over = len(held) + len(missing) - self.room
        if over > len(going):
            raise IngraftError(
                f"Shelf: {', '.join(missing)} cannot be loaded: there is room for {self.room}, and {len(held) - len(going)} of those in the model are "
                "needed as well, or act, or are trained. Let fewer act at once, or give more room."
            )
        self._held = dict.fromkeys([*(name for name in held if name not in wanted), *(n for n in wanted if n in held)])
        with acting_kept(self.model):
            for name in missing:
                load(self.model, self.folders[name], name)
                self._held[name] = None
                if len(self._held) > self.room:
                    self._let_go(going.pop(0))
        self._held = dict.fromkeys([*(name for name in self._held if name not in wanted), *wanted])

    def _let_go(self, name: str) -> None:
        detach(self.model, name)
        del self._held[name]

    def _in_use(self, name: str) -> bool:
        """Whether an adapter must stay where it is."""
        control = control_of(self.model)
        assert control is not None
        return (
            name in _acting(control)
            or name in control.merged
            or any(name in control.acted_on_by(other) for other in control.adapters)
            or is_trainable(self.model, name)
        )


def _acting(control: Control) -> set[str]:
    return {name for group in control.call.groups for name in group.names}
