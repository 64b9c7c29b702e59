"""Prefix tuning: learned keys and values ahead of the real ones in every attention.

    softmax(q [K_p; K]') [V_p; V]

Paper: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", ACL 2021 (arXiv:2101.00190), equation 3.
Read against: Hugging Face PEFT's `prefix_tuning` (positions: real tokens stand at P, P+1, ...).
What differs: no use of the KV cache; the prefix starts near zero, so that it first only draws some attention away and adds nothing; the
re-parametrisation by an MLP (`prefix_projection`) can be trained on after loading.

Legend: P prefix length, H key-value heads, D head width, S sites, E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import AttentionPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts, fresh


@dataclass(frozen=True, kw_only=True)
class PrefixTuningConfig(MethodConfig):
    """Prefix tuning's hyperparameters.

    Attributes:
        num_virtual_tokens: P, at least 1.
        prefix_projection: draw the prefix from an embedding through a two-layer MLP that all layers share (the paper's
            re-parametrisation), rather than train it directly.
        encoder_hidden_size: width of that MLP; None takes the model's width.
        init_std: deviation of the initial keys and values.
    """

    method: ClassVar[str] = "prefix"

    num_virtual_tokens: int = 20
    prefix_projection: bool = False
    encoder_hidden_size: int | None = None
    init_std: float = 0.02

    def problems(self) -> list[str]:
        found = (
            []
            if self.num_virtual_tokens >= 1
            else [f"num_virtual_tokens must be at least 1, got {self.num_virtual_tokens}."]
        )
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            found.append("encoder_hidden_size has a meaning only with prefix_projection=true.")
        if self.encoder_hidden_size is not None and self.encoder_hidden_size < 1:
            found.append(f"encoder_hidden_size must be at least 1, got {self.encoder_hidden_size}.")
        return found


class Prefix(AttentionPart):
    """See the file's header."""

    def __init__(self, config: PrefixTuningConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.num_virtual_tokens
        self.path = facts.path
        if not config.prefix_projection:
            self.key, self.value = drawn(facts, self.length, config.init_std)

    def keys_values(self, shared: Any, rows: RowsAtHand) -> tuple[Tensor, Tensor]:
        del rows
        if shared is not None:
            key_value = shared[self.path]
            return key_value[0], key_value[1]
        return self.key, self.value


def drawn(facts: SiteFacts, length: int, std: float) -> tuple[nn.Parameter, nn.Parameter]:
    """One site's keys and values (H, P, D), to be trained as they are."""
    like = next(iter(facts.module.parameters()), None)
    key, value = (fresh(facts.heads, length, facts.head_width, like=like) for _ in range(2))
    nn.init.normal_(key, std=std)
    nn.init.normal_(value, std=std)
    return key, value


class Encoder(nn.Module):
    """The MLP of `prefix_projection`: one embedding, every site's keys and values."""

    def __init__(self, config: PrefixTuningConfig, sites: tuple[SiteFacts, ...]) -> None:
        super().__init__()
        width = sites[0].width
        hidden = config.encoder_hidden_size or width
        self.shapes = {site.path: (2, site.heads, site.head_width) for site in sites}
        total = sum(2 * site.heads * site.head_width for site in sites)
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        self.inner = nn.Linear(width, hidden)
        self.outer = nn.Linear(hidden, total)

    def forward(self) -> dict[str, Tensor]:
        """Keys and values (2, H, P, D) by site."""
        all_PX = self.outer(torch.tanh(self.inner(self.embedding)))
        sizes = [two * heads * width for two, heads, width in self.shapes.values()]
        pieces = all_PX.split(sizes, dim=1)
        return {
            path: piece.reshape(-1, *shape).permute(1, 2, 0, 3)
            for (path, shape), piece in zip(self.shapes.items(), pieces, strict=True)
        }


def shared(config: PrefixTuningConfig, sites: tuple[SiteFacts, ...]) -> nn.Module | None:
    """The encoder, where there is one."""
    return Encoder(config, sites) if config.prefix_projection else None


def count(config: PrefixTuningConfig, facts: SiteFacts) -> int:
    """Keys and values of one site (the encoder's parameters are counted by `shared`)."""
    return 0 if config.prefix_projection else 2 * config.num_virtual_tokens * facts.heads * facts.head_width


METHOD = Method(
    name="prefix",
    config=PrefixTuningConfig,
    part=Prefix,
    sites=("attention",),
    identity_at_init=False,
    count=count,
    shared=shared,
    peft=PeftLayout(
        peft_type="PREFIX_TUNING",
        fields={"init_std": None},
        accepted={"num_transformer_submodules": (None, 1)},
        written={"num_transformer_submodules": 1},
        ignored=("token_dim", "num_attention_heads", "num_layers", "init_weights"),
        unshared={"prefix_projection": False, "encoder_hidden_size": None},
        tensors={"key": "key", "value": "value"},
        stacked="prompt_embeddings",
    ),
)
