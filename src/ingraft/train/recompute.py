"""Gradient checkpointing, block by block.

A block that recomputes itself keeps what went into it and nothing else until its turn in backward comes. transformers' blocks do that when their
own flag is set, with the adapters that acted in the forward pass (adapt/hf.py), so gradients are the same to the bit.

Which blocks: the first ones of those that take part in backward. While the last blocks are on their way back the first are
kept whole or kept small, whichever was chosen; recomputing the last ones would spare nothing at that moment, because then everything before them is still there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from functools import partial
from typing import Any, cast

from torch import nn

from ingraft.errors import IngraftError
from ingraft.recipe import Recipe


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that can recompute themselves one by one, in the model's order."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def enable(model: nn.Module, recipe: Recipe) -> None:
    """Make a model ready for what the recipe asks; to be called before adapters are attached.

    Raises:
        IngraftError: this model cannot recompute its blocks, not one by one, or not so many.
    """
    asked, blocks = recipe.gradient_checkpointing, blocks_of(model)
    if asked is False or asked == 0:
        return
    name = type(model).__name__
    if asked is not True and not blocks:
        raise IngraftError(
            f"gradient_checkpointing: the blocks of {name} cannot be chosen one by one; use true or false, not {asked!r}."
        )
    if asked is not True and asked != "auto" and int(asked) > len(blocks):
        raise IngraftError(f"gradient_checkpointing: {asked} blocks are asked for, and {name} has {len(blocks)}.")
    # The second name is the first one's before transformers 5.20 or so, and warns since.
    switch = getattr(model, "activation_checkpointing_enable", None) or getattr(
        model, "gradient_checkpointing_enable", None
    )
    try:
        if switch is None:
            raise ValueError
        switch({"use_reentrant": False})
    except ValueError as error:
        raise IngraftError(f"gradient_checkpointing: {name} cannot recompute its blocks; use false.") from error
    # transformers lets the embeddings' output require a gradient, which reentrant checkpointing would need: everything below the lowest
    # adapted layer would then run backward for nothing.
    cast(Any, model).disable_input_require_grads()
    for block in cast(Any, blocks):
        # A partial of a module's function, so that copies and pickles of the model have blocks of their own in it.
        block._gradient_checkpointing_func = partial(_in_evaluation, block, block._gradient_checkpointing_func)


def _in_evaluation(
    block: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """A block recomputes itself only with its training flag set, and some blocks' own code asks the same flag whether to drop out
    (`functional.dropout` in OPT's); a frozen base drops nothing."""

    def still(*args: Any, **kwargs: Any) -> Any:
        before, block.training = block.training, False
        try:
            return forward(*args, **kwargs)
        finally:
            block.training = before

    return checkpoint(still, *args, **kwargs)


def flagged(model: nn.Module) -> set[nn.Module]:
    """The modules that ask their own training flag whether to recompute: the blocks, or what holds them in a model where they cannot be chosen."""
    return set(blocks_of(model)) or {m for m in model.modules() if hasattr(m, "gradient_checkpointing")}


def use(model: nn.Module, chosen: Collection[int]) -> None:
    """Let the blocks of these numbers recompute themselves, and no others."""
    for number, block in enumerate(blocks_of(model)):
        cast(Any, block).gradient_checkpointing = number in chosen
