"""What the laws are tried on: tiny modules for every kind of layer and a tiny model of every family.

A *subject* is a seeded maker of a frozen, evaluated module with a batch for it. All weights are drawn anew with a spread that keeps
activations near one, biases and norms included: a framework's own initial values (zero biases, deviation 0.02) would let most defects of
a bias or a scale pass unseen.

Legend: B rows, T tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from ingraft.testing.mould import Mould

VOCABULARY = 48
"""Token ids of every subject; 0 pads."""

FAMILIES = ("lora", "dora", "ia3", "oft", "bitfit", "full", "houlsby", "prefix", "prompt")
"""One method of each family: what is added, what is chained, what has a way round the weight before or behind it, what has none."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A module under test.

    Attributes:
        name: in test ids and in the matrix.
        make: a new module in float32, the same one each time.
        batch: keyword arguments of its forward for n rows, the same ones each time.
        targets: modules that a weight method is pointed at; None leaves the method's own default.
        parameters: stacked tensors that a weight method is pointed at as well.
        reads: whether layers apply their weights in code of their own there, so that a weight method has no dropout.
        outputs: those of `targets` whose output a bottleneck may change; empty if there is none.
        transformers: whether it is a transformers model.
        causal: whether it generates text.
        everyday: the methods that are tried on it every day, where others are tried with `-m study` only; None for all.
        packed: the format in which its weights are kept, as a quantised base's are; empty where they are dense.
        twin: it is the dense twin of a packed one: the same numbers, unpacked.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], dict[str, Tensor]]
    targets: tuple[str, ...] | None = None
    parameters: tuple[str, ...] = ()
    reads: bool = False
    outputs: tuple[str, ...] = ()
    transformers: bool = False
    causal: bool = False
    everyday: tuple[str, ...] | None = None
    packed: str = ""
    twin: bool = False

    @property
    def plain(self) -> str:
        """Its name without the format."""
        return self.name.removesuffix(f"-{self.packed.lower()}")

    def make_redrawn(self) -> nn.Module:
        """A new module with its weights drawn by `redrawn`: a copy, which takes a tenth of the time of making one."""
        return _mould(self).cast()


@cache
def _mould(subject: Subject) -> Mould:
    model = redrawn(subject.make())
    if not subject.packed:
        return Mould(model)
    from ingraft.testing import packing

    return Mould((packing.unpacked if subject.twin else packing.packed)(subject.packed, model))


# ------------------------------------------------------------------------------------------------------------------- modules


