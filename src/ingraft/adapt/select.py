"""Which modules a config means.

The notation is Hugging Face PEFT's: a string is a regular expression over whole module names, a list names modules exactly or by a dotted
suffix, "all-linear" is every linear layer but the output head. Roles of a transformer block (`roles.py`) may stand in the list as well.
What differs: a pattern that matches nothing is an error with the nearest names, never silence, and `modules_to_save` matches whole
components ("head" does not mean "lm_head").
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ingraft.adapt import models
from ingraft.adapt.control import control_of
from ingraft.adapt.narrow import blocks_of, kept, named_twice, of_layers
from ingraft.adapt.narrow import matches as matches
from ingraft.adapt.roles import ROLES, blocks, sites_of_role
from ingraft.adapt.stacked import matrices, reads
from ingraft.adapt.swap import original_class, replaced_forward
from ingraft.adapt.walk import base_modules as base_modules
from ingraft.adapt.weights import ConvKind, bias_of, kind_of
from ingraft.errors import IngraftError, nearest
from ingraft.methods.contract import (
    AttentionPart,
    InputPart,
    Method,
    MethodConfig,
    ObservingPart,
    OutputPart,
    ParameterPart,
    WeightPart,
    adds,
)

ALL_LINEAR = "all-linear"

PLACES = ("biases", "norms", "parameters", "blocks", "tokens")
"""Names that may stand in `target_modules` beside module names and roles, for places that every model or most have."""

GENERAL = (ALL_LINEAR, *PLACES, *ROLES)
"""All that may stand there beside module names."""


def select(
    model: nn.Module, config: MethodConfig, method: Method, *, strict: bool = True
) -> tuple[dict[str, str], tuple[str, ...], list[str]]:
    """Resolve a config against a model; nothing is changed.

    Returns:
        the method's sites in model order (path -> role), the leaf modules trained in full beside them, and warnings.

    Raises:
        IngraftError: all problems: patterns that match nothing, modules the method cannot adapt, no site at all.
    """
    modules = base_modules(model)
    problems: list[str] = []
    unmatched: list[str] = []
    if method.over is None:
        sites = _targets(model, modules, config, method, problems, unmatched)
        sites |= _parameters(modules, config, method, sites, problems, unmatched)
    else:
        sites = _of_others(model, method, method.over(config))
    whole = _saved_whole(modules, config, unmatched)
    emptied: list[str] = []
    if config.exclude_modules is not None:
        excluded = _by_pattern(modules, config.exclude_modules, "exclude_modules", unmatched)
        sites = kept(sites, sites.keys() - set(excluded), "exclude_modules", emptied)
    if (layers := config.layers_to_transform) is not None:
        said = f"layers_to_transform = {', '.join(map(str, layers))} (they lie in blocks {blocks_of(sites)})"
        sites = kept(sites, of_layers(list(sites), modules, layers, unmatched), said, emptied)
    if not issubclass(method.part, ParameterPart):  # such train the module's own numbers, and whole is all of them
        unmatched += named_twice(config, sites, whole, GENERAL)
    sites = kept(sites, sites.keys() - whole, "modules_to_save, which trains them in full,", emptied)
    sites = {path: sites[path] for path in config.among([path for path in modules if path in sites])}
    idle = config.idle(
        [
            option
            for path in sites
            for option in ([f"{path}.{name}" for name in chosen_parameters(config, path, modules[path])] or [path])
        ]
    )
    unmatched += idle if sites or not emptied else []  # where nothing is left, what took it is the news
    for path in (*sites, *whole):
        problems += _host_problems(path, modules, method)
    problems += [
        problem for path, role in sites.items() if (problem := _site_problem(path, role, modules, method, config))
    ]
    problems += _packed_in_full(modules, sites, whole, method)
    dry = [problem for path in sites if (problem := _dropout_problem(path, modules, method, config))]
    unmatched += dry
    if not sites and not problems and not unmatched:
        why = f": {emptied[0]}." if emptied else "."
        text = f"{method.name}: the selection leaves no module to adapt in {original_class(model).__name__}{why}"
        problems.append(f"{text} {method.hint}".strip() if config.target_modules is None else text)
    if strict or not sites:
        problems = unmatched + problems
    if problems:
        raise IngraftError(*problems)
    order = {path: index for index, path in enumerate(modules)}
    sites = dict(sorted(sites.items(), key=lambda item: order[item[0]]))
    return (
        sites,
        tuple(sorted(whole, key=lambda path: order[path])),
        unmatched + _tie_warnings(model, modules, sites, method),
    )


def _targets(
    model: nn.Module,
    modules: dict[str, nn.Module],
    config: MethodConfig,
    method: Method,
    problems: list[str],
    unmatched: list[str],
) -> dict[str, str]:
    wanted: str | Sequence[str] = method.sites if config.target_modules is None else config.target_modules
    named = (wanted,) if isinstance(wanted, str) and wanted in GENERAL else wanted
    found: dict[str, str] = {}
    if isinstance(named, str):
        return {path: method.role(config, path) for path in _by_pattern(modules, named, "target_modules", unmatched)}
    for name in named:
        if name in ROLES:
            try:
                found.update({models.input_path(model): "input"} if name == "input" else sites_of_role(model, name))
            except IngraftError as error:
                problems.extend(error.problems)
        elif name == ALL_LINEAR:
            found.update(dict.fromkeys(all_linear(model, modules), "weight"))
        elif name == "biases":
            found.update({path: "weight" for path, module in modules.items() if _has_bias(module)})
        elif name == "parameters":
            found.update({path: "weight" for path, module in modules.items() if _owns_parameters(module)})
        elif name == "norms":
            found.update({path: "weight" for path, module in modules.items() if _is_norm(module)})
        elif name in ("blocks", "tokens"):
            try:
                places = [block.path for block in blocks(model)] if name == "blocks" else [models.token_path(model)]
            except IngraftError as error:
                problems.extend(error.problems)
            else:
                found.update(dict.fromkeys(places, "weight"))
        else:
            paths = _by_pattern(modules, (name,), "target_modules", unmatched)
            found.update({path: method.role(config, path) for path in paths})
    if issubclass(method.part, WeightPart):
        found |= {
            f"{path}.{child}": role
            for path, role in found.items()
            if matrices(modules[path])
            for child in reads(modules[path])
        }
    if issubclass(method.part, ParameterPart):
        found = {leaf: role for path, role in found.items() for leaf in _leaves(modules, path)}
    if method.follows_ties:
        tied = {
            id(p): role for path, role in found.items() for p in modules[path]._parameters.values() if p is not None
        }
        taken = {id(modules[path]) for path in found}  # a module may stand at several paths
        for path, module in modules.items():
            role = next((tied[id(p)] for p in module._parameters.values() if id(p) in tied), None)
            if role is not None and id(module) not in taken:
                found[path] = role
                taken.add(id(module))
    return found


def _of_others(model: nn.Module, method: Method, names: Sequence[str]) -> dict[str, str]:
    """The sites of the adapters that this one acts on.

    Raises:
        IngraftError: adapters that are not attached, add nothing that could be acted on, or lie at different places.
    """
    control = control_of(model)
    attached = {} if control is None else control.adapters
    problems = [
        f"{method.name}: it acts on {name!r}, and no adapter of that name is attached (attached: {', '.join(attached) or 'none'}). Attach or "
        "load that first."
        for name in names
        if name not in attached
    ]
    adapters = [attached[name] for name in names if name in attached]
    problems += [
        f"{method.name}: {adapter.name!r} ({adapter.method.name}) is no adapter that adds to what a block or projection returns; only such can be "
        "acted on."
        for adapter in adapters
        if not adds(adapter.method.part)
    ]
    for adapter in adapters:
        if issubclass(adapter.method.part, WeightPart):
            sites = [path for path in adapter.sites if path not in adapter.beside]
            odd = [path for path in sites if not _is_linear(model.get_submodule(path))]
            if odd:
                more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
                problems.append(
                    f"{method.name}: {adapter.name!r} ({adapter.method.name}) lies on {odd[0]}{more}; of adapters on weights only those of linear "
                    "layers can be acted on."
                )
    own = [{path: role for path, role in a.sites.items() if path not in a.beside} for a in adapters]
    problems += [
        f"{method.name}: {adapter.name!r} and {adapters[0].name!r} lie at different places; all must have the same target_modules."
        for adapter, sites in zip(adapters, own, strict=True)
        if sites != own[0]
    ]
    if len(names) < 2:
        problems.append(f"{method.name}: name at least two adapters to act on, got {', '.join(names) or 'none'}.")
    if problems:
        raise IngraftError(*problems)
    return own[0]


def _is_linear(module: nn.Module) -> bool:
    return (kind := kind_of(module)) is not None and kind.name in ("linear", "conv1d-transposed")


def all_linear(model: nn.Module, modules: dict[str, nn.Module]) -> list[str]:
    """Every linear layer but the output head (and, on a classifier, the head that lies beside the base); attentions that keep theirs
    as tensors of their own, too. Where a base has none but its head, its convolutions: a ResNet's layers."""
    linear = [path for path, module in modules.items() if matrices(module) or _is_linear(module)]
    head = models.output_head(model)
    linear = [path for path in linear if modules[path] is not head]
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and prefix in modules:
        inside = [path for path in linear if path.startswith(prefix + ".")]
        return inside or [path for path, module in modules.items() if isinstance(kind_of(module), ConvKind)] or linear
    if prefix:  # a bare transformers model: no head on it
        return linear
    # Of a plain module the last layer is taken for the head, unless it is one of a repeated block's.
    repeated = [path for path, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) > 1]
    if len(linear) > 1 and not any(linear[-1].startswith(path + ".") for path in repeated):
        return linear[:-1]
    return linear


