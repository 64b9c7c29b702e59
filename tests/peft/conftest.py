"""The reference implementation calls names that transformers has deprecated; that is not ours to mend."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Leave what the incumbent is known to say out of the warnings that are errors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Position ids are not supported", category=UserWarning)
        yield
