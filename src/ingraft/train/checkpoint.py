"""Resumable checkpoints: `checkpoint-N` is complete or absent, and the newest is found by looking, never by a stored pointer.

A checkpoint holds everything that is not a function of (recipe, data, step): adapter tensors, moments, best tensors, counters. Order of
data, dropout and learning rate are such functions, so there is no generator to save. It also says which run it belongs to, by everything
that decides the run's numbers; another run's checkpoint is not resumed, and the message names what differs.
"""

from __future__ import annotations

import hashlib
import logging
import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from ingraft import durable
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.recipe import Recipe, plain, recipe_fields
from ingraft.train.learner import Learner

log = logging.getLogger(__name__)

NAME = re.compile(r"checkpoint-(\d{1,12})")
"""What a checkpoint folder is called."""

_FREE = {
    *("output_dir", "logging_steps", "save_steps", "save_total_limit", "per_device_eval_batch_size", "data.train"),
    *("auto_find_batch_size", "gradient_checkpointing"),
}
"""Recipe keys that may change between a run and its continuation. The data is known by its content, not by its path."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint that verifies and belongs to this run."""

    step: int
    path: Path
    state: dict[str, Any]


class Kept(Protocol):
    """What has a state that a checkpoint holds: a learner, or the answers that a run is learning from."""

    @property
    def name(self) -> str: ...

    def tensors(self) -> Mapping[str, Mapping[str, Tensor]]:
        """Its state as tensors, by file; their names begin with its own."""
        ...

    def numbers(self) -> Mapping[str, Any]:
        """The rest of its state."""
        ...

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]], numbers: Mapping[str, Any]) -> None:
        """Take the state back that the two gave."""
        ...


