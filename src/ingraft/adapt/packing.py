"""Turning packing on, and trying first whether a model keeps packed rows apart.

What lays the rows end to end is `flat.py`. It is right where nothing but registered attention mixes tokens, and where positions can be told;
what can be seen to be otherwise is refused by name. What cannot be seen is tried, on the base alone:

* two rows packed say what each says alone (a wrong position or mask shows, within the dtype's rounding);
* another first row changes nothing in the second, whose products stay the same ones: to a few roundings, whatever the dtype, or to what it
  changes in a batch that is not packed (experts get other numbers of tokens).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.control import Control, control_of, require_control
from ingraft.adapt.counting import alone
from ingraft.adapt.swap import original_class
from ingraft.errors import IngraftError


@contextmanager
def packing(model: nn.Module) -> Iterator[None]:
    """Inside the block the layers see the real tokens of a batch laid end to end, and no padding; what is returned is as ever.

    It acts on plain forwards of rows with an attention mask, (rows, tokens), and no cache. Which rows form a batch, their positions, their
    prompts, prefixes and dropout do not change.

    Raises:
        IngraftError: nothing is attached; the model cannot tell packed rows apart.
    """
    control = require_control(model)
    before = control.packing
    if not before and (problem := models.why_no_packing(model)) is not None:
        raise IngraftError(f"data.packing: {problem} Leave packing false for this base.")
    control.packing = True
    models.settle(model)
    try:
        if not control.packs:
            _try(model, control)
            control.packs = True
        yield
    finally:
        control.packing = before
        if control_of(model) is control:  # or everything was detached, and with it this
            models.settle(model)


def _try(model: nn.Module, control: Control) -> None:
    what = original_class(model).__name__
    config: Any = model.config
    special = {getattr(config, name, None) for name in ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id")}
    vocabulary: int = model.get_input_embeddings().num_embeddings  # type: ignore[operator,union-attr]
    ids = [n for n in range(min(vocabulary, 64)) if n not in special]
    pad = getattr(config, "pad_token_id", None)  # by which some models find a row's last token
    fill = pad if pad is not None else ids[0]
    device = next(model.parameters()).device
    first, second, other = (
        [ids[(n * step + 1) % len(ids)] for n in range(length)] for step, length in ((3, 9), (5, 6), (7, 9))
    )

    def said(*rows: list[int]) -> list[Tensor]:
        T = max(map(len, rows))
        batch = torch.tensor([[*row, *[fill] * (T - len(row))] for row in rows], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows], device=device)
        found = model(input_ids=batch, attention_mask=mask)
        y: Tensor = found[0]
        by_token = y.dim() == 3 or "start_logits" in found
        return [one[: len(row)] if by_token else one for one, row in zip(y.float(), rows, strict=True)]

    with alone(model, control):
        single = [said(row)[0] for row in (first, second)]
        noise = _apart(said(first, second)[1], said(other, second)[1])
        control.packing = True
        packed, changed = said(first, second), said(other, second)
    rounding = torch.finfo(next(model.parameters()).dtype).eps
    wrong = max(_apart(x, y) for x, y in zip(packed, single, strict=True))
    leaked = _apart(packed[1], changed[1])
    if not wrong <= rounding**0.5 or not leaked <= max(8 * rounding, 4 * noise):
        raise IngraftError(
            f"data.packing: tried on two rows, {what} does not keep them apart: packed they differ by {wrong:.1e} from each alone, and the first "
            f"changes the second by {leaked:.1e}. Something in it but attention mixes tokens. Leave packing false for this base."
        )


def _apart(x: Tensor, y: Tensor) -> float:
    """The largest difference, as a share of the largest entry."""
    return float((x - y).abs().max() / y.abs().max().clamp(min=torch.finfo(torch.float32).tiny))
