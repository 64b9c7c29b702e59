"""The parts of an adapter: made from what their sites look like, counted before they are made, and found again once they are in place.

Two passes over the sites. The first sees sizes only; from it come the module that all sites share and the parameter counts. The second
hands each part its weight, one site at a time, so that no more than one dense copy of a quantised base's weights exists.
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.control import Adapter, child_name, part_of, require_control
from ingraft.adapt.offload import first_owner, is_offloaded, present
from ingraft.adapt.select import base_modules, select
from ingraft.adapt.weights import bias_of, kind_of
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import Method, MethodConfig, ParameterPart, Part, SiteFacts

WHOLE_ROLE = "whole"
"""The role of a module that is trained in full beside the method's own sites."""


def make_parts(
    model: nn.Module, adapter: Adapter, *, finished: bool = False
) -> tuple[dict[str, Part], nn.Module | None]:
    """The adapter's parts by path and their shared module, with initial values that depend on the seed and the path alone.

    Args:
        finished: the values are about to be replaced by a file's (`SiteFacts.finished`).

    Raises:
        IngraftError: every site that the method refuses.
    """
    modules = base_modules(model)
    config, method = adapter.config, adapter.method
    whole = registry.load(registry.WHOLE)
    parts: dict[str, Part] = {}
    masters: dict[int, nn.Parameter] = {}
    sizes = own_sizes(model, method, config, adapter.sites, finished=finished)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed(adapter.seed, "shared"))
        with present(*(first_owner(modules[fact.path]) for fact in sizes[:1])):  # it tells the device
            shared = method.shared(config, sizes) if method.shared is not None else None
        for path, role in adapter.sites.items():
            module = modules[path]
            maker, options = (whole, whole.config()) if role == WHOLE_ROLE else (method, config.at(path))
            if is_offloaded(module) and issubclass(maker.part, ParameterPart):
                raise IngraftError(
                    f"{maker.name}: {path} is offloaded by accelerate, which hides the weights it is tied to. Attach first, then offload."
                )
            with present(module, first_owner(module)):
                torch.manual_seed(_seed(adapter.seed, path))
                facts = replace(facts_of(model, path, module, role), shared=shared, finished=finished)
                part = maker.part(options, facts)
            if isinstance(part, ParameterPart):
                _follow_ties(module, part, masters)
            parts[path] = part.train(module.training)
    return parts, shared


def own_sizes(
    model: nn.Module, method: Method, config: MethodConfig, sites: dict[str, str], *, finished: bool = False
) -> tuple[SiteFacts, ...]:
    """What the method's own sites look like, without values.

    Raises:
        IngraftError: every site that the method refuses.
    """
    modules = base_modules(model)
    facts = [
        replace(facts_of(model, path, modules[path], role, values=False), finished=finished)
        for path, role in sites.items()
        if role != WHOLE_ROLE
    ]
    problems = [reason for fact in facts if (reason := method.refuses(config.at(fact.path), fact)) is not None]
    if problems:
        raise IngraftError(*problems)
    return tuple(facts)


def _seed(seed: int, path: str) -> int:
    return (seed * 1_000_003 + zlib.crc32(path.encode())) % 2**63


def _follow_ties(module: nn.Module, part: ParameterPart, masters: dict[int, nn.Parameter]) -> None:
    """Where the base has one parameter at two places, let both parts have one tensor."""
    for name, own in list(part._parameters.items()):
        base = module._parameters.get(name)
        if own is not None and base is not None:
            part._parameters[name] = masters.setdefault(id(base), own)


def facts_of(model: nn.Module, path: str, module: nn.Module, role: str, *, values: bool = True) -> SiteFacts:
    """What a part at this site may look at. Without `values`, its sizes only."""
    if role in ("attention", "input"):
        return models.site_facts(model, path, module, role)
    kind = kind_of(module)
    weight = kind.weight_of(module) if kind is not None and values else None
    origin = kind.origin_of(module) if kind is not None else None
    return SiteFacts(
        path=path,
        role=role,
        module=module,
        kind=kind.name if kind is not None else "",
        shape=kind.shape_of(module) if kind is not None else (),
        W=kind.dense(weight) if kind is not None and weight is not None else None,
        original=origin.read if origin is not None else None,
        b=bias_of(module),
        parameters={name: p for name, p in module._parameters.items() if p is not None},
        width=models.width_of(model, module),
    )


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters, those of adapters left out."""
    return {
        f"{path}.{name}" if path else name: parameter
        for path, module in base_modules(model).items()
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's trained tensors under stable names (site path, then tensor name), each once."""
    control = require_control(model)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for path in control.require(name).sites:
        part = part_of(model.get_submodule(path), name)
        for tensor, parameter in part.named_parameters() if part is not None else ():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{tensor}" if path else tensor] = parameter
    shared = model._modules.get(child_name(name))
    if shared is not None and not isinstance(shared, Part):
        found.update({f"shared.{tensor}": parameter for tensor, parameter in shared.named_parameters()})
    return found


def training_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors beside an adapter's parameters that training changes (`Part.training_state`), named likewise."""
    found: dict[str, Tensor] = {}
    for path in require_control(model).require(name).sites:
        part = part_of(model.get_submodule(path), name)
        if part is not None:
            found |= {f"{path}.{tensor}": part.get_buffer(tensor) for tensor in part.training_state}
    return found


def expected_count(model: nn.Module, config: MethodConfig, *, finished: bool = False) -> int:
    """Trained parameters of a config on this model by the method's formula, without attaching anything.

    Args:
        finished: it is the config of a file.

    Raises:
        IngraftError: as `attach`.
    """
    method: Method = registry.load(config.method)
    own, whole, _ = select(model, config, method, strict=not finished)
    modules = base_modules(model)
    sizes = own_sizes(model, method, config, own, finished=finished)
    owned = {id(p): p.numel() for path in whole for p in modules[path]._parameters.values() if p is not None}
    total = sum(owned.values())
    seen = set(owned)
    for fact in sizes:
        if issubclass(method.part, ParameterPart):  # what the base ties is one tensor in the parts too
            first = {name: p for name, p in fact.parameters.items() if id(p) not in seen}
            seen |= {id(p) for p in first.values()}
            fact = replace(fact, parameters=first)
        total += method.count(config.at(fact.path), fact)
    if method.shared is not None:
        with torch.device("meta"):
            shared = method.shared(config, sizes)
        total += sum(p.numel() for p in shared.parameters()) if shared is not None else 0
    return total
