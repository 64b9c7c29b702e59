"""Answers of a chat model, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

import torch

from ingraft.evaluate.loss import Poll, device_of
from ingraft.evaluate.modes import scoring

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    poll: Poll | None = None,
    **sampling: Any,
) -> list[str]:
    """Continue every prompt, greedily unless told otherwise. Returns the new text alone, without special tokens, in the prompts' order.

    Prompts of similar length share a batch and are padded on the left, so that every answer begins where its prompt ends.

    Args:
        prompts: token ids, as `ingraft.data.encode_prompt` gives them.
        max_new_tokens: where an answer is cut.
        poll: called between batches; may raise to stop.
        sampling: `do_sample=True` with `temperature`, `top_p`, `top_k`, as transformers names them.
    """
    options = deepcopy(model.generation_config)
    assert options is not None
    # A model's own file may ask for sampling; greedy means greedy.
    plain: dict[str, Any] = {
        "do_sample": False,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 50,
        "num_beams": 1,
        "max_length": None,
    }
    stop = options.eos_token_id if options.eos_token_id is not None else tokenizer.eos_token_id
    fill = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    options.update(**{**plain, **sampling}, max_new_tokens=max_new_tokens, pad_token_id=fill or 0, eos_token_id=stop)
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    device = device_of(model)
    with scoring(model):
        for start in range(0, len(order), batch_size):
            if poll is not None:
                poll()
            positions = order[start : start + batch_size]
            longest = max(len(prompts[i]) for i in positions)
            lead = [longest - len(prompts[i]) for i in positions]
            ids_BT = torch.tensor(
                [[fill or 0] * n + list(prompts[i]) for n, i in zip(lead, positions, strict=True)], device=device
            )
            mask_BT = torch.tensor([[0] * n + [1] * (longest - n) for n in lead], device=device)
            out_BT = cast(Any, model).generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=options)
            texts = tokenizer.batch_decode(out_BT[:, longest:], skip_special_tokens=True)
            for position, text in zip(positions, texts, strict=True):
                answers[position] = text.strip()
    return answers
