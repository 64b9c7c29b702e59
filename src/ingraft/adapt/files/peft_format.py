"""`adapter_config.json` in Hugging Face PEFT's format, both directions, as each method's `PeftLayout` describes it.

Nothing here knows a method by name: a layout is data, this file and `peft_tensors.py` interpret it. A method that PEFT does not have, or has with another meaning at one of the sites, uses the same two files under a `peft_type` of
our own (`INGRAFT_HOULSBY`), so that PEFT refuses it by name instead of misreading it.

Which modules an adapter sits in is always written as the shortest list of names that PEFT's own rule resolves to exactly these modules:
"all-linear", roles and patterns mean different things to different libraries and versions, a list of names does not.

In reading, everything that would change what the adapter computes and that we do not have is refused by name; PEFT itself drops unknown fields
with a warning, which is kept for files that are not ours.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, cast

from torch import nn

from ingraft.adapt.building import BESIDE, base_parameters
from ingraft.adapt.control import Adapter
from ingraft.adapt.files.peft_heads import inside_of, read_whole, within, written_class, written_task, written_whole
from ingraft.adapt.files.peft_heads import task_of as task_of
from ingraft.adapt.models import token_path
from ingraft.adapt.select import base_modules, chosen_parameters, is_read, matches
from ingraft.adapt.swap import original_class
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError, nearest
from ingraft.methods import registry
from ingraft.methods.contract import Method, MethodConfig, PeftLayout

OWN = "INGRAFT_"

_COMMON = (
    *("target_modules", "exclude_modules", "layers_to_transform", "target_parameters"),
    *("modules_to_save", "trainable_token_indices"),
)
_NAMES = ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern")
_UNREAD = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)

# ------------------------------------------------------------------------------------------------------------------ config, out


def write_config(model: nn.Module, adapter: Adapter, layout: PeftLayout | None) -> dict[str, Any]:
    """`adapter_config.json` of an adapter."""
    modules = base_modules(model)
    task = written_task(model, adapter, layout)
    head: dict[str, Any] = {
        "base_model_name_or_path": base_name(model),
        "task_type": task,
        "inference_mode": True,
        "auto_mapping": None if task is not None else written_class(model),
        "revision": None,
    }
    options = adapter.config.options()
    if layout is None:
        return {
            "peft_type": own_type(adapter.method),
            **head,
            **{name: plain_value(value) for name, value in options.items()},
        }
    sites = {path: role for path, role in adapter.sites.items() if role not in BESIDE}
    if adapter.method.follows_ties:  # as it does there
        sites = {path: sites[path] for path in first_owners(modules, sites)}
    written: dict[str, Any] = {"peft_type": layout.peft_type, **head, **layout.written, **layout.constants}
    for name, value in options.items():
        theirs = layout.fields.get(name, name)
        if name not in _COMMON and theirs is not None:
            written[theirs] = plain_value(value)
    if layout.encode is not None:
        written |= layout.encode(written)
    if layout.tokens is not None:
        written[layout.tokens] = _written_tokens(model, adapter)
    if layout.site_count is not None:
        written[layout.site_count] = len(sites)
    if layout.bare:
        return written
    if layout.fields.get("modules_to_save", "") is not None:
        written["modules_to_save"] = written_whole(modules, adapter, inside_of(layout)) or None
    if layout.stacked:
        return written | _written_sizes(model)
    names: list[str] = []
    if layout.experts:
        raw = [f"{path}.{name}" for path in sites for name in chosen_parameters(adapter.config, path, modules[path])]
        written["target_parameters"] = raw or None
    sites = {path: role for path, role in sites.items() if role != "parameters" and not is_read(path, modules)}
    special = {role: field for field, role in layout.role_fields.items()}
    for role in sorted(set(special) | {""}):
        group = [path for path, own in sites.items() if own == role or (role == "" and own not in special)]
        chosen = names_for(group, modules, dotted=role == "")
        names += chosen
        if role:
            written[special[role]] = sorted(chosen)
    written["target_modules"] = sorted(set(names))
    if layout.transposed_field is not None:
        kinds = {kind.name for path in sites if (kind := kind_of(modules[path]))}
        written[layout.transposed_field] = kinds == {"conv1d-transposed"}
    return written


def _written_sizes(model: nn.Module) -> dict[str, int]:
    """The sizes that PEFT needs for a soft prompt, where the model's config tells them: PEFT itself finds them under some names alone."""
    names = {
        "token_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_attention_heads": "num_attention_heads",
    }
    config = getattr(model, "config", None)
    sizes = {theirs: getattr(config, name, None) for theirs, name in names.items()}
    return {theirs: size for theirs, size in sizes.items() if isinstance(size, int)}


