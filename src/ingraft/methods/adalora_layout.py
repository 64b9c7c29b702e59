"""Where Hugging Face PEFT keeps an AdaLoRA. It holds the ranks that were found as masks over the first ones, by the name of a tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ingraft.errors import IngraftError
from ingraft.methods.contract import MethodConfig, SiteFacts
from ingraft.methods.lowrank import LORA_LAYOUT

_MASK = ".lora_E"


def encode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Masks in place of ranks; a schedule in numbers, which PEFT insists on, where the trainer was to decide."""
    first, tinit, tfinal = fields["init_r"], fields["tinit"] or 0, fields["tfinal"] or 0
    masks = {path + _MASK: [True] * r + [False] * (first - r) for path, r in fields["rank_pattern"].items()}
    total = fields["total_step"] or tinit + tfinal + 1
    return {"rank_pattern": masks or None, "tinit": tinit, "tfinal": tfinal, "total_step": total}


def decode(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Ranks in place of masks; no schedule where `encode` made one up."""
    masks = fields.get("rank_pattern") or {}
    if not isinstance(masks, Mapping) or not all(
        key.endswith(_MASK) and isinstance(mask, list | tuple) and set(mask) <= {True, False}
        for key, mask in masks.items()
    ):
        raise IngraftError(
            f"rank_pattern must hold a mask (a list of true and false) for each name in {_MASK!r}, got {masks!r}."
        )
    made_up = (fields.get("tinit") or 0) + (fields.get("tfinal") or 0) + 1
    total = fields.get("total_step")
    return {
        "rank_pattern": {key.removesuffix(_MASK): sum(mask) for key, mask in masks.items()},
        "total_step": None if total == made_up else total,
    }


def otherwise(_: MethodConfig, facts: SiteFacts) -> str | None:
    """Grouped convolutions, and those with padding of their own."""
    if getattr(facts.module, "groups", 1) > 1:
        return "PEFT's ADALORA gives a grouped convolution the matrix of an ungrouped one"
    if getattr(facts.module, "padding_mode", "zeros") != "zeros":
        return "PEFT's ADALORA pads with zeros"
    return None


ADALORA_LAYOUT = replace(
    LORA_LAYOUT,
    peft_type="ADALORA",
    kinds=frozenset({"linear", "conv1d-transposed", "conv2d"}),
    constants={"use_dora": False},
    off=(*LORA_LAYOUT.off, "alpha_pattern", "lora_bias", "use_rslora"),
    ignored=(*LORA_LAYOUT.ignored, "r", "init_lora_weights"),
    aliases={},
    experts={},
    tensors={name: name for name in ("lora_A", "lora_B", "lora_E")},
    embedding_tensors={},
    shapes={},
    otherwise=otherwise,
    encode=encode,
    decode=decode,
)
