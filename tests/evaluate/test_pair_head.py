"""Encoder-decoders: the loss in pieces is transformers' own, and what is written does not depend on the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    MBartConfig,
    MBartForConditionalGeneration,
    MT5Config,
    MT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

import ingraft
from ingraft import LoraConfig
from ingraft.data import Example, collate
from ingraft.evaluate import generate, score_loss
from ingraft.evaluate.head import PairHead, head_of

T5: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
T5 |= {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "dropout_rate": 0.0}
BART: dict[str, Any] = {"vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "dropout": 0.0}
BART |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
BART |= {"init_std": 0.3}
BART |= {"max_position_embeddings": 24, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 1}
MADE: dict[str, Any] = {
    "t5": lambda: T5ForConditionalGeneration(T5Config(**T5, tie_word_embeddings=True)),
    "mt5": lambda: MT5ForConditionalGeneration(MT5Config(**T5)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**BART)),
    "mbart": lambda: MBartForConditionalGeneration(MBartConfig(**BART)),
    "biased": lambda: BartForConditionalGeneration(BartConfig(**BART)),
}
EXAMPLES = [
    Example(input_ids=[5, 6, 7, 8, 9, 1], target=[10, 11, 1], row_id=0),
    Example(input_ids=[20, 21, 1], target=[30, 31, 32, 33, 34, 35, 1], row_id=1),
    Example(input_ids=[40, 1], target=[1], row_id=2),
]


def made(name: str) -> Any:
    torch.manual_seed(0)
    model = MADE[name]().eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    if name == "biased":
        model.final_logits_bias.normal_()
    return model


def theirs(model: nn.Module, example: Example) -> torch.Tensor:
    """The summed loss of a row by itself, as transformers computes it from labels."""
    ids, labels = torch.tensor([example.input_ids]), torch.tensor([example.target])
    return model(input_ids=ids, labels=labels).loss * labels.numel()


@pytest.mark.parametrize("name", list(MADE))
def test_the_loss_is_transformers_own(name: str) -> None:
    """Row by row and summed, with its gradient, beside longer and shorter rows; in pieces unless the model adds something behind its head."""
    model = made(name)
    ingraft.attach(model, LoraConfig(r=2, init_lora_weights=False))
    head, batch = head_of(model), collate(EXAMPLES, 0)
    assert isinstance(head, PairHead)
    assert head.by_pieces == (name != "biased")
    wanted = [theirs(model, example) for example in EXAMPLES]
    trained = [p for p in model.parameters() if p.requires_grad]
    right = torch.autograd.grad(sum(wanted), trained)  # type: ignore[arg-type]
    found = head.loss(batch)
    torch.testing.assert_close(found, sum(wanted), rtol=1e-5, atol=1e-5)
    for one, other in zip(torch.autograd.grad(found, trained), right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    torch.testing.assert_close(head.by_row(batch), torch.stack(wanted), rtol=1e-5, atol=1e-5)
    scores = score_loss(model, EXAMPLES, 0, batch_size=2)
    assert scores.sums == pytest.approx([x.item() for x in wanted], rel=1e-5)
    assert scores.counts == (3, 7, 1)


class Plain:
    """As much of a tokenizer as writing needs."""

    eos_token_id, pad_token_id = 63, 0  # nothing ends before its time

    def batch_decode(self, rows: Any, skip_special_tokens: bool) -> list[str]:
        return [" ".join(str(int(token)) for token in row[1:]) for row in rows]  # behind the token that begins


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_what_is_written_does_not_depend_on_the_batch(name: str) -> None:
    """BART counts positions from the left of what it reads, so padding there would be read otherwise."""
    model, questions = made(name), [example.input_ids for example in EXAMPLES]
    said = generate(model, Plain(), questions, max_new_tokens=6, batch_size=3)  # type: ignore[arg-type]
    alone = [generate(model, Plain(), [one], max_new_tokens=6)[0] for one in questions]  # type: ignore[arg-type]
    assert said == alone
    assert len(set(said)) == 3
    start = model.config.decoder_start_token_id
    ids = torch.tensor([questions[0]])
    first = model(input_ids=ids, decoder_input_ids=torch.tensor([[start]])).logits[0, -1].argmax()
    assert said[0].split()[0] == str(int(first)), "the first token written is there, and not taken for the question's"


def test_an_answer_has_the_decoders_places() -> None:
    """A question that fills the encoder takes nothing from the answer."""
    model = made("bart")
    long = [5 + i % 50 for i in range(23)] + [1]
    assert len(generate(model, Plain(), [long], max_new_tokens=99)[0].split()) <= 23  # type: ignore[arg-type]