def _by_pattern(
    modules: dict[str, nn.Module], pattern: str | Sequence[str], field: str, unmatched: list[str]
) -> list[str]:
    """Paths that a regular expression (string) or names (list) mean; each name that means nothing is noted with its nearest."""
    if isinstance(pattern, str):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            unmatched.append(f"{field}: {pattern!r} is no regular expression: {error}.")
            return []
        paths = [path for path in modules if path and compiled.fullmatch(path)]
        if not paths:
            unmatched.append(f"{field}: the pattern {pattern!r} matches no module{_near(pattern, modules)}.")
        return paths
    paths = []
    for name in pattern:
        hits = [path for path in modules if path and matches(name, path)]
        if not hits:
            unmatched.append(f"{field}: {name!r} matches no module{_near(name, modules)}.")
        paths += hits
    return paths


def _near(name: str, modules: Iterable[str]) -> str:
    """The nearest names: last components first, then whole paths."""
    paths = [path for path in modules if path]
    return nearest(name, dict.fromkeys(path.rpartition(".")[2] for path in paths)) or nearest(name, paths)


def _saved_whole(modules: dict[str, nn.Module], config: MethodConfig, unmatched: list[str]) -> set[str]:
    """Leaf modules under the names in modules_to_save."""
    paths = _by_pattern(modules, config.modules_to_save, "modules_to_save", unmatched) if config.modules_to_save else []
    return {leaf for path in paths for leaf in _leaves(modules, path)}


