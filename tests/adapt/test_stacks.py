"""Stacks that are called past the root: the encoder that `generate` runs by itself, and a model without its head.

Each such call is a forward of its own: what all sites share is evaluated once in it, and it is checked like the root's.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig
from ingraft.methods.p_tuning import PTuningConfig
from ingraft.methods.prefix import PrefixTuningConfig
from ingraft.methods.prompt import PromptTuningConfig
from ingraft.testing.cases import close, close_each, loss_of, randomise, run, same, taken
from ingraft.testing.subjects import SUBJECTS, redrawn

CONFIGS: dict[str, MethodConfig] = {
    "prompt": PromptTuningConfig(num_virtual_tokens=3),
    "p-tuning": PTuningConfig(num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=3),
    "prefix-projection": PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=8),
}


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=48,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=2,
        forced_eos_token_id=None,
    )
    return redrawn(BartForConditionalGeneration(config))


MODELS = {"bart": bart, "t5": SUBJECTS["t5"].make_redrawn}


def adapted(model: nn.Module, method: str) -> Any:
    adapt.attach(model, CONFIGS[method], "a", seed=1)
    randomise(model, "a")
    return model


def text(model: Any, **more: Any) -> Tensor:
    ids = SUBJECTS["t5"].batch(2)["input_ids"][:, :5]
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **more)


WRITING = [*(("bart", method) for method in CONFIGS if method != "prefix"), ("t5", "prefix-projection")]
"""What no law tries: another family, and a prefix that comes out of an encoder."""


@pytest.mark.parametrize(("name", "method"), WRITING)
def test_an_encoder_decoder_writes_before_any_forward(name: str, method: str) -> None:
    """Text straight after attach is the text after a forward, and what whole passes say; beams too, and rows of their own adapters."""
    first = {beams: text(adapted(MODELS[name](), method), num_beams=beams) for beams in (1, 2)}
    model, batch = adapted(MODELS[name](), method), SUBJECTS["t5"].batch(2)
    run(model, batch)
    for beams, found in first.items():
        same(text(model, num_beams=beams), found, f"{beams} beams")
    ids = batch["input_ids"][:, :5]
    by_hand = first[1][:, :1]
    for _ in range(3):
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": by_hand}
        logits = run(model, given)[:, -1]
        logits[:, 1] = float("-inf")
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
    same(first[1], by_hand, "text and whole passes")
    fresh = adapted(MODELS[name](), method)
    with adapt.rows(fresh, ["a", None]):
        mixed = text(fresh)
    with adapt.disabled(model):
        base = text(model)
    same(mixed[:1], first[1][:1], "the adapter's row")
    same(mixed[1:], base[1:], "the base's row")


@pytest.mark.parametrize("method", ["p-tuning", "prefix-projection"])
def test_what_sites_share_is_evaluated_once_a_forward(method: str) -> None:
    """Once for the root's forward, and once for each stack called from outside; nothing is left over."""
    model, batch = adapted(MODELS["t5"](), method), SUBJECTS["t5"].batch(2)
    made: list[int] = []
    model._modules["adapter:a:shared"].register_forward_hook(lambda *_: made.append(1))
    run(model, batch)
    assert len(made) == 1
    encoder = model.get_encoder()
    encoded = encoder(batch["input_ids"], attention_mask=batch["attention_mask"])
    assert len(made) == 2
    made.clear()
    handed = {key: value for key, value in batch.items() if key != "input_ids"}
    with torch.no_grad():
        same(model(encoder_outputs=encoded, **handed)[0], run(model, batch), "encoder outputs handed in and made")
    control = require_control(model)
    assert not control.shared and not control.running
    twin = copy.deepcopy(model)
    assert (
        require_control(twin).encoders["a"]
        is twin._modules["adapter:a:shared"]
        is not model._modules["adapter:a:shared"]
    )
    adapt.detach(model)
    assert not control.encoders


@pytest.mark.parametrize("method", CONFIGS)
def test_a_model_is_the_same_without_its_head(method: str) -> None:
    """The inner model called by itself gives the states that the head reads, and the gradients of a checkpointed pass."""
    model, batch = adapted(SUBJECTS["llama"].make_redrawn(), method), SUBJECTS["llama"].batch(2)
    fresh = adapted(SUBJECTS["llama"].make_redrawn(), method)
    close(
        fresh.lm_head(run(fresh.model, batch)),
        run(model, batch),
        "the inner model's states and the whole model's logits",
    )


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("method", CONFIGS)
def test_a_stack_called_past_the_root_may_checkpoint(method: str, reentrant: bool) -> None:
    """The gradients of the inner model, called by itself, are the same with its blocks run again in backward."""
    found: list[dict[str, Tensor]] = []
    for checkpointing in (False, True):
        model, batch = adapted(SUBJECTS["llama"].make_redrawn(), method).train(), SUBJECTS["llama"].batch(2)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        loss_of(model.model(**batch, use_cache=False)[0]).backward()
        found.append(taken(model, "a"))
    close_each(found[1], found[0], "gradients, checkpointed and plain")


def test_a_stack_is_checked_when_it_is_called_past_the_root() -> None:
    """What the encoder passes over is refused in the encoder's own call; the root's, handed its outputs, does not miss the encoder."""
    model = adapted(MODELS["t5"](), "prefix")
    ids = SUBJECTS["t5"].batch(2)["input_ids"]
    layer = model.encoder.block[1].layer[0]
    layer.forward = lambda x, **_: (x, None, None)
    with pytest.raises(IngraftError, match=r"without calling encoder\.block\.1\.layer\.0\.SelfAttention"):
        model.encoder(ids)
    del layer.forward
    model = adapted(MODELS["t5"](), "prompt")
    encoded = model.encoder(ids)
    adapt.activate(model, "a")
    model(None, None, ids, None, encoded)
    assert not require_control(model).unchecked
    model.encoder.forward = lambda *_, **__: encoded
    adapt.activate(model, "a")
    with pytest.raises(IngraftError, match="without calling encoder:"):
        model(input_ids=ids, decoder_input_ids=ids)
