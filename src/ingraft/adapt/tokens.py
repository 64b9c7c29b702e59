"""Tokens trained beside a method's own sites (`trainable_token_indices`), and tokens that a model does not have yet.

The rows of some tokens are a part of their own in the same adapter, made by the method that trains tokens alone (`registry.TOKENS`). A head that
the base ties to the embedding gets one too, and both share their tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ingraft.adapt import models
from ingraft.adapt.control import control_of
from ingraft.adapt.select import base_modules, matches
from ingraft.errors import IngraftError, nearest
from ingraft.methods.contract import MethodConfig


def tokens_beside(model: nn.Module, config: MethodConfig, taken: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The modules whose rows are trained beside a config's own sites, each with the tokens; ties followed.

    Args:
        taken: the sites that the adapter has already.

    Raises:
        IngraftError: names that mean no module, modules that are sites of the method itself, ties of different tokens.
    """
    given = config.trainable_token_indices
    if given is None:
        return {}
    modules = base_modules(model)
    named = given if isinstance(given, Mapping) else {models.token_path(model): given}
    found: dict[str, tuple[int, ...]] = {}
    problems: list[str] = []
    for name, tokens in named.items():
        paths = [path for path in modules if path and matches(name, path)]
        if not paths:
            problems.append(f"trainable_token_indices: {name!r} matches no module{nearest(name, modules)}.")
        for path in paths:
            weight = modules[path]._parameters.get("weight")
            tied = [
                p for p, module in modules.items() if weight is not None and module._parameters.get("weight") is weight
            ]
            problems += [
                f"trainable_token_indices: {other} is named with different tokens, or tied to what is."
                for other in tied or [path]
                if found.setdefault(other, tokens) != tokens
            ]
    problems += [
        f"trainable_token_indices: {path} is adapted by {config.method} itself; leave it out of one of the two."
        for path in found
        if path in taken
    ]
    if problems:
        raise IngraftError(*dict.fromkeys(problems))
    order = {path: index for index, path in enumerate(modules)}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


@torch.no_grad()
def add_tokens(model: Any, tokenizer: Any, tokens: Sequence[str], *, special: bool = False) -> tuple[int, ...]:
    """Teach a tokenizer new tokens and give a transformers model rows for them; returns their ids, for `trainable_token_indices`.

    A new row is the mean of the rows there were, in the embedding and in a head of its own: the same in every process, so that an adapter
    that was trained on the grown base finds it again where this is called with the same tokens.

    Args:
        special: they are never split or normalised, and left out where a text is decoded without special tokens.

    Raises:
        IngraftError: if adapters are attached already.
    """
    if control_of(model) is not None:
        raise IngraftError("add_tokens: adapters are attached; add tokens first, then attach.")
    known = len(tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=special)
    ids = tuple(tokenizer.convert_tokens_to_ids(list(tokens)))
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    fresh = [token for token in ids if token >= known]
    ends = {
        id(layer.weight): layer
        for layer in (model.get_input_embeddings(), model.get_output_embeddings())
        if layer is not None
    }
    for layer in ends.values():
        for parameter in (layer.weight, getattr(layer, "bias", None)):
            if isinstance(parameter, nn.Parameter) and fresh:
                parameter[fresh] = parameter[:known].float().mean(0).to(parameter.dtype)
    return ids
