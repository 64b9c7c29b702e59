"""Virtual tokens in rows of different numbers of them, and in compiled code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import ingraft.adapt as adapt
from ingraft.errors import IngraftError
from ingraft.methods.prompt import PromptTuningConfig
from ingraft.testing.cases import close, randomise, run
from ingraft.testing.subjects import POOLED, SUBJECTS, redrawn

LENGTHS = {"short": 2, "long": 5}
ROWS: list[list[Any]] = [["long", None], ["short", "long"], [None, "short"], [("short", "long"), "short"]]


def adapted(model: nn.Module) -> Any:
    for name, length in LENGTHS.items():
        adapt.attach(model, PromptTuningConfig(num_virtual_tokens=length), name, seed=1)
        randomise(model, name)
    return model


def roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        num_labels=3,
    )
    return redrawn(RobertaForSequenceClassification(config))


def bert_model() -> nn.Module:
    from transformers import BertConfig, BertModel

    config = BertConfig(vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return redrawn(BertModel(config))


def bart() -> nn.Module:
    """Its positions are counted by column, and nobody can tell it others."""
    from transformers import BartConfig, BartForSequenceClassification

    config = BartConfig(
        vocab_size=48,
        d_model=16,
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        eos_token_id=2,
        num_labels=3,
    )
    return redrawn(BartForSequenceClassification(config))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": POOLED.make_redrawn,
    "bert-model": bert_model,
    "roberta": roberta,
    "bart": bart,
    **{name: SUBJECTS[name].make_redrawn for name in ("t5", "llama")},
}


def outputs(model: Any, name: str, *, masked: bool, row: slice = slice(None)) -> list[torch.Tensor]:
    batch = SUBJECTS["t5" if name == "t5" else "bert"].batch(2)
    if name == "bart":
        batch["input_ids"][:, 4] = 2  # the token it classifies by
    if not masked:
        del batch["attention_mask"]
    with torch.no_grad():
        found = model(**{key: value[row] for key, value in batch.items()})
    return [found.pooler_output, found.last_hidden_state] if "pooler_output" in found else [found.logits]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_what_it_is_alone_whatever_the_others_carry(name: str, masked: bool) -> None:
    """Prompts of different lengths, or none, in one batch: whatever the model reads of a row is what it reads of the row alone."""
    model = adapted(MODELS[name]())
    for entries in ROWS:
        with adapt.rows(model, entries):
            mixed = outputs(model, name, masked=masked)
        for index, entry in enumerate(entries):
            adapt.activate(model, *(entry if isinstance(entry, tuple) else () if entry is None else (entry,)))
            alone = outputs(model, name, masked=masked, row=slice(index, index + 1))
            for one, other in zip(mixed, alone, strict=True):
                close(one[index : index + 1], other, f"row {index} of {entries}, in the batch and alone")


def test_rows_that_a_cache_cannot_continue_are_refused() -> None:
    """Bloom without a head is not known to be causal: its rows are filled up at their ends, behind which no cache can go on."""
    from transformers import BloomConfig, BloomModel

    model = adapted(redrawn(BloomModel(BloomConfig(vocab_size=48, hidden_size=16, n_layer=2, n_head=4))))
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with adapt.rows(model, ["short", "long"]), torch.no_grad():
        found = model(ids, use_cache=True)
        with pytest.raises(IngraftError, match="cannot be continued from a cache"):
            model(ids[:, :1], past_key_values=found.past_key_values)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("entries", [None, ["short", "short"], ["short", "long"]])
def test_prompts_compile_to_a_full_graph_without_a_mask(name: str, entries: list[Any] | None) -> None:
    """Whether rows carry equally many virtual tokens is known before any tensor is: no mask, no question to the data."""
    model = adapted(SUBJECTS[name].make_redrawn())
    ids = {"input_ids": SUBJECTS[name].batch(2)["input_ids"].clamp(min=3)}
    torch.compiler.reset()
    if entries is None:
        expected, found = run(model, ids), run(torch.compile(model, backend="eager", fullgraph=True), ids)  # type: ignore[arg-type]
    else:
        with adapt.rows(model, entries):
            expected, found = run(model, ids), run(torch.compile(model, backend="eager", fullgraph=True), ids)  # type: ignore[arg-type]
    close(found, expected, "compiled and not")