def _parameters(
    modules: dict[str, nn.Module],
    config: MethodConfig,
    method: Method,
    sites: dict[str, str],
    problems: list[str],
    unmatched: list[str],
) -> dict[str, str]:
    """Modules that own the tensors in target_parameters."""
    wanted = config.target_parameters or ()
    if wanted and not issubclass(method.part, WeightPart):
        problems.append(f"target_parameters: {method.name} is no change of a weight; leave it out.")
        return {}
    names = [f"{path}.{name}" if path else name for path, module in modules.items() for name in module._parameters]
    unmatched += [
        f"target_parameters: {pattern!r} matches no parameter{_near(pattern, names)}."
        for pattern in wanted
        if not any(matches(pattern, name) for name in names)
    ]
    found: dict[str, str] = {}
    for path, module in modules.items():
        chosen = chosen_parameters(config, path, module)
        if not chosen:
            continue
        found[path] = "parameters"
        if path in sites:
            problems.append(f"{path}: target_modules and target_parameters both mean it; name it in one of them.")
        problems += [
            f"target_parameters: {path}.{name} has {dim} dimensions; a method of weights needs a matrix (2) or a stack of them (3)."
            for name in chosen
            if (dim := module._parameters[name].dim()) not in (2, 3)  # type: ignore[union-attr]
        ]
    return found


def chosen_parameters(config: MethodConfig, path: str, module: nn.Module) -> tuple[str, ...]:
    """Which of a module's parameters `target_parameters` means, in the order in which the module has them."""
    start = f"{path}." if path else ""
    return tuple(
        name
        for name, own in module._parameters.items()
        if own is not None and any(matches(pattern, start + name) for pattern in config.target_parameters or ())
    )


def _raw(module: nn.Module) -> str:
    """A hint for modules that keep matrices in tensors of their own."""
    raw = [name for name, own in module._parameters.items() if own is not None and own.dim() == 3]
    return f", or its tensors in target_parameters ({', '.join(raw)})" if raw else ""


def _leaves(modules: dict[str, nn.Module], path: str) -> list[str]:
    """The modules at or below a path that own parameters."""
    inside = [p for p in modules if p == path or p.startswith(path + ".") or path == ""]
    return [p for p in inside if _owns_parameters(modules[p])]


def _owns_parameters(module: nn.Module) -> bool:
    return any(parameter is not None for parameter in module._parameters.values())


def _is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalisation with parameters; a PReLU, which is shaped like one, is none."""
    return (kind := kind_of(module)) is not None and kind.name == "norm" and not isinstance(module, nn.PReLU)


def _has_bias(module: nn.Module) -> bool:
    own = module._parameters
    stacked = any(matrix.bias is not None and own.get(matrix.bias) is not None for matrix in matrices(module))
    return stacked or (kind_of(module) is not None and bias_of(module) is not None)


def is_read(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether the module around this one reads its weight instead of calling it."""
    parent, _, name = path.rpartition(".")
    return bool(path) and name in reads(modules[parent])


