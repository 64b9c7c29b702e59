"""Answers of a chat model, many at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import groupby
from typing import TYPE_CHECKING, Any, cast

import torch

from ingraft.bases.heads import PAIR, way_of_writing
from ingraft.errors import IngraftError
from ingraft.evaluate.loss import Poll, device_of
from ingraft.evaluate.modes import scoring
from ingraft.evaluate.room import room

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 128,
    batch_size: int = 8,
    poll: Poll | None = None,
    done: Callable[[int, str], None] | None = None,
    **sampling: Any,
) -> list[str]:
    """Continue every prompt, greedily unless told otherwise. Returns the new text alone, without special tokens, in the prompts' order.

    Prompts of similar length share a batch and are padded on the left, so that every answer begins where its prompt ends; behind an encoder, which has
    the prompts for itself, on the right, as in training. An answer ends where the base has no further places; prompts that come near to that share a batch only with those that have as much room, so that what is answered
    does not depend on the batch.

    Args:
        prompts: token ids, as `ingraft.data.encode_prompt` gives them.
        max_new_tokens: where an answer is cut.
        poll: called between batches; may raise to stop.
        done: told of every answer as soon as its batch is there: the prompt's position, and the answer.
        sampling: `do_sample=True` with `temperature`, `top_p`, `top_k`, as transformers names them.

    Raises:
        IngraftError: a prompt leaves no place for an answer.
    """
    options = _options(model, tokenizer, sampling)
    answers = [""] * len(prompts)
    for positions, out_BT in _continued(model, prompts, options, max_new_tokens, batch_size, poll):
        texts = tokenizer.batch_decode(out_BT, skip_special_tokens=True)
        for position, text in zip(positions, texts, strict=True):
            answers[position] = text.strip()
            if done is not None:
                done(position, answers[position])
    return answers


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int,
    poll: Poll | None = None,
    **sampling: Any,
) -> list[list[int]]:
    """As `generate`, but the tokens: an end token is the last of an answer that has one."""
    options, ending = _options(model, tokenizer, sampling), end_tokens(model, tokenizer)
    answers: list[list[int]] = [[] for _ in prompts]
    for positions, out_BT in _continued(model, prompts, options, max_new_tokens, batch_size, poll):
        for position, row in zip(positions, out_BT.tolist(), strict=True):
            stop = next((i + 1 for i, token in enumerate(row) if token in ending), len(row))
            answers[position] = row[:stop]
    return answers


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end an answer."""
    ends = _options(model, tokenizer, {}).eos_token_id
    return set(cast("list[int]", ends) if isinstance(ends, list) else [ends])


def _options(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: dict[str, Any]) -> Any:
    """transformers' settings: greedy unless told otherwise. A model's own file may ask for sampling; greedy means greedy."""
    options = deepcopy(model.generation_config)
    assert options is not None
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
    options.update(**{**plain, **sampling}, pad_token_id=fill or 0, eos_token_id=stop)
    return options


def _continued(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    options: Any,
    max_new_tokens: int,
    batch_size: int,
    poll: Poll | None,
) -> Iterator[tuple[list[int], torch.Tensor]]:
    """Batch by batch the prompts' positions and the new tokens (B, T), padded behind their ends.

    Raises:
        IngraftError: a prompt leaves no place for an answer.
    """
    most, device, fill = room(model), device_of(model), options.pad_token_id
    pair = way_of_writing(model.config) == PAIR
    if not pair and (full := [str(i + 1) for i, prompt in enumerate(prompts) if len(prompt) >= most]):
        raise IngraftError(
            f"prompt {', '.join(full[:10])}: no room is left for an answer: the base has places for {most} tokens. Shorten the prompt."
        )
    with scoring(model):
        lengths = [len(prompt) for prompt in prompts]
        rooms = [most - 1 if pair else most - length for length in lengths]
        for limit, positions in _batches(lengths, rooms, max_new_tokens, batch_size):
            if poll is not None:
                poll()
            options.max_new_tokens = limit
            longest = max(lengths[i] for i in positions)
            order = slice(None) if pair else slice(None, None, -1)  # which end of a row is filled up
            rows = [[*prompts[i][order], *[fill] * (longest - lengths[i])][order] for i in positions]
            masks = [[*[1] * lengths[i], *[0] * (longest - lengths[i])][order] for i in positions]
            ids_BT, mask_BT = torch.tensor(rows, device=device), torch.tensor(masks, device=device)
            out_BT = cast(Any, model).generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=options)
            yield positions, out_BT[:, 0 if pair else longest :]


def _batches(lengths: Sequence[int], rooms: Sequence[int], wanted: int, size: int) -> Iterator[tuple[int, list[int]]]:
    """Positions of prompts, longest first, in batches whose answers may have equally many tokens, with that number."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))  # rooms grow as prompts get shorter
    for limit, group in groupby(order, lambda i: min(wanted, rooms[i])):
        members = list(group)
        for start in range(0, len(members), size):
            yield limit, members[start : start + size]
