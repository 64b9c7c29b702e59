"""The parts of an adapter: made from what their sites look like, counted before they are made, and found again once they are in place.

Two passes over the sites. The first sees sizes only; from it come the module that all sites share and the parameter counts. The second
hands each part its weight, one site at a time, so that no more than one dense copy of a quantised base's weights exists.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.control import Adapter, part_of, require_control, shared_of
from ingraft.adapt.offload import first_owner, is_offloaded, present
from ingraft.adapt.select import base_modules, chosen_parameters, select
from ingraft.adapt.stacked import Matrix, Stack, matrices, own_tensors
from ingraft.adapt.tokens import tokens_beside
from ingraft.adapt.walk import walked
from ingraft.adapt.weights import bias_of, kind_of
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import Method, MethodConfig, ParameterPart, Part, SiteFacts, WeightPart

WHOLE_ROLE = "whole"
"""The role of a module that is trained in full beside the method's own sites."""
TOKENS_ROLE = "tokens"
"""The role of a module some of whose rows are trained beside them."""
BESIDE = (WHOLE_ROLE, TOKENS_ROLE)


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
    parts: dict[str, Part] = {}
    masters: dict[int, nn.Parameter] = {}
    sizes = own_sizes(model, method, config, adapter.sites, finished=finished)
    with torch.random.fork_rng(devices=[]):
        draw_from(_seed(adapter.seed, "shared"))
        with present(*(first_owner(fact.module) for fact in sizes[:1])):  # it tells the device
            shared = method.shared(config, sizes) if method.shared is not None else None
        for path, role in adapter.sites.items():
            module = modules[path]
            maker, options = _maker(adapter, path, role)
            if is_offloaded(module) and issubclass(maker.part, ParameterPart):
                raise IngraftError(
                    f"{maker.name}: {path} is offloaded by accelerate, which hides the weights it is tied to. Attach first, then offload."
                )
            with present(module, first_owner(module)):
                draw_from(_seed(adapter.seed, path))
                if role not in BESIDE and (inside := _matrices(method, config, path, module)):
                    part = _stack(adapter, path, module, inside, shared, finished=finished)
                else:
                    facts = replace(facts_of(model, path, module, role), shared=shared, finished=finished)
                    part = maker.part(options, facts)
            if isinstance(part, ParameterPart):
                _follow_ties(module, part, masters)
            parts[path] = part.train(module.training)
    return parts, shared


def draw_from(seed: int) -> None:
    """Seed torch's generators. `torch.manual_seed` also writes down a stack trace for each kind of device, which took half the time of loading."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def _maker(adapter: Adapter, path: str, role: str) -> tuple[Method, MethodConfig]:
    """The method that makes the part of a site, and its options there."""
    if role == WHOLE_ROLE:
        return (whole := registry.load(registry.WHOLE)), whole.config()
    if role == TOKENS_ROLE:
        return registry.load(registry.TOKENS), _of_tokens(adapter.tokens[path])
    return adapter.method, adapter.config.at(path)


def _of_tokens(tokens: tuple[int, ...]) -> MethodConfig:
    return registry.make_config(registry.TOKENS, {"token_indices": list(tokens)})


def token_rows(
    model: nn.Module, config: MethodConfig, taken: Collection[str]
) -> tuple[dict[str, tuple[int, ...]], int]:
    """The modules whose rows are trained beside a config's own sites (`tokens.tokens_beside`), and how many numbers that are.

    Raises:
        IngraftError: as there, and for tokens that have no row.
    """
    tokens = tokens_beside(model, config, taken)
    method, problems, rows = registry.load(registry.TOKENS), [], {}
    for path, own in tokens.items():
        module = model.get_submodule(path)
        fact = facts_of(model, path, module, TOKENS_ROLE, values=False)
        problems += [reason for reason in [method.refuses(_of_tokens(own), fact)] if reason is not None]
        rows[id(module._parameters.get("weight"))] = method.count(_of_tokens(own), fact)
    if problems:
        raise IngraftError(*problems)
    return tokens, sum(rows.values())


def own_sizes(
    model: nn.Module, method: Method, config: MethodConfig, sites: dict[str, str], *, finished: bool = False
) -> tuple[SiteFacts, ...]:
    """What the method's own sites look like, without values.

    Raises:
        IngraftError: every site that the method refuses.
    """
    facts = [fact for fact, _ in _sized(model, method, config, sites, finished=finished)]
    return tuple(facts)


def _sized(
    model: nn.Module, method: Method, config: MethodConfig, sites: dict[str, str], *, finished: bool
) -> list[tuple[SiteFacts, MethodConfig]]:
    """What the method's own sites look like, each matrix of a site by itself, and the options that hold there."""
    modules = base_modules(model)
    found: list[tuple[SiteFacts, MethodConfig]] = []
    for path, role in sites.items():
        if role in BESIDE:
            continue
        inside = _matrices(method, config, path, modules[path])
        found += [
            (
                facts_of_matrix(method, config, path, modules[path], matrix, values=False),
                options_of(config, path, matrix),
            )
            for matrix in inside
        ]
        if not inside:
            found.append((facts_of(model, path, modules[path], role, values=False), config.at(path)))
    found = [(replace(fact, finished=finished), options) for fact, options in found]
    problems = [reason for fact, options in found if (reason := method.refuses(options, fact)) is not None]
    if problems:
        raise IngraftError(*_few(list(dict.fromkeys(problems))))
    return found


