"""The scripts of `examples/articles` run, learn, and give the same answers after saving and loading."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "articles"


@pytest.fixture(autouse=True)
def from_the_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Scripts import what lies beside them, as they do when they are run."""
    monkeypatch.syspath_prepend(str(FOLDER))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(FOLDER)):
            del sys.modules[name]


def run(name: str) -> Any:
    return importlib.import_module(name).main()


OTHERS = sorted(path.stem for path in FOLDER.glob("*.py") if f'run("{path.stem}")' not in Path(__file__).read_text())


@pytest.mark.parametrize("script", [name for name in OTHERS if name != "tiny"])
def test_scripts_without_a_test_of_their_own_run(script: str) -> None:
    run(script)


def test_classifier_with_trainer() -> None:
    found = run("classifier_trainer")
    assert found["lora"] > 0.9
    assert found["lora, loaded again"] == found["lora"]
    assert found["full"] > 0.9


def test_prompt_tuning() -> None:
    found = run("prompt_tuning_gpt2")
    assert found["after"] < found["before"] / 2
    assert found["loaded"] == pytest.approx(found["after"], abs=1e-5)


def test_prefix_tuning() -> None:
    for before, after, loaded in run("prefix_tuning_gpt2").values():
        assert after < before / 2
        assert loaded == pytest.approx(after, abs=1e-5)


def test_bitfit_by_hand_is_bitfit_here() -> None:
    found = run("bitfit_by_freezing")
    before, after, trained = found["by hand"]
    assert after < before
    assert found["ingraft"] == (pytest.approx(before, abs=1e-5), pytest.approx(after, abs=1e-5), trained)


def test_mt0_with_seq2seq_trainer() -> None:
    found = run("mt0_seq2seq")
    assert found["before"] < 0.5
    assert found["after"] > 0.9
    assert found["loaded and merged"] == found["after"]


def test_the_life_of_an_adapter() -> None:
    found = run("save_load_merge_generate")
    film, book = "the film is very good", "the book is so dull"
    assert {stage: text for stage, text in found.items() if stage.startswith("film")} == {
        "film": film,
        "film again": film,
        "film loaded": film,
        "film merged": film,
        "film merged, plain transformers": film,
        "film in a pipeline": film,
    }
    assert found["book"] == found["book loaded"] == book
    assert found["disabled"] == found["base"] not in (film, book)
