"""Outputs with a place for each token, and adapters by row: where Hugging Face PEFT's callers look for what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor

import ingraft
import peft
from ingraft import IngraftError
from ingraft import peft as ours
from ingraft.testing.subjects import redrawn

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
P = 3
IDS = torch.randint(5, 48, (2, 6), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1] * 6, [1] * 4 + [0] * 2])


def made(family: str, kind: str) -> Any:
    config: Any = getattr(T, f"{family}Config")(**SIZES)
    return redrawn(getattr(T, f"{family}{kind}")(config))


MODELS: dict[str, tuple[str, Callable[[], Any], dict[str, Tensor]]] = {
    **{
        f"classify-{family}": (
            "SEQ_CLS",
            lambda family=family: made(family, "ForSequenceClassification"),
            {"labels": torch.tensor([0, 1])},
        )
        for family in ("Bert", "Roberta", "Llama")
    },
    **{
        f"tag-{family}": ("TOKEN_CLS", lambda family=family: made(family, "ForTokenClassification"), {})
        for family in ("Bert", "Roberta", "Llama")
    },
    **{
        f"answer-{family}": (
            "QUESTION_ANS",
            lambda family=family: made(family, "ForQuestionAnswering"),
            {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 3])},
        )
        for family in ("Bert", "Llama")
    },
    "feature": ("FEATURE_EXTRACTION", lambda: made("Bert", "Model"), {}),
    "write": ("CAUSAL_LM", lambda: made("Llama", "ForCausalLM"), {"labels": IDS}),
}


def pair(name: str, folder: Path) -> tuple[Any, Any]:
    """The same prompt on the same model, there and here."""
    task, make, _ = MODELS[name]
    theirs = peft.get_peft_model(make(), peft.PromptTuningConfig(num_virtual_tokens=P, task_type=task)).eval()
    with torch.no_grad():
        for parameter in theirs.prompt_encoder.parameters():
            parameter.normal_()
    theirs.save_pretrained(str(folder))
    return theirs, ours.PeftModel.from_pretrained(make(), folder)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_have_the_incumbents_places(name: str, tmp_path: Path) -> None:
    """Every tensor that comes out has the shape and the numbers it has there; padding, which nobody reads, aside. So has the loss."""
    theirs, here = pair(name, tmp_path)
    with torch.no_grad():
        one, other = (model(input_ids=IDS, attention_mask=MASK, **MODELS[name][2]) for model in (theirs, here))
    compared = [key for key in one if isinstance(one[key], Tensor)]
    assert compared
    real = torch.cat([MASK.new_ones(2, P), MASK], 1).bool()
    for key in compared:
        assert one[key].shape == other[key].shape, key
        longer = one[key].dim() > 1 and one[key].shape[1] == P + IDS.shape[1]
        if longer:
            assert torch.allclose(one[key][real], other[key][real], atol=1e-5), key
        else:
            assert torch.allclose(one[key], other[key], atol=1e-5), key


def test_a_tagger_is_trained_by_labels_of_either_length(tmp_path: Path) -> None:
    """Labels for the tokens, or, as the incumbent asks, for the virtual ones too."""
    theirs, here = pair("tag-Bert", tmp_path)
    labels = IDS % 2
    longer = torch.cat([labels.new_full((2, P), -100), labels], 1)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    with torch.no_grad():
        expected = theirs(**batch, labels=longer).loss
        assert torch.allclose(here(**batch, labels=longer).loss, expected, atol=1e-6)
        assert torch.allclose(here(**batch, labels=labels).loss, expected, atol=1e-6)


def test_places_are_the_tokens_own_elsewhere(tmp_path: Path) -> None:
    """The same folder, loaded by `ingraft.load`, answers for the tokens alone, with the same numbers."""
    _, here = pair("tag-Roberta", tmp_path)
    native = MODELS["tag-Roberta"][1]()
    ingraft.load(native, tmp_path)
    with torch.no_grad():
        longer, own = (model(input_ids=IDS).logits for model in (here, native))
    assert torch.allclose(longer[:, P:], own, atol=1e-6)


def test_rows_of_the_base_have_the_same_places(tmp_path: Path) -> None:
    """Beside a row with a prompt, a row without one is as long; its own tokens are the last, as everywhere."""
    _, here = pair("tag-Bert", tmp_path)
    with torch.no_grad():
        mixed = here(input_ids=IDS, adapter_names=["default", "__base__"]).logits
        tuned = here(input_ids=IDS).logits
        with here.disable_adapter():
            base = here(input_ids=IDS).logits
    assert torch.allclose(mixed[0], tuned[0], atol=1e-5)
    assert torch.allclose(mixed[1, P:], base[1], atol=1e-5)


@pytest.mark.parametrize("names", [["default"], ["default", "__base__"], ["default"] * 6, []])
def test_adapter_names_that_are_not_one_a_row_are_a_value_error(names: list[str], tiny: SimpleNamespace) -> None:
    """Also where they would divide the batch, as beams do: in a forward and in `generate`, and as a refusal of ours too."""
    ids = torch.randint(5, 40, (4, 5), generator=torch.Generator().manual_seed(3))
    model = ours.get_peft_model(tiny.make("llama"), ours.LoraConfig(r=2))
    said = f"{len(names)} names were given for 4 rows"
    for refused in (ValueError, IngraftError):
        with pytest.raises(refused, match=said):
            model(input_ids=ids, adapter_names=names)
        with pytest.raises(refused, match=said):
            model.generate(ids, max_new_tokens=1, adapter_names=names)
    text = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=2,
        num_beams=2,
        pad_token_id=0,
        adapter_names=["default"] * 4,
    )
    assert text.shape[0] == 4
