"""The catalogue as data: a frozen record for each method, importable without torch.

The package's own records stand in `catalogue.toml`, a table for each method. A record names the file that holds the method
(`module:attribute`); the file is imported when the method is used. A package of the user's adds methods through the entry point group `ingraft.methods`: each entry point is named like the method and points at a `MethodRecord`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.resources
import logging
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from ingraft.methods.contract import Method, MethodConfig


log = logging.getLogger(__name__)

_HERE = "ingraft.methods"

GROUP = "ingraft.methods"
"""Entry points under which a package offers methods."""


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One line of the catalogue.

    Attributes:
        name: as in recipes and on the command line.
        target: "module:attribute" of the `Method`.
        config: name of the config class in that module, which is also its public name.
        family: weight, selective, bottleneck, prefix or prompt.
        summary: what it trains, in a line.
        equation: in plain text.
        paper: authors, year, identifier.
        mergeable: whether it can be written into the base's weights.
        learning_rate: peak rate with AdamW that a recipe gets which names none: tried on real data, not searched; see docs/study-methods-smollm2.md.
    """

    name: str
    target: str
    config: str
    family: str
    summary: str
    equation: str
    paper: str
    mergeable: bool
    learning_rate: float


@dataclass(frozen=True, kw_only=True)
class Incumbent:
    """A config class of Hugging Face PEFT's for a method that is here too.

    Attributes:
        name: of the class.
        fields: in order, those that every config has left out.
        defaults: of the fields where it is not null.
    """

    name: str
    fields: tuple[str, ...]
    defaults: Mapping[str, Any]


@functools.cache
def incumbents() -> Mapping[str, Incumbent]:
    """By peft_type, from `peft_configs.toml`. What a file or a script leaves out means these defaults, not ours."""
    text = importlib.resources.files(_HERE).joinpath("peft_configs.toml").read_text(encoding="utf-8")
    return {
        kind: Incumbent(name=own["class"], fields=tuple(own["fields"]), defaults=own["defaults"])
        for kind, own in tomllib.loads(text).items()
    }


WHOLE = "full"
"""The method that `modules_to_save` stands for."""

TOKENS = "trainable-tokens"
"""The method that `trainable_token_indices` stands for."""

LOW_RANK = "lora"
"""The method that a change of low rank becomes when adapters are combined or converted."""


@functools.cache
def _own() -> Mapping[str, MethodRecord]:
    """The package's own methods, from `catalogue.toml`."""
    text = importlib.resources.files(_HERE).joinpath("catalogue.toml").read_text(encoding="utf-8")
    return {
        name: MethodRecord(name=name, target=f"{_HERE}.{fields.pop('file')}:METHOD", **fields)
        for name, fields in tomllib.loads(text).items()
    }


@functools.cache
def records() -> Mapping[str, MethodRecord]:
    """Every method known here, by name: the package's own, then those of installed packages. A package whose entry point cannot be used is named in
    the log and left out; the others are not the worse for it."""
    found = dict(_own())
    _left_out.clear()
    for entry in importlib.metadata.entry_points(group=GROUP):
        try:
            record = entry.load()
        except Exception as error:  # whatever a package of somebody else's does
            _leave_out(entry.name, entry, f"cannot be imported: {type(error).__name__}: {error}")
            continue
        if not isinstance(record, MethodRecord):
            _leave_out(entry.name, entry, f"is no MethodRecord but {type(record).__name__}")
        elif found.setdefault(record.name, record) is not record:
            _leave_out(record.name, entry, "is a method that is here already")
        else:
            _origins[record.name] = entry
    return found


_left_out: dict[str, str] = {}
"""Why a method of an installed package is not here, by name."""
_origins: dict[str, importlib.metadata.EntryPoint] = {}
"""Where the methods of installed packages come from."""


def _leave_out(name: str, entry: importlib.metadata.EntryPoint, reason: str) -> str:
    """Note and log why a method is not here; the sentence."""
    package = "a package" if entry.dist is None else f"the package {entry.dist.name}"
    text = (
        f"The method {name!r} of {package} (entry point {entry.name} = {entry.value}, group {entry.group}) is left out: it {reason}. "
        "Mend or uninstall the package."
    )
    if _left_out.get(name) != text:
        log.warning(text)
    _left_out[name] = text
    return text


def why_not(name: str) -> str | None:
    """Why an installed package's method of this name is not here; None of any other name."""
    records()
    return _left_out.get(name)


def record(name: str) -> MethodRecord:
    """The record of a method.

    Raises:
        IngraftError: with the nearest names, if there is none, or with why an installed package's is not here.
    """
    known = records()
    if name not in known:
        if (reason := why_not(name)) is not None:
            raise IngraftError(reason)
        raise IngraftError(f"There is no method named {name!r}{nearest(name, known)}. Known: {', '.join(known)}.")
    return known[name]


@functools.cache
def load(name: str) -> Method:
    """Import a method's file (which needs torch) and return its record of facts.

    Raises:
        IngraftError: there is no such method, or the file of an installed package cannot be imported.
    """
    module, _, attribute = record(name).target.partition(":")
    if name not in _origins or name in _own():
        return getattr(importlib.import_module(module), attribute)
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        reason = f"cannot be imported from {module}: {type(error).__name__}: {error}"
        raise IngraftError(_leave_out(name, _origins[name], reason)) from error


def methods() -> Iterator[Method]:
    """Every method that can be imported."""
    for name in records():
        try:
            yield load(name)
        except IngraftError:
            if name not in _left_out:
                raise


@functools.cache
def _reader(config: type[MethodConfig]) -> TypeAdapter[MethodConfig]:
    """What makes a config of plain data; making it takes pydantic two milliseconds."""
    from pydantic import TypeAdapter

    return TypeAdapter(config)


def make_config(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """A method's config from plain data, every wrong key and value reported at once.

    Raises:
        IngraftError: one problem for each unknown key (with the nearest), each value of a wrong type and each impossible value.
    """
    from pydantic import ValidationError

    from ingraft.methods.config import truths

    config = load(name).config
    known = [f.name for f in fields(config)]
    problems = [
        f"method_config: {name} has no option {key!r}{nearest(key, known)}." for key in options if key not in known
    ]
    wrong = truths(config, options)
    problems += [f"method_config.{name}: {text.removeprefix(name).strip()}" for name, text in wrong.items()]
    plain = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in options.items()
        if key in known and key not in wrong
    }
    try:
        made = _reader(config).validate_python(plain)
    except ValidationError as error:
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"][:1])
            text = f"method_config.{where}: {item['msg']}, got {item['input']!r}." if where else str(item["msg"])
            if text not in problems:
                problems.append(text)
        raise IngraftError(*problems) from None
    except IngraftError as error:
        raise IngraftError(*problems, *(f"method_config: {text}" for text in error.problems)) from None
    if problems:
        raise IngraftError(*problems)
    return made