def _written_tokens(model: nn.Module, adapter: Adapter) -> Any:
    """Tokens trained beside a method: a list for the model's own embedding, else by module. What is tied to it follows there too."""
    own = {path: list(adapter.tokens[path]) for path in first_owners(base_modules(model), adapter.tokens)}
    path = model_tokens(model)
    return own[path] if path is not None and list(own) == [path] else own or None


def model_tokens(model: nn.Module) -> str | None:
    """Path of a model's embedding of tokens, None where it names none."""
    try:
        return token_path(model)
    except IngraftError:
        return None


def first_owners(modules: Mapping[str, nn.Module], paths: Iterable[str]) -> Iterator[str]:
    """Those of some modules whose parameters no earlier one owns."""
    seen: set[int] = set()
    for path in paths:
        own = {id(p) for p in modules[path]._parameters.values() if p is not None}
        if not own & seen:
            yield path
        seen |= own


def own_type(method: Method) -> str:
    """The `peft_type` of a method that PEFT does not have."""
    return OWN + re.sub(r"[^A-Z0-9]", "_", method.name.upper())


def base_name(model: nn.Module) -> str | None:
    """What the base was loaded as, if it says so."""
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def plain_value(value: object) -> Any:
    """A config's value as JSON has it."""
    if isinstance(value, float) and value.is_integer():
        return int(value)  # as PEFT writes them, and the same whichever of the two the user gave
    if isinstance(value, Mapping):
        return {key: plain_value(item) for key, item in cast(Mapping[str, object], value).items()}
    return list(value) if isinstance(value, tuple) else value


def names_for(paths: Collection[str], modules: Iterable[str], *, dotted: bool = True) -> list[str]:
    """The shortest names that mean exactly these modules: last components where that is unambiguous, whole paths elsewhere.

    Args:
        dotted: names match whole components; otherwise ends of strings, as PEFT does for some fields.
    """
    wanted = set(paths)
    endings: dict[str, set[str]] = {}
    for path in wanted:
        endings.setdefault(path.rpartition(".")[2], set()).add(path)
    names: list[str] = []
    everything = list(modules)
    for ending, mine in endings.items():
        hits = {path for path in everything if (matches(ending, path) if dotted else path.endswith(ending))}
        names += [ending] if hits <= wanted else mine
    return sorted(names)


# ------------------------------------------------------------------------------------------------------------------ config, in