class Layers(nn.Module):
    """Two layers of a kind with a nonlinearity between, and a small head."""

    def __init__(self, first: nn.Module, second: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.first, self.second, self.head = first, second, head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Channels(nn.Module):
    """(B, C, ...) to (B, C): the mean over a sound, a picture or a volume."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(dim=2)


class Rescaled(nn.Embedding):
    """An embedding whose forward is its own, as Gemma's: no shortcut may go round it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Embedded(nn.Module):
    """Two embeddings of the same ids, one with a forward of its own, and a head."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.plain, self.rescaled, self.head = (
            nn.Embedding(VOCABULARY, width, padding_idx=0),
            Rescaled(VOCABULARY, width),
            nn.Linear(width, 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.plain(x) + self.rescaled(x)))


class Attending(nn.Module):
    """Two of torch's attentions, one with a tensor for each projection, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.joint = nn.MultiheadAttention(16, 2, batch_first=True)
        self.split = nn.MultiheadAttention(16, 4, kdim=32, vdim=8, batch_first=True)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        mask = x[:, :, 0] > 1.0
        mask[:, 0] = False
        y, _ = self.joint(x, x, x, key_padding_mask=mask)
        z, weights = self.split(
            torch.tanh(y), torch.cat([x, y], -1), y[:, :, :8].contiguous(), attn_mask=torch.ones(4, 4).triu(1) > 0
        )
        return self.head(z.contiguous()) + weights.sum(dim=1, keepdim=True)[:, :, :1]


class Encoded(nn.Module):
    """torch's own encoder, which passes over its children in evaluation, over rows of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(x.shape[1]) >= 4 + (x[:, :1, 0] > 0).long()
        return self.encoder(x, src_key_padding_mask=mask).masked_fill(mask[:, :, None], 0.0)


def _encoded() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that packed rows are a prototype, torch says once
        torch.nested.nested_tensor([torch.zeros(2)])
    return Encoded()


def _conv1d_transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Layers(Conv1D(16, 12), Conv1D(16, 16), nn.LayerNorm(16))


def _conv1d() -> nn.Module:
    first = nn.Conv1d(4, 8, 3, stride=2, padding=1, bias=False)
    return Layers(first, nn.Conv1d(8, 6, 5, padding="same", padding_mode="reflect", groups=2), Channels())


def _conv2d() -> nn.Module:
    first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    return Layers(
        first, nn.Conv2d(8, 6, (1, 3), padding=(0, 2), dilation=(1, 2), padding_mode="circular", bias=False), Channels()
    )


def _conv2d_groups() -> nn.Module:
    return Layers(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(8, 8, 3, groups=8, bias=False), Channels())


def _conv3d() -> nn.Module:
    first = nn.Conv3d(3, 6, 2, dilation=(1, 2, 1), padding=(0, 1, 0))
    return Layers(first, nn.Conv3d(6, 4, (1, 2, 2), stride=(2, 1, 1), bias=False), Channels())


# ------------------------------------------------------------------------------------------------------------------- models


def _quiet(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model without the remarks transformers prints about tiny vocabularies."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return make()
    finally:
        logging.set_verbosity(level)


def _llama(width: int = 16, inner: int = 24) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return _quiet(lambda: LlamaForCausalLM(config))


def _mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=3,
        num_experts_per_tok=3,  # which experts a token goes to is a step, and bfloat16 would step elsewhere
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return _quiet(lambda: MixtralForCausalLM(config))


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return _quiet(lambda: GPT2LMHeadModel(config))


def _bert(pooled: bool = False) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5
    return _quiet(lambda: (BertForSequenceClassification if pooled else BertForMaskedLM)(config))


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0)
    config.decoder_start_token_id = 0
    return _quiet(lambda: T5ForConditionalGeneration(config))


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 5
    return _quiet(lambda: ViTForImageClassification(config))


# ------------------------------------------------------------------------------------------------------------------- batches


def _normal(*shape: int) -> Callable[[int], dict[str, Tensor]]:
    return lambda n: {"x": torch.randn(n, *shape, generator=torch.Generator().manual_seed(7))}


def _ids(n: int, length: int = 7, seed: int = 7) -> Tensor:
    return torch.randint(3, VOCABULARY, (n, length), generator=torch.Generator().manual_seed(seed))


def _text(n: int) -> dict[str, Tensor]:
    """Rows of different lengths, padded on the right."""
    ids = _ids(n)
    mask = torch.ones_like(ids)
    for row in range(1, n, 2):
        ids[row, 5:], mask[row, 5:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def _pair(n: int) -> dict[str, Tensor]:
    return {**_text(n), "decoder_input_ids": _ids(n, 4, 8)}


def redrawn(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every parameter anew, each once: matrices keep the size of what passes through them, biases and norms are visibly not neutral."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                parameter.copy_(0.2 * noise + (0.0 if name.endswith("bias") else 1.0))
            else:
                lookup = isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Embedding)
                stacked = parameter.dim() == 3 and not name.endswith("weight")  # matrices of experts
                inputs = parameter[0, 0].numel() if stacked else parameter[0].numel()
                parameter.copy_(noise * (0.7 if lookup else inputs**-0.5))
    return model.eval()


SUBJECTS: dict[str, Subject] = {
    subject.name: subject
    for subject in (
        Subject(
            name="linear",
            make=lambda: Layers(nn.Linear(12, 16), nn.Linear(16, 16, bias=False), nn.LayerNorm(16)),
            batch=_normal(3, 12),
            targets=("first", "second"),
            outputs=("second",),
        ),
        Subject(
            name="conv1d-transposed",
            make=_conv1d_transposed,
            batch=_normal(3, 12),
            targets=("first", "second"),
            outputs=("second",),
        ),
        Subject(
            name="embedding",
            make=Embedded,
            batch=lambda n: {"x": _ids(n)},
            targets=("plain", "rescaled"),
        ),
        Subject(name="conv2d", make=_conv2d, batch=_normal(4, 9, 9), targets=("first", "second")),
        Subject(name="conv2d-groups", make=_conv2d_groups, batch=_normal(4, 7, 7), targets=("first", "second")),
        Subject(name="conv1d", make=_conv1d, batch=_normal(4, 12), targets=("first", "second"), everyday=FAMILIES),
        Subject(name="conv3d", make=_conv3d, batch=_normal(3, 5, 5, 4), targets=("first", "second"), everyday=FAMILIES),
        Subject(
            name="attention",
            make=Attending,
            batch=_normal(4, 16),
            targets=("joint", "split"),
            reads=True,
            outputs=("joint", "split"),
            everyday=FAMILIES,
        ),
        Subject(
            name="encoder",
            make=_encoded,
            batch=_normal(6, 16),
            targets=("self_attn", "linear1", "linear2"),
            reads=True,
            outputs=("linear2",),
            everyday=FAMILIES,
        ),
        Subject(name="llama", make=_llama, batch=_text, transformers=True, causal=True),
        Subject(
            name="mixtral",
            make=_mixtral,
            batch=_text,
            targets=("q_proj", "v_proj"),
            parameters=("experts.gate_up_proj", "experts.down_proj"),
            reads=True,
            transformers=True,
            causal=True,
            everyday=FAMILIES,
        ),
        Subject(name="gpt2", make=_gpt2, batch=_text, transformers=True, causal=True),
        Subject(name="bert", make=_bert, batch=_text, transformers=True),
        Subject(name="t5", make=_t5, batch=_pair, transformers=True),
        Subject(
            name="vit",
            make=_vit,
            batch=lambda n: {"pixel_values": torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(7))},
            transformers=True,
        ),
        *(
            Subject(
                name=f"linear-{form.lower()}",
                # Wide enough for a block of 32, and nf4's blocks of 64 run across the first layer's rows.
                make=lambda: Layers(
                    nn.Linear(32, 64),
                    nn.Linear(64, 64, bias=False),
                    nn.Sequential(
                        nn.LayerNorm(64), nn.Linear(64, 5)
                    ),  # the last linear layer is the head, and stays dense
                ),
                batch=_normal(3, 32),
                targets=("first", "second"),
                outputs=("second",),
                packed=form,
            )
            for form in ("nf4", "int8", "Q8_0")
        ),
        Subject(
            name="embedding-q8_0",
            make=lambda: Embedded(32),
            batch=lambda n: {"x": _ids(n)},
            targets=("plain", "rescaled"),
            packed="Q8_0",
        ),
        Subject(name="llama-nf4", make=_llama, batch=_text, transformers=True, causal=True, packed="nf4"),
        Subject(
            name="llama-q8_0",
            make=lambda: _llama(32, 64),
            batch=_text,
            transformers=True,
            causal=True,
            packed="Q8_0",
            everyday=FAMILIES,
        ),
    )
}
"""Layer kinds first, then models, then both with packed weights."""

POOLED = Subject(name="bert-pooled", make=lambda: _bert(pooled=True), batch=_text, transformers=True)
"""A classifier whose inner model looks at column 0 itself; one law is about it, all others say nothing of it that they do not say of bert."""

CONVOLUTIONS = tuple(name for name in SUBJECTS if name in ("conv1d", "conv3d") or name.startswith("conv2d"))
"""The subjects that are convolutions."""
