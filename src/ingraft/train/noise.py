"""NEFTune: noise on the embeddings of what a model reads, while it trains (Jain et al. 2023, https://arxiv.org/abs/2310.05914).

Each number of a row's embeddings gets one drawn evenly from -s to s, s = alpha / sqrt(L D), L the real tokens of the row and D the width. Padding counts for nothing
and gets nothing. transformers takes the columns of the batch for L, so that a row's noise depends on its neighbours; the authors' own code takes the tokens, as here.

Like dropout the noise is a hash of (seed, step, row, position) and no generator's: the same in another micro-batch, packed, in a repeated pass over a step, and in a run
that was stopped. It acts where the adapter is in training mode, so evaluations, references and trial passes see none.

The place is behind the module that embeds tokens, whatever acts in it, and before virtual tokens join: these are trained, and need none. A decoder that writes behind an encoder
gets none either: the noise is for what is read.

Legend: B rows, T columns of the batch, N real tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft.adapt.control import child_name, require_control, shared_name
from ingraft.adapt.dropout import bits
from ingraft.adapt.rows import row_keys
from ingraft.adapt.swap import original_class
from ingraft.errors import IngraftError
from ingraft.recipe import Recipe

SALT = 0x4E4546
"""Apart from every site's."""


def noise(mask_BT: Tensor, width: int, alpha: float, keys_B: Tensor) -> Tensor:
    """(B, T, width) float32 noise for rows of these real tokens, zero where none is."""
    shape = torch.Size((*mask_BT.shape, width))
    drawn_BTD = (bits(shape, keys_B).float() + 0.5) / 2**15  # from -1 to 1, none of them at an end
    lengths_B11 = mask_BT.sum(1)[:, None, None].clamp(min=1)
    return drawn_BTD * (alpha / (lengths_B11 * width).sqrt()) * mask_BT[:, :, None]


@contextmanager
def noisy(model: nn.Module, adapter: str, recipe: Recipe) -> Iterator[None]:
    """Inside the block forward passes in which this adapter trains have noise on their embeddings, if the recipe asks for it.

    Raises:
        IngraftError: it cannot be seen where the model embeds tokens.
    """
    alpha = recipe.neftune_noise_alpha
    if alpha is None:
        yield
        return
    control, own = require_control(model), {child_name(adapter), shared_name(adapter)}
    parts = [module for path, module in model.named_modules() if own.intersection(path.split("."))]
    named = cast(nn.Module, cast(Any, model).get_input_embeddings())
    # Some models look up with another module that holds the same tensor.
    places = [m for m in model.modules() if m is named or (isinstance(m, nn.Embedding) and m.weight is named.weight)]
    read: list[dict[str, Any]] = []
    salt = recipe.seed ^ SALT

    def begin(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        del module, args
        read[:] = [kwargs] if any(part.training for part in parts) else []

    def end(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        del module, args, output
        if read:
            raise IngraftError(
                f"neftune_noise_alpha: {original_class(model).__name__} embeds its tokens where this is not seen; leave it out."
            )

    def add(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        del module
        if not read:
            return None
        ids, flat = args[0] if args else None, control.call.flat
        given_BT, mask_BT = read[0]["input_ids"], read[0]["attention_mask"]
        laid = flat is not None and flat.holds(output)
        if not laid and (
            not isinstance(ids, Tensor) or ids.data_ptr() != given_BT.data_ptr() or ids.shape != given_BT.shape
        ):
            return None  # what a decoder writes
        read.clear()
        keys_B = row_keys(control.call, salt, given_BT.shape[0], None, output.device)
        drawn_BTD = noise(mask_BT, output.shape[-1], alpha, keys_B).to(output.dtype)
        return output + (flat.lay(drawn_BTD) if laid and flat is not None else drawn_BTD)

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end),
        *(place.register_forward_hook(add) for place in places),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
