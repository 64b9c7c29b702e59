"""Files that a recipe names: one, or several with what belongs to each. Read by hand, because "a text, or a list of texts and mappings" makes
sentences of pydantic's that nobody can use.

Written `reviews.jsonl`, `[a.jsonl, b.jsonl]`, `[a.jsonl=3, b.jsonl=1]` (weights) or `[{file: a.jsonl, weight: 3, format: instruction}, ...]`; on the command
line each entry is an option of its own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any, cast

from ingraft.errors import nearest
from ingraft.recipe.fields import Source

KEYS = ("data.train", "data.eval", "data.test")
"""The keys that name files."""

_WEIGHTED = re.compile(r"(?P<file>.+)=(?P<weight>\d+(\.\d*)?|\.\d+)")
_KNOWN = [item.name for item in fields(Source)]


def settled(values: dict[str, Any]) -> dict[str, str]:
    """Bring the files in `values` into one form, in place: a text for one file, a list of mappings for several.

    Returns:
        Sentences by dotted key; a key with one is taken out of `values`.
    """
    problems: dict[str, str] = {}
    data = values.get("data")
    if not isinstance(data, dict):
        return problems
    inside = cast("dict[str, Any]", data)
    for key in KEYS:
        name = key.split(".")[1]
        if not isinstance(inside.get(name), list | Mapping):
            continue
        value = inside.pop(name)
        entries = cast("list[Any]", value if isinstance(value, list) else [value])
        made = [_entry(entry, several=len(entries) > 1) for entry in entries]
        wrong = [f"entry {n} {one}" for n, one in enumerate(made, 1) if isinstance(one, str)]
        if wrong or not made:
            problems[key] = f"{key}: {'; '.join(wrong) or 'is an empty list; name a file'}."
            continue
        found = [one for one in made if isinstance(one, Source)]
        plainly = len(found) == 1 and found[0].format is None and found[0].weight is None
        inside[name] = found[0].file if plainly else [asdict(one) for one in found]
    return problems


def _entry(entry: Any, *, several: bool) -> Source | str:
    """One entry, or what is wrong with it."""
    if isinstance(entry, str):
        match = _WEIGHTED.fullmatch(entry) if several else None
        if match is None:
            return Source(file=entry) if entry.strip() else "names no file"
        entry = {"file": match["file"], "weight": float(match["weight"])}
    if not isinstance(entry, Mapping):
        return f"should be a file, or a mapping with the key `file`, got {entry!r}"
    found = {str(key): value for key, value in cast("Mapping[Any, Any]", entry).items()}
    for key in found:
        if key not in _KNOWN:
            return (
                f"has the key {key!r}, which there is not{nearest(key, _KNOWN, count=1)}; known are {', '.join(_KNOWN)}"
            )
    file, weight, form = (found.get(name) for name in _KNOWN)
    if not isinstance(file, str) or not file.strip():
        return f"names no file: {found}"
    if form is not None and not isinstance(form, str):
        return f"({file}): format should be a text, got {form!r}"
    number = isinstance(weight, int | float) and not isinstance(weight, bool)
    if weight is not None and not (number and 0 < weight < float("inf")):
        return f"({file}): weight should be a number greater than 0, got {weight!r}"
    return Source(file=file, weight=None if weight is None else float(weight), format=form)
