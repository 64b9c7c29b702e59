"""YAML as recipes are written in it, by the safe loader with two mends: `2e-4` is a number (YAML 1.1 wants `2.0e-4`), and a key given twice is an
error. yaml is imported by the functions that need it, so that `ingraft --help` does without.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

from ingraft.errors import IngraftError


def plain(value: Any) -> Any:
    """`value` in the types that YAML and JSON share: tuples and sets become lists, dataclasses mappings, mapping keys strings."""
    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in cast(Mapping[Any, Any], value).items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in cast(list[Any], value)]
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in cast(set[Any], value))
    return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, by the safe loader.

    Raises:
        IngraftError: no such file, not text, not YAML, not a mapping, or a key given twice.
    """
    import yaml

    loader, _ = _yaml_classes()
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=loader)  # noqa: S506 - a SafeLoader
    except OSError as error:
        raise IngraftError(f"{path}: cannot read the recipe: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        raise IngraftError(f"{path}: the recipe is not UTF-8 text; a recipe is a YAML file.") from error
    except yaml.YAMLError as error:
        raise IngraftError(f"{path}: the recipe is not valid YAML: {' '.join(str(error).split())}.") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise IngraftError(
            f"{path}: a recipe is a mapping of keys such as `model: smollm2`, this file holds a {type(values).__name__}."
        )
    return cast(dict[str, Any], values)


def scalar(text: str) -> Any:
    """What a word on the command line means where its type is open: number, boolean, null, list, or the word itself."""
    import yaml

    loader, _ = _yaml_classes()
    try:
        return yaml.load(text, Loader=loader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError:
        return text


def dump(values: Mapping[str, Any]) -> str:
    """The mapping as YAML, keys in their order; `read_yaml` reads it back."""
    import yaml

    _, dumper = _yaml_classes()
    return yaml.dump(
        plain(values), Dumper=dumper, sort_keys=False, allow_unicode=True, default_flow_style=None, width=120
    )


@cache
def _yaml_classes() -> tuple[type[Any], type[Any]]:
    """The loader and the dumper."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for name, _ in node.value:
                if name.value in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"the key {name.value!r} is given twice", name.start_mark
                    )
                seen.add(str(name.value))
            return super().construct_mapping(node, deep)

    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    number = re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$")
    for cls in (Loader, Dumper):
        cls.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return Loader, Dumper
