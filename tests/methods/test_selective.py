"""LN tuning, freezing by layer and trainable tokens: which sites they find, and the ties that they follow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

import ingraft
from ingraft.errors import IngraftError
from ingraft.testing import SUBJECTS
from ingraft.testing.cases import randomise, run


def blocks_of(name: str, config: Any) -> set[str]:
    model = SUBJECTS[name].make_redrawn()
    ingraft.attach(model, config)
    sites = {key.rpartition(".")[0] for key in ingraft.parameters(model, "default")}
    return {".".join(path.split(".")[:3]) for path in sites}


def test_freeze_counts_blocks_from_the_end_or_from_the_start_of_every_stack() -> None:
    assert blocks_of("llama", ingraft.FreezeConfig(num_layers_trainable=1)) == {"model.layers.1"}
    assert blocks_of("llama", ingraft.FreezeConfig(num_layers_trainable=-1)) == {"model.layers.0"}
    assert blocks_of("llama", ingraft.FreezeConfig()) == {"model.layers.0", "model.layers.1"}
    assert blocks_of("t5", ingraft.FreezeConfig(num_layers_trainable=1)) == {"encoder.block.1", "decoder.block.1"}
    assert blocks_of("llama", ingraft.LoraConfig(layers_to_transform=(-1,))) == {"model.layers.1"}


def test_ln_tuning_trains_norms_and_nothing_shaped_like_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.PReLU(6), nn.BatchNorm1d(6), nn.RMSNorm(6), nn.LayerNorm(6, bias=False))
    ingraft.attach(model, ingraft.LNTuningConfig())
    assert list(ingraft.parameters(model, "default")) == ["2.weight", "2.bias", "3.weight", "4.weight"]
    with pytest.raises(IngraftError, match="no norm"):
        ingraft.attach(model, ingraft.LNTuningConfig(target_modules=["0"]), "b")


def masked() -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = BertForMaskedLM(config).eval()
    with torch.no_grad():
        model.cls.predictions.decoder.bias.normal_()
    return model


def test_regression_9_a_tied_head_keeps_its_bias(tmp_path: Path) -> None:
    model, batch = masked(), {"input_ids": torch.tensor([[5, 9, 12, 3]])}
    expected = run(model, batch)
    ingraft.attach(model, ingraft.TrainableTokensConfig(token_indices=[9, 12, 30]))
    assert torch.equal(run(model, batch), expected)
    randomise(model, "default")
    active = run(model, batch)
    assert list(ingraft.parameters(model, "default")) == [
        "bert.embeddings.word_embeddings.weight"
    ]  # one, for both ends
    assert not torch.allclose(active[..., 30], expected[..., 30], atol=0.05)  # only the head has seen token 30
    ingraft.merge(model)
    assert model.cls.predictions.decoder.weight is model.bert.embeddings.word_embeddings.weight
    assert torch.allclose(run(model, batch), active, atol=1e-5)
    ingraft.unmerge(model)
    ingraft.save(model, tmp_path / "tokens")
    # PEFT would leave the bias out.
    fields = json.loads((tmp_path / "tokens" / "adapter_config.json").read_text())
    assert fields["peft_type"] == "INGRAFT_TRAINABLE_TOKENS"
    assert [value.shape for value in load_file(tmp_path / "tokens" / "adapter_model.safetensors").values()] == [(3, 16)]
    again = masked()
    ingraft.load(again, tmp_path / "tokens")
    assert torch.equal(run(again, batch), active)


def test_the_tied_rows_get_the_gradient_of_both_ends() -> None:
    model, batch = masked(), {"input_ids": torch.tensor([[5, 9, 12, 3]])}
    weights: Tensor = torch.randn(4, 40)
    tied = model.bert.embeddings.word_embeddings.weight
    (model(**batch).logits * weights).sum().backward()
    assert tied.grad is not None
    expected = tied.grad[[9, 30]].clone()
    ingraft.attach(model, ingraft.TrainableTokensConfig(token_indices=[9, 30]))
    (model(**batch).logits * weights).sum().backward()
    (rows,) = ingraft.parameters(model, "default").values()
    assert rows.grad is not None and torch.allclose(rows.grad, expected, atol=1e-5)


def test_a_token_that_has_no_row_is_refused() -> None:
    with pytest.raises(IngraftError, match="40 rows and none for 40, 99"):
        ingraft.attach(masked(), ingraft.TrainableTokensConfig(token_indices=[3, 40, 99]))


def test_tokens_beside_another_method_follow_ties_and_are_its_own_tensors(tmp_path: Path) -> None:
    model, batch = masked(), {"input_ids": torch.tensor([[5, 9, 12, 3]])}
    expected = run(model, batch)
    config = ingraft.LoraConfig(r=2, target_modules=["query"], trainable_token_indices=[9, 30])
    ingraft.attach(model, config)
    assert torch.equal(run(model, batch), expected)
    randomise(model, "default")
    active = run(model, batch)
    assert [key for key in ingraft.parameters(model, "default") if "lora" not in key] == [
        "bert.embeddings.word_embeddings.weight"
    ]
    ingraft.save(model, tmp_path / "both")
    again = masked()
    ingraft.load(again, tmp_path / "both")
    assert torch.equal(run(again, batch), active)
    with pytest.raises(IngraftError, match="trains tokens"):
        ingraft.combine(again, {"default": 1.0}, name="c", how="svd", rank=2)
    ingraft.merge(model)
    assert torch.allclose(run(model, batch), active, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"trainable_token_indices": [3, 99]}, "40 rows and none for 99"),
        ({"trainable_token_indices": [3], "target_modules": ["word_embeddings"]}, "adapted by lora itself"),
        ({"trainable_token_indices": {"words": [3]}}, "'words' matches no module"),
        ({"trainable_token_indices": {"word_embeddings": [3], "decoder": [4]}}, "different tokens"),
    ],
)
def test_tokens_that_cannot_be_trained_beside_a_method_are_refused(options: dict[str, Any], words: str) -> None:
    model = masked()
    with pytest.raises(IngraftError, match=words):
        ingraft.attach(model, ingraft.LoraConfig(**options))
    assert type(model.bert.embeddings.word_embeddings) is nn.Embedding


class Words:
    """A tokenizer as far as adding tokens needs one."""

    def __init__(self, known: int) -> None:
        self.words = [f"w{n}" for n in range(known)]

    def __len__(self) -> int:
        return len(self.words)

    def add_tokens(self, tokens: list[str], special_tokens: bool = False) -> None:
        self.words += [token for token in tokens if token not in self.words]

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int]:
        return [self.words.index(token) for token in tokens]


def grown() -> tuple[Any, tuple[int, ...]]:
    model = SUBJECTS["llama"].make_redrawn()
    return model, ingraft.add_tokens(model, Words(48), ["w7", "<think>", "</think>"])


def test_new_tokens_start_as_the_mean_train_and_are_found_again(tmp_path: Path) -> None:
    model, ids = grown()
    assert ids == (7, 48, 49)
    embedding: Any = model.get_input_embeddings()
    assert embedding.weight.shape[0] == 50 and model.config.vocab_size == 50
    assert torch.allclose(embedding.weight[48], embedding.weight[:48].mean(0), atol=1e-6)
    assert torch.allclose(model.lm_head.weight[49], model.lm_head.weight[:48].mean(0), atol=1e-6)
    config = ingraft.LoraConfig(trainable_token_indices={"embed_tokens": ids[1:], "lm_head": ids[1:]})
    ingraft.attach(model, config)
    randomise(model, "default")
    batch = {"input_ids": torch.tensor([[3, 48, 49, 5]])}
    expected = run(model, batch)
    with pytest.raises(IngraftError, match="add tokens first"):
        ingraft.add_tokens(model, Words(50), ["more"])
    ingraft.save(model, tmp_path / "new")
    again, _ = grown()
    ingraft.load(again, tmp_path / "new")  # the base's fingerprint agrees too
    assert torch.equal(run(again, batch), expected)
