"""What `ingraft methods` and docs/methods.md say of a method, one method at a time."""

from __future__ import annotations

import inspect
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingraft.cli.main import main
from ingraft.methods import registry

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model's folder."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(folder)
    return folder


def said(capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    capsys.readouterr()
    assert main(["methods", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_method_is_counted_on_a_given_base(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With NAME and --model the count is that base's, the one that the whole list has; the options still follow."""
    one = said(capsys, "lora", "--model", base)
    layers = 2 * (4 * (16 + 16) + 3 * (16 + 24))
    assert one["parameters"] == 8 * layers
    assert {option["key"] for option in one["options"]} >= {"r", "lora_alpha"}
    assert main(["methods", "lora", "--model", str(base)]) == 0
    out = capsys.readouterr().out
    assert f"{8 * layers:,} of this base" in out
    assert "SmolLM2" not in out


def test_one_method_that_a_base_refuses_says_why(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As the whole list does."""
    one = said(capsys, "bitfit", "--model", base)
    assert one["parameters"] is None
    assert "add_bias" in one["refused"]
    assert main(["methods", "bitfit", "--model", str(base)]) == 0
    assert "not on this base" in capsys.readouterr().out


@pytest.mark.parametrize("words", [["lora"], []])
def test_an_unknown_base_is_refused(words: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """With NAME as without: exit code 2, nothing on standard output."""
    assert main(["methods", *words, "--model", str(tmp_path / "none")]) == 2
    seen = capsys.readouterr()
    assert seen.out == ""
    assert "none" in seen.err


def test_a_count_that_needs_an_option_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    """Default options of bitfit are refused on a Llama; the number is that of the option named beside it."""
    one = said(capsys, "bitfit")
    assert one["shapes_with"] == {"add_bias": True}
    assert main(["methods", "bitfit"]) == 0
    assert "--method-config.add-bias true; default options are refused" in capsys.readouterr().out
    assert said(capsys, "lora")["shapes_with"] == {}
    row = next(
        line for line in (ROOT / "docs" / "methods.md").read_text().splitlines() if line.startswith("| [`bitfit`")
    )
    assert "(with `add_bias=True`; refused without)" in row


def test_every_section_of_the_page_opens_with_the_methods_own_file() -> None:
    """Not with that of the class it shares with another method."""
    section = runpy.run_path(str(ROOT / "docs" / "make_methods.py"))["section"]
    heads: dict[str, str] = {}
    for name, record in registry.records().items():
        registry.load(name)
        text = section(record)
        heads[name] = text.split("```text\n")[1].split("\n```")[0]
        assert heads[name] == inspect.cleandoc(sys.modules[record.target.partition(":")[0]].__doc__ or "")
    assert heads["rslora"].startswith("rsLoRA") and "sqrt(r)" in heads["rslora"]
    assert heads["freeze"].startswith("Freezing")
    assert len(set(heads.values())) == len(heads)


def test_ofts_equation_is_that_of_its_defaults() -> None:
    """The series that the default options use, term by term."""
    from ingraft.methods.oft import OFTConfig
    from ingraft.methods.rotation import series, skew

    assert OFTConfig().use_cayley_neumann
    assert "T_i = I + 2 Q_i + 2 Q_i^2 + 2 Q_i^3 + Q_i^4 " in registry.record("oft").equation
    Q = skew(0.3 * torch.randn(1, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), 4)
    torch.testing.assert_close(
        series(Q, OFTConfig().num_cayley_neumann_terms), 2 * Q + 2 * Q @ Q + 2 * Q @ Q @ Q + Q @ Q @ Q @ Q
    )


def test_equations_are_equations() -> None:
    """No shell has read them: a star that it took for a pattern becomes the names of files."""
    assert not [record.name for record in registry.records().values() if ".md" in record.equation]
