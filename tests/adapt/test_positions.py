"""Where virtual tokens stand: in front, before the answer, on both sides; held to sequences put together by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import ingraft
from ingraft import adapt
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config

P = 3
PROMPTS = (4, 2, 3)
"""Tokens of each row's prompt; the rest of its 7 tokens (5 in the second row) are the answer."""


def rows(*, left: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask, and which tokens are the prompt."""
    ids = torch.randint(2, 64, (3, 7), generator=torch.Generator().manual_seed(3))
    mask, prompt = torch.ones_like(ids), torch.zeros_like(ids)
    for row, length in enumerate(PROMPTS):
        prompt[row, :length] = 1
    mask[1, 5:] = 0
    if left:
        ids[1], mask[1], prompt[1] = (x[1].roll(2) for x in (ids, mask, prompt))
    return ids, mask, prompt


def adapted(tiny: SimpleNamespace, position: str, kind: str = "llama", method: str = "prompt") -> Any:
    model = tiny.make(kind)
    ingraft.attach(model, make_config(method, {"num_virtual_tokens": P, "position": position}), seed=1)
    tiny.perturb(ingraft.parameters(model, "default").values())
    return model


def by_hand(model: Any, ids_T: Tensor, end: int, position: str) -> Tensor:
    """Logits (T, V) of one row without padding: the base over embeddings in the order meant."""
    virtual_PD = ingraft.parameters(model, "default")[next(iter(ingraft.parameters(model, "default")))]
    front = {"front": P, "split": P - P // 2, "answer": 0}[position]
    with torch.no_grad(), adapt.disabled(model):
        real_TD = model.get_input_embeddings()(ids_T)
        whole = torch.cat([virtual_PD[:front], real_TD[:end], virtual_PD[front:], real_TD[end:]])
        logits = model(inputs_embeds=whole[None]).logits[0]
    at = [front + t if t < end else P + t for t in range(len(ids_T))]
    if front < P and end:
        at[end - 1] = P + end - 1  # the answer is predicted from the last virtual token
    return logits[at]


@pytest.mark.parametrize("position", ["front", "split", "answer"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_each_row_is_its_own_sequence(position: str, kind: str, tiny: SimpleNamespace) -> None:
    model = adapted(tiny, position, kind)
    ids, mask, prompt = rows()
    labels = ids.masked_fill((prompt == 1) | (mask == 0), -100)
    with torch.no_grad():
        with adapt.context(model, prompt=prompt):
            told = model(input_ids=ids, attention_mask=mask).logits
        from_labels = model(input_ids=ids, attention_mask=mask, labels=labels).logits
    assert torch.equal(from_labels, told)
    for row, end in enumerate(PROMPTS):
        real = int(mask[row].sum())
        expected = by_hand(model, ids[row, :real], end, position)
        assert torch.allclose(told[row, :real], expected, atol=1e-5)


def test_left_padding_and_caches_give_the_text_of_whole_passes(tiny: SimpleNamespace) -> None:
    for position in ("split", "answer"):
        model = adapted(tiny, position)
        ids, mask, _ = rows(left=True)
        options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        text = model.generate(input_ids=ids, attention_mask=mask, **options)[:, 7:]
        for how in ({"use_cache": False}, {"cache_implementation": "static"}):
            assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, **options, **how)[:, 7:], text)
        for row in range(3):
            own = ids[row][mask[row] == 1]
            end = len(own)
            for step in range(5):
                logits = by_hand(model, own, end, position)
                assert int(logits[-1].argmax()) == int(text[row, step])
                own = torch.cat([own, text[row, step : step + 1]])


def test_a_prompt_tells_where_it_ends_and_the_answer_learns_from_it(tiny: SimpleNamespace) -> None:
    """The first token of the answer sees every virtual token: its loss alone moves them all."""
    model = adapted(tiny, "answer")
    ids, mask, prompt = rows()
    labels = torch.full_like(ids, -100)
    for row, end in enumerate(PROMPTS):
        labels[row, end] = ids[row, end]
    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    (parameter,) = ingraft.parameters(model, "default").values()
    assert parameter.grad is not None
    assert (parameter.grad.abs().amax(1) > 0).all()
    with adapt.context(model, prompt=prompt), torch.no_grad():
        told = model(input_ids=ids, attention_mask=mask).logits
        assert torch.equal(told, model(input_ids=ids, attention_mask=mask, labels=labels).logits)


def test_the_second_text_of_a_pair_is_no_part_of_the_prompt(tiny: SimpleNamespace) -> None:
    """An encoder with two texts: the second half stands between them, the first in front; with one text it stands at its end."""
    model = adapted(tiny, "split", "bert")
    ids, mask, prompt = rows()
    (virtual_PD,) = (p.detach() for p in ingraft.parameters(model, "default").values())
    for types, ends in ((1 - prompt, PROMPTS), (torch.zeros_like(ids), (7, 5, 7))):
        with torch.no_grad():
            found = model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits
            for row, end in enumerate(ends):
                real = int(mask[row].sum())
                embedded = model.get_input_embeddings()(ids[row, :real])
                whole = torch.cat([virtual_PD[:2], embedded[:end], virtual_PD[2:], embedded[end:]])
                kinds = torch.cat([torch.zeros(2), types[row, :end], torch.zeros(1), types[row, end:real]]).long()
                with adapt.disabled(model):
                    expected = model(inputs_embeds=whole[None], token_type_ids=kinds[None]).logits
                assert torch.allclose(found[row], expected[0], atol=1e-5)


def test_an_encoders_input_ends_in_the_prompt(tiny: SimpleNamespace) -> None:
    model = adapted(tiny, "answer", "mt5")
    ids, mask, _ = rows()
    decoder = torch.randint(2, 64, (3, 4), generator=torch.Generator().manual_seed(5))
    (virtual_PD,) = (p.detach() for p in ingraft.parameters(model, "default").values())
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder).logits
        for row in range(3):
            real = int(mask[row].sum())
            whole = torch.cat([model.get_input_embeddings()(ids[row, :real]), virtual_PD])
            with adapt.disabled(model):
                expected = model(inputs_embeds=whole[None], decoder_input_ids=decoder[row : row + 1]).logits
            assert torch.allclose(found[row], expected[0], atol=1e-5)


def test_positions_mix_in_one_batch(tiny: SimpleNamespace) -> None:
    model = adapted(tiny, "answer")
    for name, position, length in (("front", "front", 2), ("split", "split", 4)):
        config = make_config("prompt", {"num_virtual_tokens": length, "position": position})
        ingraft.attach(model, config, name, seed=2)
        tiny.perturb(ingraft.parameters(model, name).values())
    ids, mask, prompt = rows()
    acting = ["default", "split", ("front", "default")]
    with adapt.context(model, prompt=prompt), torch.no_grad(), adapt.rows(model, acting):
        mixed = model(input_ids=ids, attention_mask=mask).logits
    for row, names in enumerate(acting):
        ingraft.activate(model, *((names,) if isinstance(names, str) else names))
        own = slice(row, row + 1)
        with adapt.context(model, prompt=prompt[own]), torch.no_grad():
            alone = model(input_ids=ids[own], attention_mask=mask[own]).logits
        real = int(mask[row].sum())
        assert torch.allclose(mixed[row, :real], alone[0, :real], atol=1e-5)


def test_what_no_one_can_know_is_refused(tiny: SimpleNamespace) -> None:
    model = adapted(tiny, "answer")
    ids, mask, prompt = rows()
    with torch.no_grad():
        first = model(input_ids=ids, attention_mask=mask, use_cache=True)
        step = {"input_ids": ids[:, :1], "attention_mask": torch.cat([mask, mask[:, :1]], 1)}
        with pytest.raises(IngraftError, match="where the prompt ends"):
            model(**step, past_key_values=first.past_key_values)
        with adapt.context(model, prompt=prompt):
            first = model(input_ids=ids, attention_mask=mask, use_cache=True)
            told = model(**step, past_key_values=first.past_key_values).logits
            whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1), attention_mask=step["attention_mask"]).logits
    # The second row is padded in the middle, so that its positions differ; the others are whole.
    assert torch.allclose(told[::2, 0], whole[::2, -1], atol=1e-5)
    with pytest.raises(IngraftError, match="position must be one of"):
        make_config("prompt", {"position": "behind"})


def test_a_file_keeps_the_position_under_a_name_of_ours(tmp_path: Any, tiny: SimpleNamespace) -> None:
    for method in ("prompt", "p-tuning"):
        model = adapted(tiny, "split", method=method)
        ingraft.save(model, tmp_path / method)
        again = tiny.make("llama")
        ingraft.load(again, tmp_path / method)
        ids, mask, _ = rows()
        batch = {"input_ids": ids, "attention_mask": mask}
        assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))
        assert '"INGRAFT_' in (tmp_path / method / "adapter_config.json").read_text()