def _host_problems(path: str, modules: dict[str, nn.Module], method: Method) -> list[str]:
    """Why this module cannot be a host of such parts."""
    found: list[str] = []
    module = modules[path]
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        found.append(
            f"{path} is a {original_class(module).__name__}, which has no forward of its own; name the modules inside it."
        )
    if replaced_forward(module):
        found.append(
            f"{path}: something has replaced `forward` on this instance, which would bypass the adapter. Attach first, then wrap."
        )
    if is_read(path, modules) and issubclass(method.part, OutputPart | ObservingPart):
        found.append(
            f"{path}: nn.MultiheadAttention reads this layer's weight and never calls it, so {method.name} would do nothing here. Name the attention itself."
        )
    return found


def _dropout_problem(path: str, modules: dict[str, nn.Module], method: Method, config: MethodConfig) -> str | None:
    """Dropout acts on the input of an adapter's branch; where there is only the definition by weights, it cannot act, and must not seem to."""
    wanted = [name for name, value in config.options().items() if name.endswith("dropout") and value]
    module = modules[path]
    kind = kind_of(module)
    aside = kind is not None and (kind.name == "embedding" or kind.knows_forward(original_class(module), module))
    if not wanted or not issubclass(method.part, WeightPart) or (aside and not is_read(path, modules)):
        return None
    return (
        f"{path} ({original_class(module).__name__}): its own code applies the weight, so {wanted[0]} cannot act there. "
        f"Set {wanted[0]} to 0, or leave this module out."
    )


def _site_problem(
    path: str, role: str, modules: dict[str, nn.Module], method: Method, config: MethodConfig
) -> str | None:
    """Why this method cannot adapt this module, or None."""
    part, module = method.part, modules[path]
    what = f"{path} ({original_class(module).__name__})"
    if issubclass(part, WeightPart):
        kind = kind_of(module)
        if inside := matrices(module, chosen_parameters(config, path, module)):
            if issubclass(part, ObservingPart):
                return f"{what}: {method.name} starts from the layer's inputs, and this module applies its weights in code of its own."
            hidden = [
                matrix.parameter
                for matrix in inside
                if not isinstance(module._parameters[matrix.parameter], nn.Parameter)
            ]
            return f"{what}: {hidden[0]} is computed, so changing it would do nothing." if hidden else None
        if isinstance(module, nn.modules.conv._ConvTransposeNd):
            return f"{what}: transposed convolutions are not adapted; their kernel has no (out, in) of its own. Leave this module out."
        if kind is None or (part.needs_matrix and not kind.matrix):
            return f"{what}: {method.name} needs a layer with a weight matrix (linear, embedding, convolution). Name such layers instead{_raw(module)}."
        if not isinstance(module._parameters.get("weight"), nn.Parameter):
            return f"{what}: its weight is computed (parametrized or weight-normed), so changing it would do nothing. Remove the parametrization first."
    elif issubclass(part, ParameterPart) and isinstance(module.__dict__.get("weight"), Tensor):
        return f"{what}: its weight is computed ahead of its forward (weight norm), so what it is computed from cannot be replaced there. Remove the norm first."
    elif (
        issubclass(part, OutputPart) and role == "weight" and isinstance(module, nn.Embedding | nn.modules.conv._ConvNd)
    ):
        return f"{what}: {method.name} adapts what a block or projection returns, vectors of features; this is an embedding or a convolution."
    elif issubclass(part, AttentionPart | InputPart) and role not in ("attention", "input"):
        return f"{what}: {method.name} has no choice of modules; leave target_modules out."
    return None


def _packed_in_full(
    modules: dict[str, nn.Module], sites: Iterable[str], whole: Iterable[str], method: Method
) -> list[str]:
    """Packed blocks hold no numbers that could be trained."""
    in_full = [*whole, *(sites if issubclass(method.part, ParameterPart) else ())]
    packed = [path for path in in_full if (kind := kind_of(modules[path])) and kind.dense_class is not None]
    if not packed:
        return []
    more = f" and {len(packed) - 1} more" if len(packed) > 1 else ""
    return [
        f"{packed[0]}{more}: kept in packed blocks, which cannot be trained in full. Name other modules, use a method that adds to the weight, "
        "or load the base without quantization."
    ]


def _tie_warnings(model: nn.Module, modules: dict[str, nn.Module], sites: dict[str, str], method: Method) -> list[str]:
    """Adapting one side of a tied weight is allowed, and said."""
    if not issubclass(method.part, WeightPart) or not method.part.needs_matrix:
        return []
    owners: dict[int, list[str]] = {}
    for path, module in modules.items():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(path)
    return [
        f"{path} shares its weight with {', '.join(other for other in paths if other != path)}; the adapter acts on {path} alone."
        for paths in owners.values()
        if len(paths) > 1
        for path in paths
        if path in sites
    ]
