"""Examples as tensors: tokens padded on the right, and what rows give beside them, made now. The one module of `data` that needs torch.

Right padding: positions then count from the first real token without position ids, and under a causal mask no real
token ever sees padding. Shapes: B rows, T positions of the longest row (rounded up to `multiple`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ingraft.data.examples import IGNORED, Example
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader


def pad_id(tokenizer: Reader) -> int:
    """The id to pad with: the tokenizer's pad token, else its end token, else 0. Padding is masked, so the choice
    is never seen.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(found) for found in candidates if isinstance(found, int)), 0)


def collate(examples: Sequence[Example], pad_id: int, *, multiple: int = 1) -> dict[str, Tensor]:
    """The batch a model is called with.

    Args:
        examples: rows of one kind, all with token labels or all with a class; a row of several sequences takes as many rows of the batch.
        pad_id: what to fill the tail of short rows with.
        multiple: round T up to a multiple of this; fixed shapes suit compiled graphs and tensor cores.

    Returns:
        `input_ids` and `attention_mask` (B, T) int64; `labels` (B, T) with -100 where nothing is learned, (B, S + 1) what a decoder writes,
        (B,) classes, (B, K) float32 numbers or (B, 2) first and last token of the answer; `token_type_ids` (B, T) where the rows have them. What is made now
        (`Example.lazy`) has its own names and B in front; where it is all there is, nothing else but the labels is. Position t
        of a model that writes predicts the label at t + 1: what a decoder writes has a -100 in front, and `decoder_attention_mask` (B, S).

    Raises:
        IngraftError: no rows, rows of several kinds, or what is made now cannot be, or is not of one size.
    """
    if not examples:
        raise IngraftError("An empty batch has no tensors.")
    examples = [sequence for example in examples for sequence in example.sequences]
    if len({example.kind for example in examples}) > 1:
        raise IngraftError("A batch must hold rows of one kind: all with token labels, or all with a class.")
    longest = max(len(example.input_ids) for example in examples)
    width = -(-longest // multiple) * multiple

    def pad(row: Sequence[int], filler: int, width: int = width) -> list[int]:
        return [*row, *[filler] * (width - len(row))]

    batch = _made(examples)
    if longest or not batch:
        batch["input_ids"] = torch.tensor([pad(e.input_ids, pad_id) for e in examples])
        batch["attention_mask"] = torch.tensor([pad([1] * len(e.input_ids), 0) for e in examples])
    if examples[0].labels is not None:
        batch["labels"] = torch.tensor([pad(e.labels or [], IGNORED) for e in examples])
    elif examples[0].target is not None:
        targets = [example.target or [] for example in examples]
        written = -(-max(map(len, targets)) // multiple) * multiple
        batch["labels"] = torch.tensor([[IGNORED, *pad(target, IGNORED, written)] for target in targets])
        batch["decoder_attention_mask"] = (batch["labels"][:, 1:] != IGNORED).long()
    elif examples[0].label is not None:
        batch["labels"] = torch.tensor([e.label for e in examples])
    elif examples[0].values is not None:
        batch["labels"] = torch.tensor([e.values for e in examples], dtype=torch.float32)
    elif examples[0].span is not None:
        batch["labels"] = torch.tensor([e.span for e in examples])
    if examples[0].token_type_ids is not None:
        batch["token_type_ids"] = torch.tensor([pad(e.token_type_ids or [], 0) for e in examples])
    return batch


def _made(examples: Sequence[Example]) -> dict[str, Tensor]:
    """What the rows give beside tokens."""
    rows = [example.lazy.arrays() for example in examples if example.lazy is not None]
    batch: dict[str, Tensor] = {}
    for name in rows[0] if rows else ():
        arrays = [row[name] for row in rows]
        if len(shapes := {array.shape for array in arrays}) > 1:
            sizes = " and ".join(" x ".join(map(str, shape)) for shape in sorted(shapes))
            raise IngraftError(
                f"{name} of one batch are of several sizes ({sizes}): the base's processor must bring all of them to one. Set its size and crop, or give rows of one size."
            )
        batch[name] = torch.from_numpy(np.stack(arrays))
    return batch


def row_ids(examples: Sequence[Example]) -> Tensor:
    """The rows' numbers, shape (B,), for dropout that depends on the row and not on its place in the batch.

    Sequences of one row have one number, so that what they begin with alike (the prompt) stays alike: their difference is the answers'.
    """
    return torch.tensor([sequence.row_id for example in examples for sequence in example.sequences])
