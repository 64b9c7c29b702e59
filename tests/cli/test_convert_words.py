"""`ingraft convert` speaks of itself, and opens the base as the run that trained the adapter held it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

import ingraft
from ingraft import bases
from ingraft.cli import sources
from ingraft.cli.main import main
from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig
from ingraft.methods.lora import LoraConfig
from ingraft.methods.prefix import PrefixTuningConfig
from ingraft.quant.layers import Packed
from tiny_gguf import write_gguf


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    return write_gguf(tmp_path / "x.gguf", ["Q8_0"])


def adapter(base: Path, folder: Path, config: MethodConfig, quantization: str, recipe: bool = True) -> Path:
    """An adapter folder as a run over this base leaves it."""
    model = bases.load_base(str(base), dtype="float32", task="sft", quantization=quantization).model
    ingraft.attach(model, config, "default", seed=1)
    with torch.no_grad():
        for parameter in ingraft.parameters(model, "default").values():
            parameter.normal_(std=0.1)
    ingraft.save(model, folder, "default")
    if recipe:
        told = {"model": str(base), "dtype": "float32", "quantization": quantization, "data": {"train": "unused"}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(told))
    return folder


def test_an_adapter_that_is_no_change_of_weights_is_refused_in_converts_words(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, nothing of `combine` or of arguments that convert has not, and no folder."""
    folder = adapter(base, tmp_path / "prefix", PrefixTuningConfig(num_virtual_tokens=2), "none")
    capsys.readouterr()
    words = ["convert", "--adapter", str(folder), "--rank", "2", "--output-dir", str(tmp_path / "out")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "convert: default (prefix) is not a change of weights" in said and "--adapter" not in said
    assert "combine" not in said and "how=" not in said
    assert not (tmp_path / "out").exists()


def test_every_refusal_of_convert_is_its_own() -> None:
    """A rank that cannot be, an adapter on another ground, tokens: `convert:`, never `combine:`, and combine keeps its words."""
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    ingraft.attach(model, PrefixTuningConfig(num_virtual_tokens=2), "p")
    ingraft.attach(model, LoraConfig(r=2), "a")
    ingraft.attach(model, LoraConfig(r=2, trainable_token_indices=(1,)), "t")
    for name, rank, words in (("p", 2, "no change|not a change"), ("a", 0, "at least 1"), ("t", 2, "tokens")):
        with pytest.raises(IngraftError, match=words) as caught:
            ingraft.convert(model, name, rank)
        assert all(problem.startswith("convert: ") for problem in caught.value.problems)
    with pytest.raises(IngraftError, match=r"combine: p \(prefix\).*how='parameters'"):
        ingraft.combine(model, {"p": 1.0}, "new")
    with pytest.raises(IngraftError, match="combine: t trains tokens"):
        ingraft.combine(model, {"t": 1.0}, "new")
    ingraft.activate(model, "a")
    ingraft.merge(model)
    with pytest.raises(IngraftError, match="convert: a is merged"):
        ingraft.convert(model, "t", 2)


@pytest.mark.parametrize("way", ["keep", "int8", "nf4"])
@pytest.mark.parametrize("recipe", [True, False])
def test_convert_opens_the_base_as_it_was_held(
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    way: str,
    recipe: bool,
) -> None:
    """The recipe beside an adapter says how its base was held; where there is none, --quantization does."""
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2), way, recipe)
    opened: list[Any] = []
    theirs = sources.open_model
    monkeypatch.setattr(sources, "open_model", lambda *a, **k: opened.append(theirs(*a, **k)) or opened[-1])
    capsys.readouterr()
    words = ["convert", "--adapter", str(folder), "--rank", "2", "--output-dir", str(tmp_path / "out"), "--json"]
    if not recipe:
        words += ["--model", str(base), "--quantization", way, "--dtype", "float32"]
    assert main(words) == 0, capsys.readouterr().err
    found = json.loads(capsys.readouterr().out)
    assert any(isinstance(module, Packed) for module in opened[0].model.modules())
    assert opened[0].recipe.quantization == way
    assert found["error"] < 1e-4
