"""Trainable tokens: some rows of the embedding.

    W'[t] = M_t for every chosen token t,    M starts as a float32 copy of these rows

A head that the base ties to the embedding follows: both use the one M. So does its bias, which stays what it is.

Paper: none; the way to teach new tokens without training the whole vocabulary. Read against: Hugging Face PEFT's `trainable_tokens`.
What differs: the layers' own forwards run with the changed rows, so a scaled embedding scales and a tied head keeps its bias (PEFT drops it);
two adapters that train the same token both act, as the sum of what they change.

Legend: N tokens chosen, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import Method, MethodConfig, ParameterPart, PeftLayout, SiteFacts


@dataclass(frozen=True, kw_only=True)
class TrainableTokensConfig(MethodConfig):
    """Which tokens are trained.

    Attributes:
        token_indices: their ids.
        init_weights: start from the embedding's own rows; False starts at random (tests).
    """

    method: ClassVar[str] = "trainable-tokens"

    token_indices: tuple[int, ...] = ()
    init_weights: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_indices", tuple(self.token_indices))
        super().__post_init__()

    def problems(self) -> list[str]:
        found: list[str] = []
        if any(token < 0 for token in self.token_indices):
            found.append(f"token_indices must not be negative, got {min(self.token_indices)}.")
        if repeated := {token for token in self.token_indices if self.token_indices.count(token) > 1}:
            found.append(f"token_indices names {', '.join(map(str, sorted(repeated)))} more than once.")
        return found


class TokenRows(ParameterPart):
    """See the file's header. Its tensor stands for the rows of the parameter whose name it has."""

    rows: Tensor

    def __init__(self, config: TrainableTokensConfig, facts: SiteFacts) -> None:
        super().__init__()
        own = facts.parameters["weight"].detach()
        rows_N = torch.tensor(config.token_indices, dtype=torch.int64, device=own.device)
        self.register_buffer("rows", rows_N, persistent=False)
        start_ND = own[rows_N].float()
        self.weight = nn.Parameter(start_ND if config.init_weights else torch.randn_like(start_ND))

    def values(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        own = parameters["weight"]
        return {"weight": own.index_copy(0, self.rows, self.weight.to(own.dtype))}


def refuses(config: TrainableTokensConfig, facts: SiteFacts) -> str | None:
    """What has no row for every token."""
    if facts.kind not in ("embedding", "linear"):
        return f"trainable-tokens: {facts.path} has no rows that stand for tokens. Name an embedding, or a head."
    if not config.token_indices:
        return "trainable-tokens: token_indices names no token; give the ids of those to train."
    size = facts.parameters["weight"].shape[0]
    beyond = [token for token in config.token_indices if token >= size]
    if not beyond:
        return None
    return f"trainable-tokens: {facts.path} has {size} rows and none for {', '.join(map(str, beyond[:5]))}. Add tokens first (ingraft.add_tokens)."


def count(config: TrainableTokensConfig, facts: SiteFacts) -> int:
    """A row for every token; nothing where the weight is another site's, tied."""
    own = facts.parameters.get("weight")
    return 0 if own is None else len(config.token_indices) * own.shape[1]


def otherwise(_: MethodConfig, facts: SiteFacts) -> str | None:
    """A head that keeps its bias here."""
    return "PEFT leaves the bias of a head out" if facts.kind == "linear" and facts.b is not None else None


METHOD = Method(
    name="trainable-tokens",
    config=TrainableTokensConfig,
    part=TokenRows,
    sites=("tokens",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    follows_ties=True,
    peft=PeftLayout(
        peft_type="TRAINABLE_TOKENS",
        kinds=frozenset({"embedding", "linear"}),
        fields={"modules_to_save": None},
        tensors={"weight": "trainable_tokens_delta"},
        otherwise=otherwise,
    ),
)
