"""Metrics by the libraries that everybody checks against: scikit-learn, SciPy, seqeval, sacrebleu, rouge-score. Imported when they are used (the extra `metrics`).

Everywhere 0 stands for what cannot be computed: F1 of a class that nobody has and nobody names, a correlation with something constant.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from ingraft.data.tagged import names_entities
from ingraft.errors import IngraftError

PACKAGES = {
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "seqeval": "seqeval",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
}
"""What is imported -> what is installed."""


def require(task: str, modules: Sequence[str]) -> None:
    """Refuse a task whose metrics cannot be computed here.

    Raises:
        IngraftError: naming what is to be installed.
    """
    if missing := [PACKAGES[name] for name in modules if find_spec(name) is None]:
        raise IngraftError(
            f"task: the metrics of {task!r} are computed by {' and '.join(missing)}, not installed here; "
            f"`pip install {' '.join(missing)}` (or the extra: ingraft[metrics])."
        )


def _sklearn() -> Any:
    return import_module("sklearn.metrics")


def of_classes(labels: Sequence[int], predictions: Sequence[int]) -> dict[str, float]:
    """`accuracy`, `macro_f1` over the classes that occur, `micro_f1`, `matthews`."""
    metrics = _sklearn()
    occurring = sorted({*labels, *predictions})
    return {
        "accuracy": float(metrics.accuracy_score(labels, predictions)),
        "macro_f1": float(metrics.f1_score(labels, predictions, labels=occurring, average="macro", zero_division=0)),
        "micro_f1": float(metrics.f1_score(labels, predictions, labels=occurring, average="micro", zero_division=0)),
        "matthews": float(metrics.matthews_corrcoef(labels, predictions)) if len(occurring) > 1 else 0.0,
    }


def of_several(
    labels: Sequence[Sequence[int]] | NDArray[np.int64], predictions: Sequence[Sequence[int]] | NDArray[np.int64]
) -> dict[str, float]:
    """`micro_f1`, `macro_f1` over all classes, and `exact_match`, the share of rows whose every class is right.

    Args:
        labels, predictions: per row, 0 or 1 for each class.
    """
    metrics = _sklearn()
    return {
        "micro_f1": float(metrics.f1_score(labels, predictions, average="micro", zero_division=0)),
        "macro_f1": float(metrics.f1_score(labels, predictions, average="macro", zero_division=0)),
        "exact_match": float(metrics.accuracy_score(labels, predictions)),
    }


def of_numbers(labels: Sequence[float], predictions: Sequence[float]) -> dict[str, float]:
    """`mse` and `mae` in the labels' own unit, `pearson` and `spearman`."""
    metrics, stats = _sklearn(), cast(Any, import_module("scipy.stats"))
    found = {
        "mse": float(metrics.mean_squared_error(labels, predictions)),
        "mae": float(metrics.mean_absolute_error(labels, predictions)),
        "pearson": 0.0,
        "spearman": 0.0,
    }
    if len(set(labels)) > 1 and len(set(predictions)) > 1:
        with warnings.catch_warnings():  # nearly constant numbers are warned of; the figures are printed all the same
            warnings.simplefilter("ignore")
            correlations = {
                "pearson": float(stats.pearsonr(labels, predictions).statistic),
                "spearman": float(stats.spearmanr(labels, predictions).statistic),
            }
        found |= {name: value for name, value in correlations.items() if value == value}  # NaN stays 0
    return found


def of_tags(
    labels: Sequence[Sequence[str]], predictions: Sequence[Sequence[str]], entities: bool | None = None
) -> dict[str, float]:
    """`accuracy` of the words; where tags mark entities (BIO, BIOES) `precision`, `recall` and `f1` of whole entities as CoNLL counts them, elsewhere
    `macro_f1` over the tags.

    Args:
        labels, predictions: per row, a tag for each word. entities: whether tags mark those, where that is known from more rows than these.
    """
    metrics = _sklearn()
    right, said = ([tag for row in rows for tag in row] for rows in (labels, predictions))
    found = {"accuracy": float(metrics.accuracy_score(right, said))}
    if not (names_entities({*right, *said}) if entities is None else entities):
        return found | {"macro_f1": float(metrics.f1_score(right, said, average="macro", zero_division=0))}
    seqeval: Any = import_module("seqeval.metrics.sequence_labeling")
    rows = [list(row) for row in labels], [list(row) for row in predictions]
    precision, recall, f1, _ = seqeval.precision_recall_fscore_support(*rows, average="micro", zero_division=0)
    return found | {"precision": float(precision), "recall": float(recall), "f1": float(f1)}


def entities_of(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities of a row, each by its kind and its first and last word."""
    seqeval: Any = import_module("seqeval.metrics.sequence_labeling")
    return {tuple(entity) for entity in seqeval.get_entities(list(tags))}


def of_similarities(
    labels: Sequence[float], similarities: Sequence[float], binary: bool | None = None
) -> dict[str, float]:
    """`spearman`; for labels of 0 and 1 `average_precision` and `best_accuracy` too, that of the threshold which suits these very rows best.

    Args:
        binary: whether labels are 0 and 1, where that is known from more rows than these.
    """
    found = {"spearman": of_numbers(labels, similarities)["spearman"]}
    if not (set(labels) == {0.0, 1.0} if binary is None else binary):
        return found
    precision = float(_sklearn().average_precision_score(labels, similarities)) if any(labels) else 0.0
    ordered = sorted(zip(similarities, labels, strict=True), reverse=True)
    right = best = int(
        len(labels) - sum(labels)
    )  # all are said to be 0; then one after the other 1, equal ones together
    for number, (similarity, label) in enumerate(ordered):
        right += 1 if label else -1
        if number + 1 == len(ordered) or ordered[number + 1][0] != similarity:
            best = max(best, right)
    return found | {"average_precision": precision, "best_accuracy": best / len(labels)}
