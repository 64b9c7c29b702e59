"""Heads that transformers has no class for, or one that cannot read the base: the base is the one in the files, and what is saved loads again."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ingraft import bases
from ingraft.errors import IngraftError

SIZE: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
MADE: dict[str, Any] = {
    "llama": (LlamaForCausalLM, LlamaConfig, {}),
    "gemma3": (Gemma3ForCausalLM, Gemma3TextConfig, {"head_dim": 8, "num_key_value_heads": 1}),
    "bert": (BertForMaskedLM, BertConfig, {}),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models

    home = tmp_path_factory.mktemp("heads")
    torch.manual_seed(0)
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="b"))
    for name, (model, config, more) in MADE.items():
        model(config(**SIZE, **more)).save_pretrained(home / name)
        PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="b", pad_token="a").save_pretrained(home / name)
    return home


@pytest.mark.parametrize("task", ["tag", "qa", "classify", "multi-label", "regress"])
@pytest.mark.parametrize("name", list(MADE))
def test_only_the_head_begins_at_random(name: str, task: str, home: Path, tmp_path: Path) -> None:
    """transformers' own Llama that finds answers would leave all of the base at random."""
    labels = {"labels": ["O", "B-X", "I-X"]} if bases.HEADS[task].named else {}
    base = bases.load_base(str(home / name), "float32", task=task, **labels)  # type: ignore[arg-type]
    beside = "pooler" if name == "bert" else "-"
    assert all("." not in path or beside in path for path in base.fresh), base.fresh
    held = MADE[name][0].from_pretrained(home / name).state_dict()
    shared = [key for key in base.model.state_dict() if key in held]
    assert len(shared) > 10
    assert all(torch.equal(held[key], base.model.state_dict()[key]) for key in shared)

    inputs = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3, dtype=torch.long)}
    wanted = base.model(**inputs)[0]
    assert wanted.shape == {"tag": (1, 3, 3), "qa": (1, 3), "regress": (1, 1)}.get(task, (1, 3))
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    again = bases.load_base(str(tmp_path), "float32")
    assert type(again.model) is type(base.model)
    for model in (again.model, copy.deepcopy(base.model), pickle.loads(pickle.dumps(base.model))):
        torch.testing.assert_close(model(**inputs)[0], wanted, rtol=1e-5, atol=1e-6)


def test_a_base_that_would_begin_at_random_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Should a class look for the base under another name than the files have, as transformers' Llama does for answers."""
    from transformers import LlamaForQuestionAnswering

    monkeypatch.setattr("ingraft.bases.generic.class_for", lambda config, loader, part: LlamaForQuestionAnswering)
    with pytest.raises(IngraftError, match="finds next to nothing of a LlamaForQuestionAnswering"):
        bases.load_base(str(home / "llama"), "float32", task="qa")


def test_the_scale_of_a_number_is_the_models_own(home: Path, tmp_path: Path) -> None:
    """A model that puts out a number says what it means by it, also when it is saved; one of another make means its numbers as they are."""
    base = bases.load_base(str(home / "bert"), "float32", task="regress", scale=(5.5, 2.0))
    assert bases.heads.scale_of(base.model) == (5.5, 2.0)
    assert base.model.config.problem_type == "regression"
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert bases.heads.scale_of(bases.load_base(str(tmp_path), "float32").model) == (5.5, 2.0)
    assert bases.heads.scale_of(bases.load_base(str(home / "bert"), "float32").model) == (0.0, 1.0)
