"""Heads for families of language models that transformers gives none, or one that cannot read the family's files.

transformers has the parts (`modeling_layers.GenericFor...`) and puts them on some decoders only: Gemma 3 cannot tag. And its Llama that finds answers keeps
its base under another name than the files do ("transformer" for "model"), so that loading it leaves every weight at random. Here
the same parts go onto the family's own base class, under the family's own name for the base. The classes are called `Ingraft...`, and so are the
models saved from them: another program then says that it does not know them instead of reading them wrong.
"""

from __future__ import annotations

from typing import Any, cast

PREFIX = "Ingraft"


def family_of(cls: type) -> Any:
    """The base class of all models of a family, such as `LlamaPreTrainedModel`."""
    return next(c for c in cls.__mro__ if c.__name__.endswith("PreTrainedModel"))


def class_for(config: Any, loader: Any, part: str) -> Any:
    """What loads a base with a head: transformers' auto class where it will do, a class made here where it will not; None if neither can be.

    Args:
        config: the base's. loader: the auto class.
        part: the name of transformers' generic head of this kind.
    """
    own = _entry(loader, config)
    if own is not None and own.base_model_prefix == family_of(own).base_model_prefix:
        return loader
    if own is None and hasattr(config, "auto_map"):
        return loader
    return _made(config, part)


def saved_class(config: Any, name: str) -> Any:
    """The class that a model was saved from, by its name; None if it was made elsewhere."""
    kind = "For" + name.rpartition("For")[2]
    return _made(config, f"Generic{kind}") if name.startswith(PREFIX) else None


def _made(config: Any, part: str) -> Any:
    import transformers
    from transformers import modeling_layers

    writer = _entry(transformers.AutoModelForCausalLM, config)
    if writer is None:
        return None
    family = family_of(writer)
    name = PREFIX + writer.__name__.partition("For")[0] + part.removeprefix("Generic")
    if name not in globals():  # a name of this module, so that copies and pickles find it
        inside = {"__module__": __name__, "base_model_prefix": family.base_model_prefix}
        globals()[name] = type(name, (getattr(modeling_layers, part), family), inside)
    return globals()[name]


def _entry(loader: Any, config: Any) -> Any:
    """The class that an auto class would load, if there is one."""
    found = cast(Any, loader)._model_mapping.get(type(config), None)
    return found[0] if isinstance(found, tuple) else found
