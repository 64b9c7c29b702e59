"""What `capabilities` says of a method is what happens: layers that take it, base calls of a mixed batch, packed bases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ingraft.adapt as adapt
from ingraft.adapt import capabilities as module
from ingraft.adapt import host
from ingraft.adapt.capabilities import capabilities
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import AttentionPart, InputPart, MethodConfig, ParameterPart, WeightPart
from ingraft.testing import packing
from ingraft.testing.subjects import SUBJECTS

METHODS = list(registry.records())
ON_LAYERS = [
    name
    for name in METHODS
    if registry.load(name).over is None and not issubclass(registry.load(name).part, AttentionPart | InputPart)
]
WIDTH = 256


class Model(nn.Module):
    """One layer, called on one input."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            return self.layer(x, x, x)[0]
        return self.layer(x)


class Experts(nn.Module):
    """Two matrices in one tensor, both applied to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, WIDTH, WIDTH) * WIDTH**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.stack[0]) + F.linear(x, self.stack[1])


def transposed() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(WIDTH, WIDTH)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (4, 3, WIDTH)),
    "conv1d-transposed": (transposed, (4, 3, WIDTH)),
    "embedding": (lambda: nn.Embedding(WIDTH, WIDTH), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(64, 64, 3), (4, 64, 4)),
    "conv2d": (lambda: nn.Conv2d(64, 64, 3), (4, 64, 4, 4)),
    "conv3d": (lambda: nn.Conv3d(64, 64, 3), (4, 64, 3, 3, 3)),
    "norm": (lambda: nn.LayerNorm(WIDTH), (4, 3, WIDTH)),
    "multihead-attention": (lambda: nn.MultiheadAttention(WIDTH, 4, batch_first=True), (4, 3, WIDTH)),
    "experts": (Experts, (4, 3, WIDTH)),
}


def config(name: str, kind: str = "") -> MethodConfig:
    """Default options, at the layer of `Model` if there is one; the one method that has none names a token."""
    stacked = kind == "experts" and issubclass(registry.load(name).part, WeightPart)
    where: dict[str, Any] = {"target_modules": ["layer"]} if kind else {}
    if stacked:
        where = {"target_modules": [], "target_parameters": ["layer.stack"]}
    return registry.make_config(name, where | ({"token_indices": [3]} if name == registry.TOKENS else {}))


@pytest.mark.parametrize("name", ON_LAYERS)
def test_layers_and_mixed_rows_are_as_said(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kinds it names take the method and others refuse it; a batch of two adapters runs by the definition, a call for each, where it says so."""
    can, part = capabilities(name), registry.load(name).part
    calls: list[object] = []
    general = host._general  # pyright: ignore[reportPrivateUsage]

    def counted(*args: Any) -> Any:
        calls.append(args)
        return general(*args)

    monkeypatch.setattr(host, "_general", counted)
    for kind, (make, shape) in LAYERS.items():
        if kind == "experts" and not issubclass(part, WeightPart | ParameterPart):
            continue  # what an output part changes there is the block's output
        torch.manual_seed(0)
        model = Model(make()).eval()
        x = torch.randint(WIDTH, shape) if kind == "embedding" else torch.randn(shape)
        if kind not in can.layers and can.layers != ("any",):
            with pytest.raises(IngraftError):
                adapt.attach(model, config(name, kind), "a", seed=0)
            continue
        for adapter in ("a", "b"):
            adapt.attach(model, config(name, kind), adapter, seed=1)
        calls.clear()
        with torch.no_grad(), adapt.rows(model, ["a", "b", "b", "a"]):
            model(x)
        assert len(calls) == (0 if kind in can.one_call else 2), kind


def test_kinds_that_only_the_definition_serves_are_not_said_to_take_one_call() -> None:
    """Convolutions where the shortcut does not hold, attentions and experts are no part of the claim."""
    for name, elsewhere in (("c3a", "conv2d"), ("oft", "conv1d"), ("lora", "multihead-attention"), ("lora", "experts")):
        can = capabilities(name)
        assert elsewhere in can.layers and elsewhere not in can.one_call
        assert can.mixed_rows.endswith("a base call a group elsewhere")
    assert capabilities("houlsby").mixed_rows == "one base call"
    assert capabilities("hira").mixed_rows == "a base call a group"


def test_no_method_is_without_a_place() -> None:
    """Every method names at least one; methods of a single kind of layer do not say "any"."""
    assert all(capabilities(name).layers for name in METHODS)
    assert capabilities("ln-tuning").layers == ("norm",)
    assert set(capabilities("trainable-tokens").layers) == {"embedding", "linear"}
    assert capabilities("loftq").layers == ("quantised linear",)
    assert capabilities("full").layers == ("any",)


def test_a_method_over_adapters_acts_where_theirs_may_lie() -> None:
    """Routing names blocks and linear layers, and takes LoRAs there; not at embeddings, which it does not name."""
    assert {"blocks", "linear", "conv1d-transposed"} <= set(capabilities("routing").layers)
    for kind in ("linear", "embedding"):
        model = Model(LAYERS[kind][0]())
        for adapter in ("a", "b"):
            adapt.attach(model, config("lora", kind), adapter)
        router = registry.make_config("routing", {"adapters": ["a", "b"]})
        if kind in capabilities("routing").layers:
            adapt.attach(model, router, "router")
        else:
            with pytest.raises(IngraftError):
                adapt.attach(model, router, "router")


def trains(name: str, model: nn.Module) -> bool:
    """Whether a base takes the method and gives its tensors a gradient."""
    try:
        adapt.attach(model, config(name), seed=0)
    except IngraftError:
        return False
    model(**SUBJECTS["llama"].batch(2)).logits.square().mean().backward()
    assert any(p.grad is not None and p.grad.any() for p in adapt.parameters(model, "default").values())
    return True


def gguf() -> nn.Module:
    """A Llama all of whose matrices are in a file's own blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, vocab_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    return packing.packed("Q8_0", LlamaForCausalLM(config))


@pytest.mark.parametrize("name", ["lora", "ln-tuning", "trainable-tokens", "full", "freeze", "houlsby", "prompt"])
def test_a_packed_base_trains_what_it_is_said_to(name: str) -> None:
    """Norms are dense in every quantised base and embeddings in nf4's; what is trained in full elsewhere meets packed blocks."""
    can = capabilities(name)
    assert trains(name, SUBJECTS["llama-nf4"].make_redrawn()) is can.quantised
    assert trains(name, gguf()) is can.kept


@pytest.mark.parametrize("name", METHODS)
def test_what_is_refused_over_packed_weights_is_taken_without(name: str) -> None:
    """The model that is asked refuses a method for its packed weights alone."""
    taken = module._taken  # pyright: ignore[reportPrivateUsage]
    dense = cast(nn.Module, module._packed_model.__wrapped__(kept=True))  # pyright: ignore[reportPrivateUsage]
    adapt.make_dense(dense)
    needs_packed = capabilities(name).layers == (module.PACKED_ONLY,)
    assert taken(registry.load(name), dense) is not needs_packed
    assert not any("adapter:" in path for path, _ in dense.named_modules())


def test_asking_leaves_the_generator_alone() -> None:
    """The trials draw random layers; a run that asks gives the same digits as one that does not."""
    capabilities.cache_clear()
    module._packed_model.cache_clear()  # pyright: ignore[reportPrivateUsage]
    before = torch.get_rng_state()
    capabilities("lora")
    assert torch.equal(torch.get_rng_state(), before)