def read_config(
    model: nn.Module, raw: Mapping[str, Any], *, shared: bool, ours: bool, where: str, method: str | None = None
) -> tuple[MethodConfig, PeftLayout | None]:
    """The method's config that a file means for this model, and the layout of its tensors (None: our own).

    Args:
        shared: whether the tensors of the method's shared module come with it (where it has one; PEFT does not keep them).
        ours: whether Ingraft wrote the file; then an unknown field is an error, not a warning.
        where: the file, for messages.
        method: the method it is said to be, which counts where several are kept alike.

    Raises:
        IngraftError: every field that cannot be honoured, by name.
    """
    kind = raw.get("peft_type")
    if not isinstance(kind, str):
        raise IngraftError(f"{where}: has no peft_type, so it is not the config of an adapter.")
    methods = list(registry.methods())
    own = next((method for method in methods if kind == own_type(method)), None)
    if own is not None:
        _unknown(raw, {*_UNREAD, *_option_names(own)}, ours=True, where=where)
        return _make(own, {name: value for name, value in raw.items() if name in _option_names(own)}, where), None
    raw = _respelt(methods, kind, raw, where)
    found, layout = _identify(sorted(methods, key=lambda one: one.name != method), kind, raw, where)
    if problems := _ill_typed(raw, layout, where):
        raise IngraftError(*problems)
    theirs = {ours_: layout.fields.get(ours_, ours_) for ours_ in _option_names(found) if ours_ not in _COMMON}
    known = {
        *_UNREAD,
        *_COMMON,
        "layers_pattern",
        *layout.constants,
        *layout.accepted,
        *layout.off,
        *layout.written,
        *layout.ignored,
    }
    known |= {name for name in (*theirs.values(), layout.tokens, layout.ties) if name is not None}
    _unknown(raw, known | ({layout.transposed_field} if layout.transposed_field else set()), ours=ours, where=where)
    raw = _filled(raw, ours=ours)
    problems = [
        f"{where}: {name} = {raw[name]!r} is not supported; without it the adapter would compute something else. {remedy(found)}"
        for name in sorted({*layout.accepted, *layout.off} & set(raw))
        if not (raw[name] in layout.accepted[name] if name in layout.accepted else not raw[name])
        and not _idle(model, name, raw[name])
    ]
    problems += [
        f"{where}: {name} = {raw[name]!r}: {layout.unreadable[name][raw[name]]}"
        for name in sorted(layout.unreadable.keys() & raw)
        if isinstance(raw[name], str) and raw[name] in layout.unreadable[name]
    ]
    if problems:
        raise IngraftError(*problems)
    version = str(raw.get("peft_version") or "")
    for name, (since, words) in layout.changed_in.items():
        if raw.get(name) and _release(version) < _release(since):
            warnings.warn(
                f"{where}: {name} = {raw[name]!r} and {f'peft_version {version}' if version else 'no peft_version'}: {words} {since}, so the adapter computes "
                "something slightly else here. Train it again, or trust it no further than you have measured.",
                stacklevel=2,
            )
    options: dict[str, Any] = {}
    for name, their in theirs.items():
        if their is not None and raw.get(their) is not None:
            aliases = layout.aliases.get(name, {})
            value = raw[their]
            options[name] = aliases[value] if isinstance(value, str) and value in aliases else value
    if layout.decode is not None:
        try:
            options |= layout.decode(options)
        except IngraftError as error:
            raise IngraftError(*(f"{where}: {text}" for text in error.problems)) from None
    if not shared:
        options |= layout.unshared
    if layout.tokens is not None and raw.get(layout.tokens):
        options["trainable_token_indices"] = raw[layout.tokens]
    whole = list(read_whole(model, raw, inside_of(layout)))
    options["modules_to_save"] = tuple(_followed(model, raw, layout, whole))
    if not layout.stacked and not layout.bare:
        options |= _read_sites(model, raw, layout, set(options["modules_to_save"]), where)
    config = _make(found, options, where)
    return config, layout


def _idle(model: nn.Module, name: str, value: object) -> bool:
    """Whether a field says nothing of this base: which biases are trained, where no parameter is one in their eyes ("bias" in its name)."""
    meant = name == "bias" and isinstance(value, str) and (value == "all" or value.endswith("_only"))
    return meant and not any("bias" in key for key in base_parameters(model))


def _followed(model: nn.Module, raw: Mapping[str, Any], layout: PeftLayout, paths: list[str]) -> list[str]:
    """These modules, and where the file says that ties are kept those that share a parameter with one of them."""
    if layout.ties is None or not raw.get(layout.ties):
        return paths
    modules = base_modules(model)
    own = {id(p) for path in paths for p in modules[path]._parameters.values() if p is not None}
    return [
        path
        for path, module in modules.items()
        if path in paths or any(id(p) in own for p in module._parameters.values() if p is not None)
    ]