def identity(
    recipe: Recipe, train: Sequence[Example], evaluation: Sequence[Example], beside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Everything that decides a run's numbers, by name: recipe keys and the digests of the encoded rows.

    Args:
        beside: what lies behind names in the recipe (the base's fingerprint, adapters' contents).
    """
    values: dict[str, Any] = {}
    for key, _, _ in recipe_fields():
        if key not in _FREE:
            value: Any = recipe
            for part in key.split("."):
                value = getattr(value, part)
            values[key] = plain(value)
    options = cast(dict[str, Any], values.pop("method_config"))
    values |= {f"method_config.{key}": value for key, value in options.items()}
    return values | {"training rows": digest(train), "evaluation rows": digest(evaluation), **(beside or {})}


def content(path: Path) -> str:
    """A sha256 of the tensor files of a folder, or of a file."""
    found = hashlib.sha256()
    for file in sorted(path.glob("*.safetensors")) if path.is_dir() else [path]:
        found.update(file.read_bytes())
    return found.hexdigest()


def digest(examples: Sequence[Example]) -> str:
    """A sha256 of encoded rows, their order included."""
    found = hashlib.sha256()
    for example in (sequence for row in examples for sequence in row.sequences):
        for part in (
            example.input_ids,
            example.labels or example.target or [],
            [example.row_id, -1 if example.label is None else example.label],
        ):
            found.update(len(part).to_bytes(8, "little"))
            found.update(array("q", part).tobytes())
        found.update((example.lazy.content if example.lazy is not None else "").encode())
        found.update(array("d", [*(example.values or ()), *(example.span or ())]).tobytes())  # nothing, for most tasks
    return found.hexdigest()


def save(
    run: Path,
    step: int,
    learners: Sequence[Kept],
    state: Mapping[str, Any],
    who: Mapping[str, Any],
    keep: int | None,
) -> Path:
    """Write `checkpoint-<step>`, read it back, and only then remove the oldest ones beyond `keep`.

    Raises:
        IngraftError: the disk refused; former checkpoints are all still there.
    """
    path = run / f"checkpoint-{step}"
    facts = {
        "kind": "checkpoint",
        "step": step,
        "identity": plain(dict(who)),
        "state": plain(dict(state)),
        "learners": {learner.name: plain(dict(learner.numbers())) for learner in learners},
    }
    files: dict[str, dict[str, Tensor]] = {}
    for learner in learners:
        for file, tensors in learner.tensors().items():
            files.setdefault(file, {}).update({name: tensor.contiguous().cpu() for name, tensor in tensors.items()})
    broken = [
        n for group in files.values() for n, t in group.items() if t.is_floating_point() and not t.isfinite().all()
    ]
    if broken:
        raise IngraftError(f"{path}: not written, because {broken[0]} is not finite; lower the learning rate.")
    with durable.folder(path, overwrite=True, facts=facts) as tmp:
        for file, tensors in files.items():
            durable.write_file(tmp / f"{file}.safetensors", tensors_as_bytes(tensors))
    durable.verify(path)
    if keep is not None:
        for _, old in [found for found in listed(run) if found[0] <= step][:-keep]:
            durable.remove(old)
    return path


def listed(run: Path) -> list[tuple[int, Path]]:
    """The checkpoint folders of a run by step, whether they are whole or not."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))]
    return sorted(found)


def find(run: Path, which: str, who: Mapping[str, Any]) -> Found | None:
    """The checkpoint to go on from.

    Args:
        run: the run folder.
        which: "last" for the newest that is whole and of this run, or a checkpoint folder.
        who: the identity of the run that wants to go on.

    Returns:
        None if `which` is "last" and there is no checkpoint at all: the run was stopped before its first.

    Raises:
        IngraftError: none fits; says of each why.
    """
    if which != "last":
        facts = durable.verify(which)["facts"]
        if problem := _unfit(facts, who):
            raise IngraftError(f"{which}: it {problem}")
        return Found(step=facts["step"], path=Path(which), state=facts["state"])
    problems: list[str] = []
    for item in run.glob(".checkpoint-*"):  # what a process that died in the middle of a save left behind
        durable.recover(item.with_name(item.name.lstrip(".").split(".")[0]))
    for step, path in reversed(listed(run)):
        try:
            facts = durable.verify(path)["facts"]
        except IngraftError as error:
            problems.append(f"{path.name} is passed over: {' '.join(error.problems)}")
            continue
        if problem := _unfit(facts, who):
            problems.append(f"{path.name} is passed over: it {problem}")
            continue
        for text in problems:
            log.warning("%s", text)
        return Found(step=step, path=path, state=facts["state"])
    if problems:
        raise IngraftError(f"{run}: holds no checkpoint that this run can go on from.", *problems)
    return None


def restore(found: Found, learners: Sequence[Kept]) -> None:
    """Put a checkpoint's tensors and counters into the learners.

    Raises:
        IngraftError: it holds other tensors than the learners have.
    """
    numbers = durable.read_manifest(found.path)["facts"]["learners"]
    try:
        tensors = {
            path.stem: load_tensors(durable.read_bytes(path)) for path in sorted(found.path.glob("*.safetensors"))
        }
        for learner in learners:
            learner.restore(tensors, numbers[learner.name])
    except (KeyError, RuntimeError, SafetensorError) as error:
        raise IngraftError(f"{found.path}: does not hold this run's tensors: {error}.") from error


def forecast(learners: Sequence[Learner], keep: int | None, saves: int) -> int:
    """About how many bytes the run will write: tensors, two moments and a best copy a checkpoint, and the result."""
    one = sum(p.numel() * p.element_size() for learner in learners for p in learner.parameters.values())
    one += sum(t.numel() * t.element_size() for learner in learners for t in learner.state.values())
    kept = saves if keep is None else min(saves, keep + 1)
    return 4 * one * kept + 2 * one + (1 << 20)


def _unfit(facts: Mapping[str, Any], who: Mapping[str, Any]) -> str | None:
    if facts.get("kind") != "checkpoint":
        return "is not a checkpoint."
    theirs, ours = cast(dict[str, Any], facts["identity"]), plain(dict(who))
    differing = [key for key in {**theirs, **ours} if theirs.get(key) != ours.get(key)]
    if not differing:
        return None
    described = ", ".join(f"{key} (was {_short(theirs.get(key))}, is {_short(ours.get(key))})" for key in differing)
    return f"belongs to another run; it differs in {described}."


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:18] + "..." + text[-6:]
