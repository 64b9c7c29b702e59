"""Virtual tokens move positions as the model counts them: over columns, over tokens that are no padding, or over what the mask shows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from torch import Tensor

import ingraft
import peft
from ingraft import adapt
from ingraft.adapt.counting import COUNTING, Counting, counting_of
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config
from ingraft.testing.cases import randomise

TINY: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
OPT = {**TINY, "ffn_dim": 24, "word_embed_proj_dim": 16}

FAMILIES: dict[str, tuple[Any, Counting]] = {
    "roberta": (lambda: t.RobertaForTokenClassification(t.RobertaConfig(**TINY)), Counting("ids", 2)),
    "mpnet": (lambda: t.MPNetForTokenClassification(t.MPNetConfig(**TINY)), Counting("ids", 2)),
    "esm": (lambda: t.EsmForTokenClassification(t.EsmConfig(**TINY, mask_token_id=4)), Counting("ids", 2)),
    "longformer": (
        lambda: t.LongformerForTokenClassification(t.LongformerConfig(**TINY, attention_window=4)),
        Counting("ids", 2),
    ),
    "nystromformer": (
        lambda: t.NystromformerForTokenClassification(
            t.NystromformerConfig(**TINY, num_landmarks=4, segment_means_seq_len=4)
        ),
        Counting("column", 2),
    ),
    "bert": (lambda: t.BertForTokenClassification(t.BertConfig(**TINY)), Counting("column", 0)),
    "opt": (lambda: t.OPTForCausalLM(t.OPTConfig(**OPT)), Counting("mask", 0)),
    "biogpt": (lambda: t.BioGptForCausalLM(t.BioGptConfig(**TINY)), Counting("column", 0)),
}


def made(kind: str) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FAMILIES[kind][0]().eval()
    with torch.no_grad():  # so that a position next to the right one is seen
        for name, parameter in model.named_parameters():
            if "position" in name:
                parameter.mul_(20)
    return model


def batch(*, left: bool) -> tuple[Tensor, Tensor]:
    ids = torch.randint(5, 48, (2, 8), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if left:
        ids[:, :3], mask[:, :3] = 1, 0
    return ids, mask


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_model_is_asked_how_it_counts(kind: str) -> None:
    model = made(kind)
    base = model.base_model
    found = counting_of(getattr(base, "decoder", base), None)
    assert found is not None
    assert (found.over, found.start) == (FAMILIES[kind][1].over, FAMILIES[kind][1].start)
    adapt.attach(model, make_config("prompt", {"num_virtual_tokens": 2}))
    adapt.detach(model)
    assert not any(COUNTING in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_file_computes_the_same_in_peft(kind: str, tmp_path: Path) -> None:
    model, (ids, mask) = made(kind), batch(left=kind in ("opt", "biogpt"))
    twin = copy.deepcopy(model)
    adapt.attach(model, make_config("prompt", {"num_virtual_tokens": 4}))
    randomise(model, "default")
    ingraft.save(model, tmp_path / "x")
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(twin, str(tmp_path / "x")).eval()(input_ids=ids, attention_mask=mask)
        torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits[:, 3:], there.logits[:, -8:][:, 3:])


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        *((kind, "prompt") for kind in FAMILIES if kind not in ("nystromformer", "esm")),
        *((kind, "prefix") for kind in ("opt", "biogpt", "roberta", "bert")),
    ],
)
def test_a_row_without_virtual_tokens_is_the_base(kind: str, method: str) -> None:
    model, (ids, mask) = made(kind), batch(left=kind in ("opt", "biogpt"))
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[1]
        adapt.attach(model, make_config(method, {"num_virtual_tokens": 4}))
        randomise(model, "default")
        with adapt.rows(model, ["default", None]):
            found = model(input_ids=ids, attention_mask=mask).logits[1]
    torch.testing.assert_close(found[3:], expected[3:])


def test_a_way_of_counting_that_is_not_known_is_refused() -> None:
    model = made("bert")
    model.bert.embeddings.position_ids = model.bert.embeddings.position_ids.flip(1)
    for method in ("prompt", "prefix"):
        with pytest.raises(IngraftError, match=rf"{method}: BertForTokenClassification counts positions"):
            adapt.attach(model, make_config(method, {"num_virtual_tokens": 2}))


def rwkv() -> Any:
    return t.RwkvForCausalLM(t.RwkvConfig(vocab_size=48, hidden_size=16, num_hidden_layers=2, attention_hidden_size=16))


@pytest.mark.parametrize(
    ("make", "said"),
    [(lambda: made("esm"), "makes something else of embeddings"), (rwkv, "does not leave masked positions out")],
)
def test_rows_that_cannot_be_each_their_own_are_refused(make: Callable[[], Any], said: str) -> None:
    """transformers' ESM adds no positions to embeddings it is given; a recurrent model takes a mask and does not look at it."""
    model, (ids, mask) = make().eval(), batch(left=False)
    with torch.no_grad():
        adapt.attach(model, make_config("prompt", {"num_virtual_tokens": 4}))
        randomise(model, "default")
        alone = model(input_ids=ids, attention_mask=mask).logits
        with adapt.rows(model, ["default", "default"]):
            torch.testing.assert_close(model(input_ids=ids, attention_mask=mask).logits, alone)
        with adapt.rows(model, ["default", None]), pytest.raises(IngraftError, match=said):
            model(input_ids=ids, attention_mask=mask)
