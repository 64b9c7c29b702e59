"""From nested mappings to a `Recipe`: names and types, every problem at once."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, cast

from ingraft.errors import nearest
from ingraft.recipe.fields import GROUPS, Recipe, recipe_fields
from ingraft.recipe.several import settled
from ingraft.recipe.yaml import plain

if TYPE_CHECKING:
    from pydantic import TypeAdapter

KEYBOARD_ONLY = {
    "trust_remote_code": "a file may not decide whose code runs here",
    "overwrite_output_dir": "a file may not delete a folder",
    "allow_base_mismatch": "it is a person's to accept",
    "resume_from_checkpoint": "it describes one start of a run, not the run",
}


def merge_values(values: dict[str, Any], overrides: Mapping[str, Any]) -> None:
    """Lay `overrides` (dotted keys, or mappings inside mappings) over `values` in place."""
    if isinstance(values.get("data"), str | list):  # `data: rows.jsonl`, as `--data rows.jsonl`
        values["data"] = {"train": values["data"]}
    if "method" in overrides and overrides["method"] != values.get("method", overrides["method"]):
        values.pop("method_config", None)
    for key, value in overrides.items():
        if key == "data" and isinstance(value, str | list):
            key = "data.train"
        _put(values, key, value)


def _put(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, making the mappings on the way and replacing what is in the way."""
    *parents, last = key.split(".")
    for name in parents:
        inner = values.get(name)
        values[name] = inner = dict(cast(dict[str, Any], inner)) if isinstance(inner, dict) else {}
        values = cast(dict[str, Any], inner)
    if isinstance(value, Mapping) and isinstance(values.get(last), dict):
        for name, item in cast(Mapping[str, Any], value).items():
            _put(cast(dict[str, Any], values[last]), str(name), item)
    else:
        values[last] = value


@cache
def _adapter() -> TypeAdapter[Recipe]:
    """pydantic's validator of these dataclasses. They stay plain dataclasses for whoever holds one; only reading is pydantic's."""
    from pydantic import ConfigDict, TypeAdapter, with_config

    config = ConfigDict(extra="forbid", allow_inf_nan=False)
    for group in GROUPS.values():
        with_config(config)(group)
    return TypeAdapter(with_config(config)(Recipe))


def parse(values: dict[str, Any]) -> tuple[Recipe, list[str], set[str]]:
    """Types and names. Returns what could be understood (defaults elsewhere), the problems and the dotted keys they concern."""
    from pydantic import ValidationError

    known = [key for key, _, _ in recipe_fields()] + list(GROUPS)
    known_set = set(known)
    remaining = plain(values)
    problems = settled(remaining)
    for key in set(problems) & {"data.train"}:
        _put(remaining, key, "")
    for key, kind, _ in recipe_fields():  # Python counts true as 1, and pydantic with it
        *parents, last = key.split(".")
        inside: Any = remaining
        for name in parents:
            inside = inside.get(name) if isinstance(inside, dict) else None
        if isinstance(inside, dict) and isinstance(inside.get(last), bool) and _is_number(kind):
            problems[key] = f"{key}: should be a number, got {inside.pop(last)!r}."
    # A round removes each key found wrong and reads again, so that the rest is still checked; required keys get a placeholder.
    for _ in range(3):
        try:
            return _adapter().validate_python(remaining), list(problems.values()), set(problems)
        except ValidationError as error:
            found = error.errors(include_url=False)
        for item in found:
            path = [str(part) for part in item["loc"]]
            key = next(
                (joined for n in range(len(path), 0, -1) if (joined := ".".join(path[:n])) in known_set),
                ".".join(path[:2]),
            )
            if item["type"] == "unexpected_keyword_argument":
                key = ".".join(path)
            problems.setdefault(key, _sentence(key, item, known))
            _drop(remaining, key)
            if key == "data":
                _put(remaining, "data", {"train": ""})
                if item["type"] == "missing":
                    problems["data.train"] = problems.pop("data").replace("data:", "data.train:", 1)
            elif key in ("model", "data.train"):
                _put(remaining, key, "")
    raise AssertionError(f"recipe did not settle: {problems}")


def _is_number(kind: Any) -> bool:
    """Whether a field's type has numbers and no true or false."""
    from ingraft.methods.config import leaves

    found = set(leaves(kind))
    return bool(found & {int, float}) and bool not in found


def _drop(values: dict[str, Any], key: str) -> None:
    *parents, last = key.split(".")
    for name in parents:
        values = cast(dict[str, Any], values.get(name, {}))
    values.pop(last, None)


def _sentence(key: str, item: Mapping[str, Any], known: list[str]) -> str:
    """One pydantic finding as a sentence for the user."""
    kind, got = item["type"], item["input"]
    if kind == "unexpected_keyword_argument":
        last = key.rsplit(".", 1)[-1]
        if last in KEYBOARD_ONLY:
            return f"{key}: only the command line may say this (--{last.replace('_', '-')}): {KEYBOARD_ONLY[last]}."
        elsewhere = [name for name in known if name.rsplit(".", 1)[-1] == last]
        hint = f" (did you mean {elsewhere[0]!r}?)" if elsewhere else nearest(key, known, count=1 if "." in key else 2)
        return f"{key}: there is no such key{hint}."
    if kind in ("missing", "missing_keyword_only_argument"):
        flag = "data" if key in ("data", "data.train") else key.replace("_", "-")
        return f"{key}: is needed and was not given; add it to the recipe or pass --{flag}."
    if kind == "literal_error":
        allowed = re.findall(r"'([^']+)'", str(item["ctx"]["expected"]))
        return f"{key}: {got!r} is none of {', '.join(allowed)}{nearest(str(got), allowed)}."
    message = str(item["msg"]).removeprefix("Input ").replace("valid ", "").replace(" a integer", " an integer")
    message = message.split(", unable to")[0]
    return f"{key}: {message[0].lower()}{message[1:]}, got {got!r}."