def remedy(method: Method) -> str:
    """What can be done with an adapter that cannot be read."""
    if method.mergeable:
        return "Merge it into its base with the library that wrote it, and use the merged model."
    return "Use it with the library that wrote it, or train it again here."


def _filled(raw: Mapping[str, Any], *, ours: bool) -> dict[str, Any]:
    """The fields with what they leave out as the incumbent would have it; in a file of ours a null is one of our options."""
    incumbent = registry.incumbents().get(raw["peft_type"])
    usual = {} if incumbent is None else incumbent.defaults
    missing = {name for name in usual if raw.get(name) is None and not (ours and name in raw)}
    return {**raw, **{name: usual[name] for name in missing}}


def _option_names(method: Method) -> list[str]:
    return list(method.config.__dataclass_fields__)


def _ill_typed(raw: Mapping[str, Any], layout: PeftLayout, where: str) -> list[str]:
    """What is wrong with the fields that are interpreted here; the others are checked by the method's config."""
    found: list[str] = []
    for name in (*_NAMES, *(layout.fields.get(own) or own for own in layout.role_fields)):
        value = raw.get(name)
        names = value if isinstance(value, list | tuple) else [value]
        if value is not None and not all(isinstance(item, str) and item for item in names):
            found.append(f"{where}: {name} must be a name or a list of names, got {value!r}.")
        elif isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                found.append(f"{where}: {name} = {value!r} is no regular expression: {error}.")
    layers = raw.get("layers_to_transform")
    if layers is not None and not all(
        isinstance(n, int) for n in (layers if isinstance(layers, list | tuple) else [layers])
    ):
        found.append(f"{where}: layers_to_transform must be a number or a list of numbers, got {layers!r}.")
    return found + [
        f"{where}: {name} must be a text or null, got {raw[name]!r}."
        for name in ("task_type", "base_model_name_or_path")
        if not isinstance(raw.get(name), str | None)
    ]


