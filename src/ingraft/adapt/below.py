"""What lies below the lowest block that an adapter acts in: what those blocks make of a batch, and standing in for them.

Frozen blocks make the same of a row whenever it comes. Who keeps what they made (`train/frozen.py`) can hand it to the block above them and
leave their work out. Nothing here knows a model's code. The blocks are those that roles are found by (`roles.py`); the model's own forward runs
as ever (embeddings, masks, positions, heads), and while a stand-in is there each of these blocks returns what the last of them returned
before. That is right if hidden states are all that goes from block to block, and if a row's do not depend on the rows and the padding beside it.
What can be seen to be otherwise is refused by name. What cannot be seen is tried on two rows: a model that hands keys up to later
blocks, calls one block several times or joins its first blocks to its last ones says other things then.

Where adapters act is not read off names either: the model is run up to the last of these blocks, and a host that has run by then lies below.

Legend: B rows, T columns, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt import roles
from ingraft.adapt.control import Control, host_state, require_control
from ingraft.adapt.counting import names_of
from ingraft.adapt.flat import Flat
from ingraft.adapt.models import lies_in
from ingraft.adapt.swap import original_class
from ingraft.errors import IngraftError

LEAVE = "Leave cache_frozen false"


class _Reached(Exception):
    """The last of the blocks has returned."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Below:
    """The blocks below the lowest adapted one.

    Attributes:
        blocks: lowest first, one at least. total: how many blocks the model has.
        rest: what a block returns behind its hidden states; None if it returns nothing but these.
        width, dtype: of a token's state.
    """

    model: nn.Module
    blocks: tuple[nn.Module, ...]
    total: int
    rest: tuple[None, ...] | None
    width: int
    dtype: torch.dtype

    def states(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What goes into the block above: (B, T, D). The model runs as far as that, in the modes that it is in.

        Args:
            inputs: as the model takes them, without labels.
        """
        return _states(self.model, inputs, *_run(self.model, self.blocks[-1], inputs))[0]

    @contextmanager
    def given(self, x_BTD: Tensor) -> Iterator[None]:
        """Inside the block one forward pass of the model takes these states for what its lower blocks make of the batch, and does not run them.

        Raises:
            IngraftError: the base's own dropout acts in one of these blocks, so that it would make something else each time.
        """
        if dropping := next((m for block in self.blocks for m in block.modules() if _drops(m)), None):
            raise IngraftError(
                f"cache_frozen: the frozen blocks are in training mode ({original_class(dropping).__name__}), where their own dropout acts and "
                f"they make something else of a row each time. {LEAVE}, or put the base into evaluation mode."
            )
        control, laid = require_control(self.model), list[Tensor]()

        def forward(*args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            if not laid:
                flat = control.call.flat
                laid.append(x_BTD if flat is None else flat.lay(x_BTD))
            return laid[0] if self.rest is None else (laid[0], *self.rest)

        before = [(block, block.__dict__.get("forward")) for block in self.blocks]  # offloading may have put one there
        try:
            for block in self.blocks:
                block.__dict__["forward"] = forward
            yield
        finally:
            for block, own in before:
                del block.__dict__["forward"]
                if own is not None:
                    block.__dict__["forward"] = own


def below(model: nn.Module, inputs: Mapping[str, Tensor]) -> Below:
    """The blocks below the lowest one that an acting adapter acts in. To be called in evaluation mode, without gradients.

    Args:
        inputs: of two rows of different lengths, padded on the right, as the model takes them and without labels; what cannot be seen is tried on them.

    Raises:
        IngraftError: there are none, something acts below them, or what they make is not all that matters; says which.
    """
    control, what = require_control(model), original_class(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise IngraftError(f"cache_frozen: {what} is an encoder-decoder, which has two stacks of blocks. {LEAVE}.")
    try:
        paths = [block.path for block in roles.blocks(model)]
    except IngraftError as error:
        raise IngraftError(f"cache_frozen: {what} has no blocks that are known here. {LEAVE}.") from error
    if len({path.rpartition(".")[0] for path in paths}) > 1:
        raise IngraftError(f"cache_frozen: {what} has several stacks of blocks. {LEAVE}.")
    sites, method = _sites(control), ", ".join(control.adapters[name].method.name for name in control.call.active)
    lowest = next((n for n, path in enumerate(paths) if any(lies_in(site, path) for site in sites)), len(paths))
    if not lowest:
        raise IngraftError(
            f"cache_frozen: {method} acts in the first block ({paths[0]}), so nothing below it is the same in every "
            f"epoch. {LEAVE}, or adapt upper blocks only (method_config.layers_to_transform)."
        )
    blocks = tuple(model.get_submodule(path) for path in paths[:lowest])
    hosts = {path: state for path in sites if (state := host_state(model.get_submodule(path))) is not None}
    for state in hosts.values():
        state.ran = False
    returned = _run(model, blocks[-1], inputs)
    if early := [path or "the model itself" for path, state in hosts.items() if state.ran]:
        raise IngraftError(
            f"cache_frozen: {method} acts at {', '.join(early[:3])}{' and others' if early[3:] else ''} too, before the "
            f"blocks, so nothing is the same in every epoch. {LEAVE}, or adapt upper blocks only."
        )
    x_BTD, rest = _states(model, inputs, *returned)
    found = Below(model=model, blocks=blocks, total=len(paths), rest=rest, width=x_BTD.shape[2], dtype=x_BTD.dtype)
    _try(found, inputs, x_BTD)
    return found


def _sites(control: Control) -> list[str]:
    """Paths of all hosts of what acts, and of what that acts on."""
    acting = {name for group in control.call.groups for name in group.names}
    acting |= {other for name in acting for other in control.acted_on_by(name)}
    return [path for name in acting for path in control.adapters[name].sites]


def _run(model: nn.Module, last: nn.Module, inputs: Mapping[str, Tensor]) -> tuple[Any, Flat | None]:
    """What a block returns, and how the rows are laid in it. Nothing above it runs."""
    control = require_control(model)
    found: list[tuple[Any, Flat | None]] = []

    def take(module: nn.Module, args: Any, output: Any) -> None:
        del module, args
        found.append((output, control.call.flat))
        raise _Reached

    handle = last.register_forward_hook(take)
    try:
        model(**_plain(model, inputs))
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0] if found else (None, None)


def _states(
    model: nn.Module, inputs: Mapping[str, Tensor], output: Any, flat: Flat | None
) -> tuple[Tensor, tuple[None, ...] | None]:
    """The hidden states in what a block returned, in rows, and what stands behind them."""
    x, *behind = output if type(output) is tuple else (output,)
    shape = next(iter(inputs.values())).shape[:2] if flat is None else (1, flat.tokens)
    if not isinstance(x, Tensor) or x.dim() != 3 or x.shape[:2] != shape or any(part is not None for part in behind):
        raise IngraftError(
            f"cache_frozen: the blocks of {original_class(model).__name__} return more than one state a token. {LEAVE}."
        )
    return x if flat is None else flat.put_back(x), (None,) * len(behind) if type(output) is tuple else None


def _plain(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """The inputs, and no cache where there could be one."""
    return {**inputs, "use_cache": False} if "use_cache" in names_of(original_class(model)) else dict(inputs)


def _try(found: Below, inputs: Mapping[str, Tensor], x_BTD: Tensor) -> None:
    """Each row alone says what it says with its states given, which were made beside another row."""
    model = found.model
    what = original_class(model).__name__
    rows = [
        (x_BTD[row : row + 1, :length], _plain(model, {name: x[row : row + 1, :length] for name, x in inputs.items()}))
        for row, length in enumerate(inputs["attention_mask"].sum(1).tolist())
    ]
    # All of these first: what a lower block may leave somewhere for upper ones is then another row's.
    wanted: list[Tensor] = [model(**alone)[0].float() for _, alone in rows]
    for (states, alone), said in zip(rows, wanted, strict=True):
        try:
            with found.given(states):
                y: Tensor = model(**alone)[0].float()
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise IngraftError(
                f"cache_frozen: tried on two rows, {what} does not run on what its lower blocks made ({type(error).__name__}): more than hidden "
                f"states goes from block to block. {LEAVE} for this base."
            ) from error
        wrong = float((y - said).abs().max() / said.abs().max().clamp(min=torch.finfo(y.dtype).tiny))
        if not wrong <= torch.finfo(found.dtype).eps ** 0.5:  # NaN too
            raise IngraftError(
                f"cache_frozen: tried on two rows, {what} says other things where what its lower blocks made is kept and given to it (by {wrong:.1e} "
                f"of the largest): more than a row's own hidden states goes from block to block. {LEAVE} for this base."
            )


def _drops(module: nn.Module) -> bool:
    """Whether a module is in training mode, and not only because it is to recompute itself in backward."""
    return module.training and not getattr(module, "gradient_checkpointing", False)
