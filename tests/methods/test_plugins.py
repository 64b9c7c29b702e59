"""Methods of installed packages: one that is broken is named and left out, and nothing else is the worse for it."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ingraft
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.recipe import as_recipe


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Makes packages known by their entry points, each a name, what it points at, and the text of its module."""

    def made(*packages: tuple[str, str, str]) -> None:
        monkeypatch.syspath_prepend(str(tmp_path))
        for name, value, text in packages:
            if text:
                (tmp_path / f"{value.partition(':')[0]}.py").write_text(text)
            about = tmp_path / f"{name}_package-0.1.dist-info"
            about.mkdir()
            (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}-package\nVersion: 0.1\n")
            (about / "entry_points.txt").write_text(f"[ingraft.methods]\n{name} = {value}\n")
        clear()

    yield made
    monkeypatch.undo()
    importlib.invalidate_caches()
    clear()


def clear() -> None:
    registry.records.cache_clear()
    registry.load.cache_clear()


RECORD = """
from ingraft.methods.registry import MethodRecord
RECORD = MethodRecord(name={name!r}, target={target!r}, config="C", family="weight", summary="s", equation="e", paper="p", mergeable=True,
                      learning_rate=1e-3)
"""


def test_a_broken_package_is_named_and_left_out(install: Any, caplog: pytest.LogCaptureFixture) -> None:
    install(
        ("zork", "nowhere_at_all:RECORD", ""),
        ("blow", "blows_up:RECORD", "raise RuntimeError('half installed')"),
        ("seven", "is_seven:RECORD", "RECORD = 7"),
        ("lora", "another_lora:RECORD", RECORD.format(name="lora", target="x:y")),
    )
    with caplog.at_level(logging.WARNING):
        assert ingraft.LoraConfig(r=2).r == 2
        known = registry.records()
    assert {"zork", "blow", "seven"}.isdisjoint(known) and known["lora"].target.startswith("ingraft.")
    text = caplog.text
    for words in (
        "'zork' of the package zork-package (entry point zork = nowhere_at_all:RECORD",
        "RuntimeError: half installed",
        "is no MethodRecord but int",
        "is a method that is here already",
    ):
        assert words in text
    for name in ("zork", "blow", "seven"):
        with pytest.raises(IngraftError, match=f"The method '{name}' of the package {name}-package.*Mend or uninstall"):
            registry.make_config(name, {})
    with pytest.raises(IngraftError, match="method: The method 'zork' of the package"):
        as_recipe({"model": "m", "task": "sft", "data": {"train": "x"}, "method": "zork"})


def test_a_method_whose_file_is_broken_hinders_no_other(
    install: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    install(("lame", "lame_record:RECORD", RECORD.format(name="lame", target="lame_file:METHOD")))
    (tmp_path / "lame_file.py").write_text("import nothing_of_the_sort")
    assert "lame" in registry.records()
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    ingraft.attach(model, ingraft.LoraConfig(r=2))
    ingraft.save(model, tmp_path / "a")
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        ingraft.load(model, tmp_path / "a", name="b")
    assert "'lame' of the package lame-package" in caplog.text
    with pytest.raises(IngraftError, match=r"ModuleNotFoundError.*nothing_of_the_sort"):
        registry.load("lame")
