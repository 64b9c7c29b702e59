"""P-tuning: prompt tuning whose virtual embeddings come out of a small trained encoder.

    x' = [f(e_1 ... e_P); x]        f = MLP(e), or MLP(BiLSTM(e))

Paper: Liu et al., "GPT Understands, Too", 2021 (arXiv:2103.10385), section 3.
Read against: Hugging Face PEFT's `p_tuning` (layer counts and sizes of both encoders).
What differs: the encoder is saved with the adapter, which can therefore be trained on after loading (PEFT's file holds the encoder's output
alone; one that comes from there is trained as that output). No dropout between the layers of the LSTM.

Legend: P virtual tokens, D width, E encoder width.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ingraft.methods.contract import InputPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts, fresh
from ingraft.methods.prompt import behind, position_problems

ENCODERS = ("MLP", "LSTM")


@dataclass(frozen=True, kw_only=True)
class PTuningConfig(MethodConfig):
    """P-tuning's hyperparameters.

    Attributes:
        num_virtual_tokens: P, at least 1.
        encoder_reparameterization_type: "MLP", "LSTM", or None: no encoder, the virtual embeddings are trained as they are (what a file
            without its encoder is read as).
        encoder_hidden_size: E; None takes the model's width.
        encoder_num_layers: layers of the LSTM (the MLP always has three).
        position: "front", "split" or "answer", as in `prompt`; "split" is the paper's template.
    """

    method: ClassVar[str] = "p-tuning"

    num_virtual_tokens: int = 20
    encoder_reparameterization_type: str | None = "MLP"
    encoder_hidden_size: int | None = None
    encoder_num_layers: int = 2
    position: str = "front"

    def problems(self) -> list[str]:
        sizes = {"num_virtual_tokens": self.num_virtual_tokens, "encoder_num_layers": self.encoder_num_layers}
        if self.encoder_hidden_size is not None:
            sizes["encoder_hidden_size"] = self.encoder_hidden_size
        found = [f"{name} must be at least 1, got {value}." for name, value in sizes.items() if value < 1]
        if self.encoder_reparameterization_type not in (*ENCODERS, None):
            found.append(
                f"encoder_reparameterization_type must be {', '.join(ENCODERS)} or null, got {self.encoder_reparameterization_type!r}."
            )
        return found + position_problems(self.position)


class EncodedPrompt(InputPart):
    """See the file's header. Without an encoder it holds the embeddings themselves."""

    def __init__(self, config: PTuningConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.num_virtual_tokens
        self.behind = behind(self.length, config.position)
        if config.encoder_reparameterization_type is None:
            self.prompt = fresh(self.length, facts.width, like=next(facts.module.parameters(), None))
            nn.init.normal_(self.prompt, std=0.02)

    def embeddings(self, shared: Any, rows: RowsAtHand) -> Tensor:
        del rows
        return self.prompt if shared is None else shared


class Encoder(nn.Module):
    """f over embeddings of its own."""

    def __init__(self, config: PTuningConfig, width: int) -> None:
        super().__init__()
        hidden = config.encoder_hidden_size or width
        self.embedding = nn.Parameter(torch.randn(config.num_virtual_tokens, width))
        self.layers = config.encoder_num_layers if config.encoder_reparameterization_type == "LSTM" else 0
        sizes = [width, hidden, hidden, width]
        if self.layers:
            self.lstm = nn.ParameterList(nn.LSTM(width, hidden, self.layers, bidirectional=True).parameters())
            sizes = [2 * hidden, 2 * hidden, width]
        self.mlp = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))

    def forward(self) -> Tensor:
        """(P, D)"""
        x = self._recurrent(self.embedding) if self.layers else self.embedding
        for depth, linear in enumerate(self.mlp):
            x = linear(torch.relu(x) if depth else x)
        return x

    def _recurrent(self, x_PD: Tensor) -> Tensor:
        """The LSTM by torch's function: torch.compile refuses to see `nn.LSTM`, even to read its sizes. Not under autocast, whose bfloat16 it
        has no kernel for on some CPUs."""
        weights = list(self.lstm)
        start = x_PD.new_zeros(2 * self.layers, 1, weights[1].shape[1])
        with torch.autocast(x_PD.device.type, enabled=False):
            y_P1D, *_ = torch.lstm(x_PD[:, None], (start, start), weights, True, self.layers, 0.0, False, True, False)
        return y_P1D[:, 0]


def shared(config: PTuningConfig, sites: tuple[SiteFacts, ...]) -> nn.Module | None:
    """The encoder, where there is one."""
    return Encoder(config, sites[0].width) if config.encoder_reparameterization_type is not None else None


def count(config: PTuningConfig, facts: SiteFacts) -> int:
    """P embeddings, if no encoder makes them (its parameters are counted by `shared`)."""
    return config.num_virtual_tokens * facts.width if config.encoder_reparameterization_type is None else 0


METHOD = Method(
    name="p-tuning",
    config=PTuningConfig,
    part=EncodedPrompt,
    sites=("input",),
    identity_at_init=False,
    count=count,
    shared=shared,
    peft=PeftLayout(
        peft_type="P_TUNING",
        fields={"position": None},
        only={"position": "front"},
        accepted={"num_transformer_submodules": (None, 1, 2)},
        spare_rows=True,
        written={"num_transformer_submodules": 1},
        ignored=("token_dim", "num_attention_heads", "num_layers", "encoder_dropout"),
        unshared={"encoder_reparameterization_type": None},
        tensors={"prompt": "prompt_embeddings"},
        stacked="prompt_embeddings",
    ),
)
