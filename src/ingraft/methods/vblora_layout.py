"""PEFT's short files of VB-LoRA (`save_only_topk_weights`): of each piece the vectors that are mixed, and their weights but for the last."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ingraft.errors import IngraftError
from ingraft.methods.layout import Tensors

INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


def reread(fields: Mapping[str, Any], tensors: Tensors) -> tuple[Mapping[str, Any], Tensors, str | None]:
    """Logits in place of the weights: their logarithms, and for the vectors that are not mixed a number below all of them, which is finite
    because a file is refused that holds others."""
    bank, whole = tensors.get("base_model.vblora_vector_bank"), dict(tensors)
    short = [key.removesuffix(INDICES) for key in tensors if key.endswith(INDICES)]
    if not fields.get("save_only_topk_weights") or bank is None or not short:
        return fields, tensors, None
    for key in short:
        chosen, weights = whole.pop(key + INDICES), whole.pop(key + WEIGHTS, torch.zeros(()))
        if chosen.shape != (*weights.shape[:-1], weights.shape[-1] + 1 if weights.dim() else 0) or (
            not 0 <= int(chosen.min()) <= int(chosen.max()) < bank.shape[0]
        ):
            raise IngraftError(f"{key}{INDICES} and {key}{WEIGHTS} do not go with each other and the vectors' bank.")
        smallest = torch.finfo(torch.float32).tiny
        weights = torch.cat([weights.float(), 1 - weights.float().sum(-1, keepdim=True)], -1).clamp(min=smallest)
        unchosen = torch.full((*chosen.shape[:-1], bank.shape[0]), 2 * math.log(smallest))
        whole[key] = unchosen.scatter(-1, chosen.long(), weights.log())
    return fields, whole, "it keeps the weights of the vectors that it mixes; trained further, it mixes no others."
