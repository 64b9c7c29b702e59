"""LLaMA-Adapter: learned tokens that the attention of the topmost blocks looks at beside its own, through a gate that starts shut.

    y = softmax(q K') V + g softmax(q K_p') V_p        K_p = W_k p,  V_p = W_v p,  g = 0 at first

Paper: Zhang et al., "LLaMA-Adapter: Efficient Fine-tuning of Language Models with Zero-init Attention", ICLR 2024 (arXiv:2303.16199),
equations 4 to 7.
Read against: Hugging Face PEFT's `adaption_prompt` (one gate a layer, without the tanh of the authors' code; keys without position).
What differs: any model whose attention is in transformers' registry; rows with different adapters; nothing of it lies in the cache. On GPT-2
PEFT adds the result behind the output projection without projecting it; here it goes through the projection, as in the equation.

Legend: P learned tokens, C width, H key-value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ingraft.errors import IngraftError
from ingraft.methods.contract import GatedPart, Method, MethodConfig, PeftLayout, RowsAtHand, SiteFacts, fresh

IN_PEFT = ("llama", "mistral")
"""Types of models on which PEFT computes the equation."""


@dataclass(frozen=True, kw_only=True)
class LlamaAdapterConfig(MethodConfig):
    """LLaMA-Adapter's hyperparameters.

    Attributes:
        adapter_len: P, at least 1.
        adapter_layers: in how many blocks, counted from the top; None: in all (the paper leaves out the lowest two).
    """

    method: ClassVar[str] = "llama-adapter"

    adapter_len: int = 10
    adapter_layers: int | None = None

    def problems(self) -> list[str]:
        sizes = {"adapter_len": self.adapter_len, "adapter_layers": self.adapter_layers}
        return [
            f"{name} must be at least 1, got {value}."
            for name, value in sizes.items()
            if value is not None and value < 1
        ]

    def among(self, paths: Sequence[str]) -> Sequence[str]:
        if self.adapter_layers is None:
            return paths
        if self.adapter_layers > len(paths):
            raise IngraftError(f"adapter_layers = {self.adapter_layers}: there are only {len(paths)} attentions.")
        return paths[-self.adapter_layers :]


class GatedTokens(GatedPart):
    """See the file's header."""

    def __init__(self, config: LlamaAdapterConfig, facts: SiteFacts) -> None:
        super().__init__()
        self.length = config.adapter_len
        like = next(iter(facts.module.parameters()), None)
        self.prompt = fresh(1, self.length, facts.width, like=like)
        self.opening = fresh(1, like=like)
        nn.init.normal_(self.prompt)
        nn.init.zeros_(self.opening)

    def keys_values(self, shared: Any, rows: RowsAtHand) -> tuple[Tensor, Tensor]:
        del shared
        assert rows.project is not None
        return rows.project(self.prompt[0])

    def gate(self) -> Tensor:
        return self.opening


def refuses(_: MethodConfig, facts: SiteFacts) -> str | None:
    """An attention whose projections are not known cannot make keys of the learned tokens."""
    if facts.projects:
        return None
    return (
        f"llama-adapter: it is not known how {facts.path} ({type(facts.module).__name__}) makes its keys and values. Choose prefix or p-tuning-v2, "
        "which learn them directly."
    )


def count(config: LlamaAdapterConfig, facts: SiteFacts) -> int:
    """P tokens and a gate."""
    return config.adapter_len * facts.width + 1


def otherwise(_: MethodConfig, facts: SiteFacts) -> str | None:
    """PEFT has it for a few models, and not for all of them as the equation says."""
    kind = str(getattr(getattr(facts.module, "config", None), "model_type", ""))
    return (
        None if kind in IN_PEFT else f"PEFT has llama-adapter as its equation says it on {' and '.join(IN_PEFT)} only"
    )


METHOD = Method(
    name="llama-adapter",
    config=LlamaAdapterConfig,
    part=GatedTokens,
    sites=("attention",),
    identity_at_init=True,
    count=count,
    refuses=refuses,
    peft=PeftLayout(
        peft_type="ADAPTION_PROMPT",
        bare=True,
        site_count="adapter_layers",
        accepted={"target_modules": (None, "self_attn", "attn")},
        otherwise=otherwise,
        tensors={"prompt": "adaption_prompt", "opening": "adaption_gate"},
    ),
)
