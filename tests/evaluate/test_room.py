"""A base is never asked for a position it has no place for: not by rows, not by answers, not behind virtual tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T

import ingraft
from ingraft.bases import load_tokenizer, places, reserve
from ingraft.bases.places import ENDLESS
from ingraft.errors import IngraftError
from ingraft.evaluate import generate, virtual_tokens
from ingraft.evaluate.room import hold, room
from ingraft.methods.registry import make_config

PLACES = 24
SIZE = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SIZE |= {"max_position_embeddings": PLACES, "pad_token_id": 1}


def gpt2() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": PLACES}
    return T.GPT2LMHeadModel(T.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


LEARNED = {
    "gpt2": gpt2,
    "bert": lambda: T.BertModel(T.BertConfig(**SIZE)),
    "roberta": lambda: T.RobertaModel(T.RobertaConfig(**SIZE)),
    "mpnet": lambda: T.MPNetModel(T.MPNetConfig(**SIZE)),
    "opt": lambda: T.OPTModel(T.OPTConfig(**SIZE, ffn_dim=16, word_embed_proj_dim=16)),
}


@pytest.mark.parametrize("family", LEARNED)
def test_the_number_is_exact(family: str) -> None:
    """So many tokens are read, and one more is not."""
    model = LEARNED[family]().eval()
    most = room(model)
    model(input_ids=torch.full((1, most), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, most + 1), 5))


def test_declared_numbers_hold_without_a_table_and_none_is_no_limit() -> None:
    assert places(T.LlamaConfig(**SIZE)) == PLACES
    assert places(T.T5Config(n_positions=512)) == ENDLESS
    assert places(T.XLNetConfig()) == ENDLESS
    assert places(T.Gemma3Config(text_config={"max_position_embeddings": 48})) == 48


def tokenizer(limit: int | None = None) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {"<unk>": 0, "</s>": 1} | {f"w{i}": i for i in range(2, 32)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    more = {} if limit is None else {"model_max_length": limit}
    return T.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>", **more
    )


@pytest.mark.parametrize(("declared", "held"), [(None, PLACES), (16, 16), (512, PLACES)])
def test_a_tokenizer_declares_no_more_than_its_base_has_places_for(
    declared: int | None, held: int, tmp_path: Path
) -> None:
    gpt2().config.save_pretrained(tmp_path)
    tokenizer(declared).save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).model_max_length == held


@pytest.mark.parametrize("method", ["prompt", "p-tuning", "prefix", "p-tuning-v2"])
def test_virtual_tokens_take_places(method: str, tmp_path: Path) -> None:
    """The recipe knows before the model is there what the model then has; the longest row fits, one token more does not."""
    options = {"num_virtual_tokens": 7}
    model = gpt2()
    ingraft.attach(model, make_config(method, options))
    assert room(model) == PLACES - 7 == PLACES - virtual_tokens(method, options)
    model(input_ids=torch.full((1, room(model)), 5))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, room(model) + 1), 5))
    with ingraft.disabled(model):
        assert room(model) == PLACES
    ingraft.save(model, tmp_path / "saved")
    assert virtual_tokens("lora", {}, tmp_path / "saved") == 7
    before, after = tokenizer(PLACES), tokenizer()
    reserve(before, 7)
    hold(after, model)
    assert before.model_max_length == after.model_max_length == PLACES - 7


def test_virtual_tokens_that_leave_no_row_are_refused() -> None:
    assert virtual_tokens("lora", {}) == 0
    with pytest.raises(IngraftError, match=r"30 virtual tokens leave no room.*24 tokens"):
        reserve(tokenizer(PLACES), 30)


@pytest.mark.parametrize("method", [None, "prompt", "prefix"])
def test_answers_end_with_the_places_and_do_not_depend_on_their_batch(method: str | None) -> None:
    """Every prompt gets what it gets alone: all tokens asked for, or as many as there is room for."""
    model, words = gpt2(), tokenizer()
    if method is not None:
        ingraft.attach(model, make_config(method, {"num_virtual_tokens": 4}))
    most = room(model)
    lengths = (3, most - 1, most - 4, 4, most - 2, most - 4)
    prompts = [[5 + i] * n for i, n in enumerate(lengths)]
    words.eos_token = None  # answers of full length
    told: dict[int, str] = {}
    together = generate(model, words, prompts, max_new_tokens=6, batch_size=4, done=told.__setitem__)
    assert together == [generate(model, words, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert told == dict(enumerate(together))
    taken = [len(words(answer)["input_ids"]) for answer in together]
    assert all(count <= min(6, most - n) for count, n in zip(taken, lengths, strict=True))


def test_a_prompt_without_room_is_refused() -> None:
    with pytest.raises(IngraftError, match="prompt 2: no room is left for an answer"):
        generate(gpt2(), tokenizer(), [[5], [5] * PLACES])
