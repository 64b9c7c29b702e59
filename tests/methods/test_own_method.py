"""The worked example of CONTRIBUTING.md obeys every law, without a line of the package knowing it."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.testing import SUBJECTS, check_method

FOLDER = Path(__file__).parents[2] / "examples" / "own_method"


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, found through its entry point as an installed package's would be."""
    monkeypatch.syspath_prepend(str(FOLDER))
    entry = importlib.metadata.EntryPoint(name="gain", value="ingraft_gain:RECORD", group="ingraft.methods")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == entry.group else [])
    registry.records.cache_clear()
    registry.load.cache_clear()
    yield importlib.import_module("ingraft_gain")
    registry.records.cache_clear()
    registry.load.cache_clear()


def test_a_method_of_ones_own_inherits_the_lifecycle(gain: Any) -> None:
    """Every law that is cheap, on a layer and on a model."""
    subjects = [SUBJECTS["linear"], SUBJECTS["llama"]]
    assert check_method(gain.GainConfig(), subjects=subjects, numbers=(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 21)) > 20


def test_its_options_are_checked_like_any(gain: Any) -> None:
    """A wrong key is named."""
    with pytest.raises(IngraftError, match="gain has no option 'rank'"):
        registry.make_config("gain", {"rank": 4})
