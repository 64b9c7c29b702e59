"""Where a run reads and writes, looked at before anything is loaded: what is missing, what may be written, what may be taken away.

A folder is emptied only of what runs write, and only where a run left its traces (a log, a checkpoint, a manifest, or the very recipe of
this run). Anything else in it belongs to somebody, so the folder is refused rather than emptied round it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from ingraft import durable
from ingraft.adapt.files.folders import CONFIG, MEMBERS, WEIGHTS
from ingraft.bases import check_base
from ingraft.data import check_source
from ingraft.errors import IngraftError
from ingraft.evaluate.judges import REWARD
from ingraft.evaluate.measures import require
from ingraft.evaluate.rewards import check_rewards
from ingraft.evaluate.roles import REFERENCE
from ingraft.evaluate.scorer import SCORERS, scorer_of
from ingraft.recipe import Recipe, to_yaml
from ingraft.train import checkpoint
from ingraft.train.journal import entries
from ingraft.train.learner import check_optimiser
from ingraft.train.lock import NAME as LOCK

RECIPE, LOG, METRICS, REPORT, PROFILE = "recipe.yaml", "log.jsonl", "metrics.json", "report.html", "profile.json"
_TRACES = {LOG, durable.MANIFEST}
_OWN = {RECIPE, LOG, METRICS, REPORT, PROFILE, CONFIG, WEIGHTS, MEMBERS, REFERENCE, REWARD, durable.MANIFEST, LOCK}


def check(recipe: Recipe, resume: str | None, *, overwrite: bool) -> None:
    """Refuse, all in one message, a base, data or an output folder that cannot be, before anything is loaded."""
    folder = partial(_check_folder, Path(recipe.output_dir), to_yaml(recipe), resume, overwrite)
    if problems := [
        *absent(recipe),
        *_problems([partial(check_optimiser, recipe), partial(check_rewards, recipe), folder]),
    ]:
        raise IngraftError(*problems)


def absent(recipe: Recipe) -> list[str]:
    """What is wrong with the base, the data and the adapters that a recipe names, each a sentence; a recipe may name none, and be refused for that."""
    sources = [path for path in recipe.data.files if path.strip()]
    return _problems(
        [
            *([partial(check_base, recipe.model, recipe.quantization, recipe.task)] if recipe.model.strip() else []),
            *([partial(require, recipe.task, scorer_of(recipe.task).needs)] if recipe.task in SCORERS else []),
            *(partial(check_source, path) for path in sources),
            *(partial(_check_adapter, f"adapters.{name}", path) for name, path in recipe.adapters.items()),
            *(
                partial(_check_adapter, key, path)
                for key, path in (
                    ("init_adapter", recipe.init_adapter),
                    ("reference_adapter", recipe.reference_adapter),
                    ("reward_adapter", recipe.reward_adapter),
                )
                if path
            ),
        ]
    )


def _problems(checks: list[Callable[[], None]]) -> list[str]:
    problems: list[str] = []
    for check in checks:
        try:
            check()
        except IngraftError as error:
            problems += error.problems
    return problems


def _check_adapter(key: str, folder: str) -> None:
    """Refuse what holds no adapter, before anything is loaded."""
    if not Path(folder).exists():
        raise IngraftError(f"{key}: there is no {folder}.")
    if Path(folder).is_dir() and not any(Path(folder).glob("*.safetensors")):
        raise IngraftError(f"{key}: {folder} holds no adapter.")


def _check_folder(folder: Path, recipe: str, resume: str | None, overwrite: bool) -> None:
    """Refuse a folder that must not be written, or not be emptied, before anything is loaded.

    Args:
        recipe: the text of this run's, which a run that was stopped early has left.
        resume: as in `train`.

    Raises:
        IngraftError: saying what is in the way, and what to do.
    """
    if folder.is_file() or (folder.exists() and not folder.is_dir()):
        raise IngraftError(f"output_dir: {folder} is a file.")
    if (folder / durable.MANIFEST).exists() and resume is not None:
        raise IngraftError(f"output_dir: the run in {folder} is complete; there is nothing to go on with.")
    inside = [path.name for path in folder.iterdir() if path.name != LOCK] if folder.is_dir() else []
    begun = checkpoint.listed(folder) if folder.is_dir() else []
    if not inside or (resume is not None and begun):
        return
    if not overwrite and resume is None:
        more = "; go on with it by --resume-from-checkpoint last" if begun and durable.MANIFEST not in inside else ""
        raise IngraftError(
            f"output_dir: {folder} exists and is not empty. Choose another, or replace it with --overwrite-output-dir{more}."
        )
    foreign = sorted(name for name in inside if not _own(name))
    if foreign:
        shown = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise IngraftError(
            f"output_dir: {folder} is not a run folder, or not only that (it holds {shown}); it will not be deleted. Choose another, or move "
            "what is yours."
        )
    if not begun and not _TRACES.intersection(inside) and _text(folder / RECIPE) not in (None, recipe):
        raise IngraftError(
            f"output_dir: {folder} is not a run folder: its {RECIPE} is of no run that was begun there; it will not be deleted. Choose another."
        )


def empty(folder: Path) -> None:
    """Take away what runs have written, except the lock."""
    for item in folder.iterdir():
        if item.name != LOCK and _own(item.name):
            durable.remove(item)


def undo(folder: Path) -> None:
    """Take away what a run has written that ends before its first step. To be called by who holds the folder's lock: it may be another's run."""
    begun = any(line.get("step", 0) > 0 for line in entries(folder / LOG))
    if not begun and not checkpoint.listed(folder) and not (folder / durable.MANIFEST).exists():
        empty(folder)


def _own(name: str) -> bool:
    """Whether a run writes things of this name; temporary ones begin with a dot and what they become."""
    return name in _OWN or checkpoint.NAME.fullmatch(name) is not None or name.startswith((".checkpoint-", ".ingraft."))


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None