def _few(problems: list[str], shown: int = 8) -> list[str]:
    """The first of many problems of one sort, and how many more there are."""
    if len(problems) <= shown + 1:
        return problems
    return [*problems[:shown], f"... and {len(problems) - shown} other places, for like reasons."]


def _matrices(method: Method, config: MethodConfig, path: str, module: nn.Module) -> tuple[Matrix, ...]:
    """The matrices that a module keeps in tensors of its own, for methods that are defined by one."""
    return matrices(module, chosen_parameters(config, path, module)) if issubclass(method.part, WeightPart) else ()


def options_of(config: MethodConfig, path: str, matrix: Matrix) -> MethodConfig:
    """The options for one matrix: those of the module, or of the tensor that holds the experts."""
    return config.at(path if matrix.bias is not None else f"{path}.{matrix.parameter}")


def facts_of_matrix(
    method: Method, config: MethodConfig, path: str, module: nn.Module, matrix: Matrix, *, values: bool = True
) -> SiteFacts:
    """What a part for one matrix of a module may look at: a linear layer's."""
    own = own_tensors(module)
    W = matrix.weight(own)
    return SiteFacts(
        path=f"{path}.{matrix.key}",
        role=method.role(config, f"{path}.{matrix.parameter}" if matrix.bias is None else path),
        module=module,
        kind="linear",
        shape=tuple(W.shape),
        W=W if values else None,
        b=matrix.bias_of(own),
        takes_bias=matrix.bias is not None,
        width=W.shape[0],
    )


def _stack(
    adapter: Adapter,
    path: str,
    module: nn.Module,
    inside: tuple[Matrix, ...],
    shared: nn.Module | None,
    *,
    finished: bool,
) -> Stack:
    """A part for each matrix of a module, each from a seed of its own."""
    made: dict[Matrix, WeightPart] = {}
    for matrix in inside:
        facts = facts_of_matrix(adapter.method, adapter.config, path, module, matrix)
        draw_from(_seed(adapter.seed, facts.path))
        part = adapter.method.part(
            options_of(adapter.config, path, matrix), replace(facts, shared=shared, finished=finished)
        )
        assert isinstance(part, WeightPart)
        made[matrix] = part
    return Stack(made)


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
        takes_bias="bias" in module._parameters,
        parameters={name: p for name, p in module._parameters.items() if p is not None},
        width=models.width_of(model, module, kind),
    )


def base_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters, those of adapters left out."""
    return _tensors_of(model, "_parameters")


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base's own parameters and buffers."""
    return {**_tensors_of(model, "_parameters"), **_tensors_of(model, "_buffers")}


def _tensors_of(model: nn.Module, kind: str) -> dict[str, Any]:
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in walked(model).modules.items()
        for name, tensor in module.__dict__[kind].items()
        if tensor is not None
    }


def parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """An adapter's trained tensors under stable names (site path, then tensor name), each once."""
    control = require_control(model)
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    modules = walked(model).modules
    for path in control.require(name).sites:
        part = part_of(modules[path], name)
        for tensor, parameter in part.named_parameters() if part is not None else ():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{path}.{tensor}" if path else tensor] = parameter
    if (shared := shared_of(model, name)) is not None:
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
    sized = _sized(model, method, config, own, finished=finished)
    sizes = tuple(fact for fact, _ in sized)
    owned = {id(p): p.numel() for path in whole for p in modules[path]._parameters.values() if p is not None}
    total = sum(owned.values()) + token_rows(model, config, (*own, *whole))[1]
    seen = set(owned)
    for fact, options in sized:
        if issubclass(method.part, ParameterPart):  # what the base ties is one tensor in the parts too
            first = {name: p for name, p in fact.parameters.items() if id(p) not in seen}
            seen |= {id(p) for p in first.values()}
            fact = replace(fact, parameters=first)
        total += method.count(options, fact)
    if method.shared is not None:
        with torch.device("meta"):
            shared = method.shared(config, sizes)
        total += sum(p.numel() for p in shared.parameters()) if shared is not None else 0
    return total
