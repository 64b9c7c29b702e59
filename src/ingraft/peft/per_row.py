"""What PEFT's users say of the rows of a batch: `adapter_names`, `task_ids`, and labels of a text that has virtual tokens in front."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from ingraft.adapt import lifecycle
from ingraft.adapt.context import IGNORED_LABEL
from ingraft.adapt.control import Control
from ingraft.adapt.root import batch_size
from ingraft.adapt.virtual import lengths
from ingraft.errors import IngraftError
from ingraft.methods.contract import InputPart
from ingraft.peft.configs import TaskType

BASE = "__base__"
"""In `adapter_names`: the row is the base's alone."""

BY_TOKEN = {TaskType.CAUSAL_LM.value, TaskType.TOKEN_CLS.value}
"""The tasks with a label for each token."""

LONGER = {*BY_TOKEN, TaskType.QUESTION_ANS.value, TaskType.FEATURE_EXTRACTION.value}
"""The tasks whose outputs have a place for each token; the incumbent's have one for each virtual token too."""


class RowsRefused(IngraftError, ValueError):
    """`adapter_names` that cannot be meant. A ValueError, as in the incumbent."""


@contextmanager
def rows(
    model: nn.Module,
    names: Sequence[str] | None,
    tasks: Sequence[int] | Tensor | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Iterator[None]:
    """Inside the block each row has the adapter of its name, and its task.

    Args:
        args, kwargs: of the call; they say how many rows there are.

    Raises:
        RowsRefused: for names that are not one a row.
    """
    size = batch_size(args, kwargs)
    if names is not None and size and len(names) != size:
        raise RowsRefused(f"adapter_names: {len(names)} names were given for {size} rows; give each row its own.")
    own = nullcontext() if names is None else lifecycle.rows(model, [None if name == BASE else name for name in names])
    with own, nullcontext() if tasks is None else lifecycle.context(model, tasks=tasks):
        yield


def keeps_virtual(control: Control, task: str | None) -> bool:
    """Whether the incumbent leaves virtual tokens in what a model returns, or in what its head reads.

    Its heads of encoders pool the first virtual token. Those of causal models look for the last token of a row, which is the same with
    them and without.
    """
    return task in LONGER or (task == TaskType.SEQ_CLS.value and not control.causal)


def with_room(control: Control, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, with ignored labels for the virtual tokens in front, where labels go by token and have none yet."""
    labels = kwargs.get("labels")
    ids = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs.get("inputs_embeds")
    tasks = {control.adapters[name].facts.get("task_type") for group in control.call.groups for name in group.names}
    if not control.keep_virtual or not isinstance(labels, Tensor) or not tasks & BY_TOKEN:
        return kwargs
    if isinstance(ids, Tensor) and labels.shape != ids.shape[:2]:
        return kwargs
    room = max(lengths(control, control.call, InputPart).values(), default=0)
    return {**kwargs, "labels": nn.functional.pad(labels, (room, 0), value=IGNORED_LABEL)}
