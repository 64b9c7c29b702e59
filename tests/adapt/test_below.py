"""What lies below the lowest adapted block: where it is known to be all that a row needs, and where not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingraft import adapt
from ingraft.adapt.below import Below, below
from ingraft.errors import IngraftError
from ingraft.evaluate.modes import unnoticed
from ingraft.methods import registry


def found_in(model: nn.Module, **options: Any) -> Below:
    """`below` for a LoRA in this model."""
    adapt.attach(model, registry.make_config("lora", options), seed=0)
    ids = torch.tensor([[4, 5, 6, 7, 8, 9, 10, 11], [5, 7, 9, 11, 3, 3, 3, 3]])
    mask = torch.tensor([[1] * 8, [1] * 4 + [0] * 4])
    with unnoticed(model):
        return below(model, {"input_ids": ids, "attention_mask": mask})


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "vocab_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**size, num_attention_heads=4, pad_token_id=3)).eval()


UPPER = {"layers_to_transform": [2, 3]}


def test_what_goes_from_block_to_block_is_tried() -> None:
    """A block that reads what a lower one left behind, also one that says NaN without it, and one whose rows look at each other."""
    model = llama()
    assert len(found_in(model, **UPPER).blocks) == 2
    layers = model.model.layers
    left: list[Tensor] = []

    def leave(module: Any, args: Any, output: Tensor) -> None:
        left[:] = [output]

    def join(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + left[0].mean()

    attention = layers[0].self_attn.o_proj
    handles = [attention.register_forward_hook(leave), layers[3].mlp.register_forward_hook(join)]
    adapt.detach(model, "default")
    with pytest.raises(IngraftError, match="LlamaForCausalLM says other things"):
        found_in(model, **UPPER)
    for handle in handles:
        handle.remove()

    def join_or_fail(module: Any, args: Any, output: Tensor) -> Tensor:
        return output + left.pop().mean() if left else output * float("nan")

    handles = [attention.register_forward_hook(leave), layers[3].mlp.register_forward_hook(join_or_fail)]
    adapt.detach(model, "default")
    with pytest.raises(IngraftError, match=r"says other things .*by nan"):
        found_in(model, **UPPER)
    for handle in handles:
        handle.remove()
    handles = [layers[3].mlp.register_forward_hook(lambda *_: left.pop()), attention.register_forward_hook(leave)]
    adapt.detach(model, "default")
    with pytest.raises(IngraftError, match=r"does not run on what its lower blocks made \(IndexError\)"):
        found_in(model, **UPPER)
    for handle in handles:
        handle.remove()
    adapt.detach(model, "default")
    handle = layers[1].mlp.register_forward_hook(lambda module, args, output: output + output.mean(0, keepdim=True))
    with pytest.raises(IngraftError, match="says other things"):
        found_in(model, **UPPER)
    handle.remove()


def test_a_block_that_is_called_several_times() -> None:
    from transformers import AlbertConfig, AlbertForSequenceClassification

    size: dict[str, Any] = {"vocab_size": 16, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    model = AlbertForSequenceClassification(
        AlbertConfig(**size, num_attention_heads=4, embedding_size=16, pad_token_id=3)
    ).eval()
    with pytest.raises(IngraftError, match="says other things"):
        found_in(model, target_modules=["classifier"], r=2)


def test_encoder_decoders_and_several_stacks() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=4))
    with pytest.raises(IngraftError, match="T5ForConditionalGeneration is an encoder-decoder"):
        found_in(model.eval())


def test_a_block_that_returns_more_than_states() -> None:
    """T5's encoder hands the bias of its first block on."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=4, d_ff=16, num_layers=3, num_heads=4)).eval()
    with pytest.raises(IngraftError, match="return more than one state a token"):
        found_in(model, layers_to_transform=[2])


def test_the_bases_own_dropout() -> None:
    """Blocks in training mode are refused; one that only recomputes itself is not."""
    model = llama()
    found = found_in(model, **UPPER)
    x_BTD = torch.zeros(2, 8, 32)
    found.blocks[1].self_attn.train()
    with pytest.raises(IngraftError, match=r"training mode \(LlamaAttention\)"), found.given(x_BTD):
        pytest.fail("given")
    model.eval()
    found.blocks[1].training = True
    with pytest.raises(IngraftError, match=r"training mode \(LlamaDecoderLayer\)"), found.given(x_BTD):
        pytest.fail("given")
    found.blocks[1].gradient_checkpointing = True  # type: ignore[assignment]
    with found.given(x_BTD):
        pass


def test_the_blocks_are_theirs_again() -> None:
    """Behind the scope, also through an error; a forward that was on the instance before is there again."""
    model = llama()
    found = found_in(model, **UPPER)
    batch = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    wanted = model(**batch).logits
    own = found.blocks[0].forward
    found.blocks[0].__dict__["forward"] = own
    with pytest.raises(ZeroDivisionError), found.given(torch.zeros(1, 4, 32)):
        assert not torch.equal(model(**batch).logits, wanted)
        raise ZeroDivisionError
    assert found.blocks[0].__dict__["forward"] is own
    assert "forward" not in found.blocks[1].__dict__
    assert torch.equal(model(**batch).logits, wanted)