def _respelt(methods: list[Method], kind: str, raw: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The config with the values that are nearly those of a method replaced by them, which is said."""
    for layout in (method.peft for method in methods if method.peft is not None and method.peft.peft_type == kind):
        for name, (pattern, value, words) in layout.nearly.items():
            if isinstance(given := raw.get(name), str) and re.fullmatch(pattern, given):
                warnings.warn(f"{where}: {name} = {given!r}: {words}", stacklevel=3)
                raw = {**raw, name: value}
    return raw


def _identify(methods: list[Method], kind: str, raw: Mapping[str, Any], where: str) -> tuple[Method, PeftLayout]:
    """The method whose PEFT type and constants a config has."""
    candidates = [
        (method, method.peft) for method in methods if method.peft is not None and method.peft.peft_type == kind
    ]
    if not candidates:
        known = sorted(
            {m.peft.peft_type for m in methods if m.peft is not None} | {own_type(m) for m in methods if m.peft is None}
        )
        if kind.startswith(OWN):
            raise IngraftError(
                f"{where}: was written with the method {kind.removeprefix(OWN).lower().replace('_', '-')!r}, which is not here. Install the package that "
                "brings it, or a newer Ingraft."
            )
        raise IngraftError(
            f"{where}: peft_type {kind!r} is none that this version of Ingraft has{nearest(kind, known)}. It has {', '.join(known)}."
        )
    fitting = [
        (method, layout)
        for method, layout in candidates
        if all(
            (raw.get(name) or False) in (value if isinstance(value, tuple) else (value,))
            for name, value in layout.constants.items()
        )
    ]
    if fitting:
        return max(fitting, key=lambda pair: len(pair[1].constants))  # a variant says more than what it varies
    names = sorted({name for _, layout in candidates for name in layout.constants})
    shown = ", ".join(f"{name} = {raw.get(name)!r}" for name in names)
    raise IngraftError(f"{where}: {kind} with {shown} is a method that this version of Ingraft does not have.")


def _unknown(raw: Mapping[str, Any], known: Collection[str], *, ours: bool, where: str) -> None:
    names = sorted(set(raw) - set(known))
    if names and ours:
        raise IngraftError(*(f"{where}: there is no field {name!r}{nearest(name, known)}." for name in names))
    if names:
        warnings.warn(f"{where}: unknown fields are ignored, as PEFT does: {', '.join(names)}.", stacklevel=2)


def _release(version: str) -> tuple[int, ...]:
    """The first two numbers of a version, to be compared; none of a text that is no version."""
    return tuple(int(part) for part in re.findall(r"\d+", version.partition("@")[0])[:2])


def _make(method: Method, options: Mapping[str, Any], where: str) -> MethodConfig:
    try:
        return registry.make_config(method.name, options)
    except IngraftError as error:
        raise IngraftError(
            *(
                f"{where}: {text.removeprefix('method_config.').removeprefix('method_config: ')}"
                for text in error.problems
            )
        ) from None


def _read_sites(
    model: nn.Module, raw: Mapping[str, Any], layout: PeftLayout, whole: set[str], where: str
) -> dict[str, Any]:
    """Our target fields for the modules that PEFT's rule finds."""
    modules = base_modules(model)
    targets, tensors = raw.get("target_modules"), raw.get("target_parameters")
    if tensors and not layout.experts:
        raise IngraftError(f"{where}: target_parameters = {tensors!r} is not supported by {layout.peft_type}.")
    if tensors and not targets:
        return {"target_modules": (), "target_parameters": tensors}
    if targets is None:
        raise IngraftError(f"{where}: target_modules is missing.")
    paths = [path for path in modules if path and not within(path, whole) and peft_matches(raw, path)]
    paths = _followed(model, raw, layout, paths)
    if not paths:
        raise IngraftError(
            f"{where}: target_modules = {targets!r} matches no module of {original_class(model).__name__}. The adapter is for another base."
        )
    unmatched = (
        [] if isinstance(targets, str) else [n for n in targets if not any(matches(n, path) for path in modules)]
    )
    for name in sorted(unmatched):
        hint = nearest(name, {path.rpartition(".")[2] for path in modules})
        warnings.warn(f"{where}: target_modules: {name!r} matches no module{hint}.", stacklevel=2)
    found: dict[str, Any] = {"target_parameters": tensors} if tensors else {}
    names: list[str] = []
    for field in layout.role_fields:
        listed = raw.get(layout.fields.get(field) or field) or ()
        special = [
            p
            for p in paths
            if (re.fullmatch(listed, p) if isinstance(listed, str) else any(p.endswith(name) for name in listed))
        ]
        for name in () if isinstance(listed, str) else listed:
            if not any(path.endswith(name) for path in special):
                warnings.warn(f"{where}: {field}: {name!r} matches none of the adapted modules.", stacklevel=2)
        chosen = names_for(special, modules)
        found[field] = chosen
        names += chosen
        paths = [path for path in paths if path not in special]
    found["target_modules"] = sorted({*names, *names_for(paths, modules)})
    return found


def peft_matches(raw: Mapping[str, Any], path: str) -> bool:
    """PEFT's rule for whether a config's targets include a module."""

    def named(patterns: str | Collection[str]) -> bool:
        if isinstance(patterns, str):
            return re.fullmatch(patterns, path) is not None
        return any(matches(pattern, path) for pattern in patterns)

    targets, excluded, layers = raw["target_modules"], raw.get("exclude_modules"), raw.get("layers_to_transform")
    if (excluded and named(excluded)) or not named(targets):
        return False
    if isinstance(targets, str) or path in targets or layers is None or layers == []:
        return True
    patterns = raw.get("layers_pattern") or ()
    patterns = [patterns] if isinstance(patterns, str) else patterns
    rules = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    hit = next((match for rule in rules if (match := re.match(rule, path))), None)
    return hit is not None and int(hit[1]) in ([layers] if isinstance(layers, int) else layers)
