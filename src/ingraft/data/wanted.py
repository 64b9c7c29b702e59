"""What a recipe says about data, handed to `load`: the one place that knows both, for every verb."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ingraft.data.dataset import DataSet, load

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader
    from ingraft.recipe import Recipe


def load_wanted(
    recipe: Recipe,
    tokenizer: Reader,
    labels: tuple[str, ...] | None = None,
    scale: tuple[float, float] | None = None,
) -> DataSet:
    """The recipe's data.

    Args:
        labels, scale: of a model that is trained already, as in `load`.

    Raises:
        IngraftError: see `load`.
    """
    wanted = recipe.data
    return load(
        wanted.train,
        tokenizer,
        task=recipe.task,
        eval=wanted.eval or None,
        test=wanted.test,
        form=wanted.format,
        max_length=wanted.max_length,
        learn=wanted.learn,
        stride=wanted.stride,
        truncation=wanted.truncation,
        seed=recipe.seed,
        labels=labels,
        scale=scale,
    )
