"""The adapters of a run over its base: the one that is trained, those that it acts over, and the reference that a policy is compared with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from ingraft import adapt
from ingraft.adapt.control import Adapter, require_control
from ingraft.adapt.files import load, save
from ingraft.adapt.lifecycle import acting_kept
from ingraft.bases import HEADS
from ingraft.bases.heads import head_modules
from ingraft.errors import IngraftError
from ingraft.evaluate.judges import VALUE, Judge, keep_judge, load_judge
from ingraft.evaluate.roles import REFERENCE
from ingraft.methods import registry
from ingraft.recipe import Recipe, plain

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"


def attach(model: PreTrainedModel, recipe: Recipe, fresh: tuple[str, ...], allow_base_mismatch: bool) -> Recipe:
    """Attach what is trained. Returns the recipe as it then is: an adapter that training starts from brings its own options."""
    if recipe.init_adapter is not None:
        load(model, recipe.init_adapter, name=ADAPTER, trainable=True, allow_base_mismatch=allow_base_mismatch)
        return _as_started(recipe, require_control(model).require(ADAPTER))
    for name, folder in recipe.adapters.items():
        load(model, folder, name=name)
    config = registry.make_config(recipe.method, recipe.method_config)
    if HEADS[recipe.task].fresh and not config.modules_to_save:
        head = head_modules(model)
        beside = tuple(path for path in fresh if path.split(".")[0] not in head)
        config = dataclasses.replace(config, modules_to_save=(*head, *beside))
    adapt.attach(model, config, name=ADAPTER, seed=recipe.seed)
    return recipe


def keep_reference(model: PreTrainedModel, recipe: Recipe, allow_base_mismatch: bool) -> None:
    """A frozen copy of what the policy is compared with: the adapter that training starts from, if there is one and no other was named."""
    folder = recipe.reference_adapter or recipe.init_adapter
    if folder is not None:
        with acting_kept(model):
            load(model, folder, name=REFERENCE, allow_base_mismatch=allow_base_mismatch)


def keep_roles(model: nn.Module, recipe: Recipe, run: Path) -> None:
    """Keep the reference, if it is an adapter, and the reward model in the run's folder: the run and its evaluations need no other folder then."""
    if REFERENCE in require_control(model).adapters:
        save(model, run / REFERENCE, REFERENCE, overwrite=True)
    if recipe.reward_adapter is not None:
        keep_judge(Path(recipe.reward_adapter), run)


def attach_value(model: PreTrainedModel, recipe: Recipe, allow_base_mismatch: bool) -> Judge:
    """The value function, to be trained: it starts as the reward model where there is one, else as a fresh adapter that says 0."""
    if recipe.reward_adapter is not None:
        folder = Path(recipe.reward_adapter)
        return load_judge(model, folder, VALUE, trainable=True, allow_base_mismatch=allow_base_mismatch)
    config = registry.make_config(recipe.method, recipe.method_config)
    with acting_kept(model):
        adapt.attach(model, config, name=VALUE, seed=recipe.seed)
    width = cast(Any, model).get_output_embeddings().weight.shape[1]
    return Judge(name=VALUE, head_1D=nn.Parameter(torch.zeros(1, width, device=model.device)))


def _as_started(recipe: Recipe, adapter: Adapter) -> Recipe:
    """The recipe with the options of the adapter that it starts from.

    Raises:
        IngraftError: the recipe asks for another method, or for other options.
    """
    method, folder = adapter.method.name, recipe.init_adapter
    if method != recipe.method:
        raise IngraftError(
            f"init_adapter: {folder} holds a {method} adapter, and method is {recipe.method}; give method {method}."
        )
    usual = plain(dataclasses.asdict(cast(Any, registry.make_config(method, {}))))
    brought = plain(dataclasses.asdict(cast(Any, adapter.config)))
    asked = {
        key: value for key, value in recipe.method_config.items() if value not in (usual.get(key), brought.get(key))
    }
    if asked:
        raise IngraftError(
            *(
                f"method_config.{key}: {value!r} is asked for, and the adapter in {folder} has {brought.get(key)!r}; leave it out."
                for key, value in asked.items()
            )
        )
    return dataclasses.replace(recipe, method_config=brought)
