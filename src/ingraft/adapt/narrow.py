"""What narrows a choice of modules: blocks by their index, and what is trained in full instead. An option that leaves nothing is named.

The first number among a path's components is the index of its block, and what stands before it names the stack. A model may have several
stacks (an encoder's and a decoder's); an index holds in each that has it, and counts from the end of each where it is negative.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence

from ingraft.methods.contract import MethodConfig


def matches(pattern: str, path: str) -> bool:
    """Whether a listed name means this module: exactly, or as a dotted suffix."""
    return path == pattern or path.endswith("." + pattern)


def kept(sites: dict[str, str], wanted: Collection[str], option: str, emptied: list[str]) -> dict[str, str]:
    """The sites among those that an option leaves; one that leaves none is noted."""
    left = {path: role for path, role in sites.items() if path in wanted}
    if sites and not left:
        emptied.append(
            f"{option} takes out all that were chosen ({', '.join(list(sites)[:2])}{', ...' * (len(sites) > 2)})"
        )
    return left


def named_twice(config: MethodConfig, sites: Iterable[str], whole: set[str], general: Collection[str]) -> list[str]:
    """Modules that target_modules and modules_to_save both name: one of the two would do nothing there.

    A default, "all-linear", a role, or a name that means more modules than a container in modules_to_save holds, steps back without a word: that
    is how a head, trained in full, is left out of a wider choice.

    Args:
        general: what may stand in target_modules beside names.
    """
    wanted = config.target_modules
    if wanted is None or wanted in general:
        return []
    if isinstance(wanted, str):
        try:
            pattern = re.compile(wanted)
        except re.error:  # which is reported where it is looked up
            return []
        hits = [[path for path in sites if pattern.fullmatch(path)]]
    else:
        names = [name for name in wanted if name not in general]
        hits = [[path for path in sites if matches(name, path)] for name in names]
    twice: dict[str, None] = {}
    for meant in hits:
        all_of_it = whole.issuperset(meant)
        for path in meant:
            if path in whole and (all_of_it or any(matches(name, path) for name in config.modules_to_save)):
                twice[path] = None
    if not twice:
        return []
    shown = f"{', '.join(list(twice)[:4])}{f' and {len(twice) - 4} more' if len(twice) > 4 else ''}"
    return [
        f"{shown}: named in target_modules and in modules_to_save, which trains the whole module and leaves nothing to adapt. Leave it out of one of "
        "them, or name it in exclude_modules."
    ]


def block_index(path: str) -> tuple[str, int] | None:
    """The stack of a module's block and its index there; None for a module in no block."""
    parts = path.split(".")
    return next(((".".join(parts[:n]), int(part)) for n, part in enumerate(parts) if part.isdigit()), None)


def stacks(paths: Iterable[str]) -> dict[str, int]:
    """The number of blocks in every stack."""
    found: dict[str, int] = {}
    for path in paths:
        if (at := block_index(path)) is not None:
            found[at[0]] = max(found.get(at[0], 0), at[1] + 1)
    return found


def of_layers(paths: Sequence[str], modules: Iterable[str], layers: Sequence[int], unmatched: list[str]) -> list[str]:
    """Those of some modules that lie in blocks of these indices, or in none at all; each index that means no block is noted."""
    sizes = stacks(modules)
    places = {path: block_index(path) for path in paths}
    own = {at[0]: sizes[at[0]] for at in places.values() if at is not None}
    there = "; ".join(
        f"of {stack or 'the model'}; they go from 0 to {n - 1} (or -{n} to -1, from the end)"
        for stack, n in own.items()
    )
    unmatched += [
        f"layers_to_transform: {index} is the index of no block"
        + (f" {there}." if there else ": none of the modules lies in one.")
        for index in layers
        if paths and not any(-n <= index < n for n in own.values())
    ]
    return [path for path, at in places.items() if at is None or at[1] in layers or at[1] - sizes[at[0]] in layers]


def blocks_of(paths: Iterable[str]) -> str:
    """The indices of the blocks in which some modules lie, for a message."""
    found = (block_index(path) for path in paths)
    return ", ".join(str(index) for index in sorted({at[1] for at in found if at is not None})) or "none"
