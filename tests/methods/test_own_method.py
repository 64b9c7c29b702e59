"""The worked example of CONTRIBUTING.md obeys every law, without a line of the package knowing it."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.testing import SUBJECTS, Row, check_method, checks

FOLDER = Path(__file__).parents[2] / "examples" / "own_method"


@pytest.fixture
def gain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, found through its entry point as an installed package's would be."""
    monkeypatch.syspath_prepend(str(FOLDER))
    entry = importlib.metadata.EntryPoint(name="gain", value="ingraft_gain:RECORD", group="ingraft.methods")
    own, installed = importlib.metadata.EntryPoints([entry]), importlib.metadata.entry_points
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda **what: own if what == {"group": entry.group} else installed(**what),
    )
    registry.records.cache_clear()
    registry.load.cache_clear()
    yield importlib.import_module("ingraft_gain")
    registry.records.cache_clear()
    registry.load.cache_clear()


def test_a_method_of_ones_own_inherits_the_lifecycle(gain: Any) -> None:
    """One class of under 40 lines, and every law holds of it: on a layer by itself, on packed blocks, in a model."""
    assert len(inspect.getsource(gain.Gain).splitlines()) < 40
    layers, model = [SUBJECTS[name] for name in ("linear", "linear-nf4")], [SUBJECTS["llama"]]

    def equation(values: Mapping[str, Tensor], base: nn.Module) -> None:
        for key, g in values.items():
            layer = base.get_submodule(key.rpartition(".")[0])
            for parameter in layer.parameters():
                parameter.mul_(1 + g.view(-1, *[1] * (parameter.dim() - 1)))

    row = Row(config=gain.GainConfig(), equation=equation)
    assert check_method(row, subjects=layers, study=True) + check_method(row, subjects=model) > 100


def test_every_law_is_tried_on_it_unasked(gain: Any) -> None:
    """No other method stands for it, so none of its laws waits for `study`."""
    subjects = [SUBJECTS[name] for name in ("linear", "linear-nf4", "llama")]
    found = list(checks([Row(config=gain.GainConfig(), equation=lambda values, base: None)], subjects))
    assert {each.law.name for each in found} == {each.law.name for each in found if each.study is None}


def test_its_options_are_checked_like_any(gain: Any) -> None:
    """A wrong key is named."""
    with pytest.raises(IngraftError, match="gain has no option 'rank'"):
        registry.make_config("gain", {"rank": 4})
