"""A module kept so that copies of it are cheap: the laws take tens of thousands of them.

`copy.deepcopy` walks every dictionary of every module in Python, which took an eighth of the suite's time. Here the module is pickled once, its
tensors laid aside, and a copy is unpickled round clones of them.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any, cast

from torch import Tensor, nn


class Mould:
    """Takes the module over: nothing else may hold it."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors: list[Tensor] = []
        stream = io.BytesIO()
        _Pickler(stream, self._tensors).dump(module)
        self._bytes = stream.getvalue()

    def cast(self) -> nn.Module:
        """A new copy; what was one tensor under two names (tied weights) is one in it, too."""
        return cast(nn.Module, _Unpickler(io.BytesIO(self._bytes), self._tensors).load())


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._tensors, self._numbers = tensors, dict[int, int]()

    def persistent_id(self, obj: Any) -> int | None:
        if not isinstance(obj, Tensor):
            return None
        if id(obj) not in self._numbers:
            self._numbers[id(obj)] = len(self._tensors)
            self._tensors.append(obj)
        return self._numbers[id(obj)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(stream)
        self._tensors, self._made = tensors, dict[int, Tensor]()

    def persistent_load(self, pid: int) -> Tensor:
        if pid not in self._made:
            self._made[pid] = copy.deepcopy(self._tensors[pid])
        return self._made[pid]
