"""Places that keep or apply their weights in code of their own: attentions, stacked experts, layers that are read, torch's encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.bitfit import BitFitConfig
from ingraft.methods.houlsby import HoulsbyConfig
from ingraft.methods.ia3 import IA3Config
from ingraft.methods.lora import LoraConfig
from ingraft.methods.registry import make_config
from ingraft.testing.cases import Snapshot, close, differs, randomise, run, same
from ingraft.testing.subjects import SUBJECTS, redrawn

EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def sites(model: nn.Module) -> list[str]:
    return list(require_control(model).adapters["default"].sites)


def refusal(model: nn.Module, config: Any) -> str:
    before = Snapshot.of(model)
    with pytest.raises(IngraftError) as caught:
        adapt.attach(model, config)
    before.assert_restored(model)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- attentions


def test_naming_an_attention_means_both_of_its_projections() -> None:
    """The joint input projection and the output projection, which the attention reads and never calls."""
    model = SUBJECTS["attention"].make_redrawn()
    adapt.attach(model, LoraConfig(r=2, target_modules=["joint"]))
    assert sites(model) == ["joint", "joint.out_proj"]
    shapes = {key: tuple(p.shape) for key, p in adapt.parameters(model, "default").items()}
    assert shapes["joint.in_proj.lora_B"] == (48, 2) and shapes["joint.out_proj.lora_B"] == (16, 2)


def test_an_output_projection_alone_acts_through_the_attention() -> None:
    model = SUBJECTS["attention"].make_redrawn()
    batch = SUBJECTS["attention"].batch(3)
    expected = run(model, batch)
    adapt.attach(model, LoraConfig(r=2, target_modules=["joint.out_proj"]))
    randomise(model, "default")
    active = run(model, batch)
    differs(active, expected, "adapter and base")
    adapt.merge(model)
    close(run(model, batch), active, "merged and active")


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_regression_14_dropout_that_cannot_act_is_refused(method: str) -> None:
    """The incumbent takes `lora_dropout` for an attention and drops nothing, without a word."""
    attention, mixtral = SUBJECTS["attention"].make_redrawn(), SUBJECTS["mixtral"].make_redrawn()
    text = refusal(attention, make_config(method, {"r": 2, "lora_dropout": 0.1, "target_modules": ["joint", "head"]}))
    assert "joint (MultiheadAttention)" in text and "joint.out_proj" in text and "lora_dropout cannot act there" in text
    assert len(text.splitlines()) == 2, "the head has a shortcut, so it can drop inputs"
    options = {"r": 2, "lora_dropout": 0.1, "target_modules": [], "target_parameters": list(EXPERTS)}
    assert "lora_dropout cannot act there" in refusal(mixtral, make_config(method, options))


def test_dropout_on_a_layer_with_a_forward_of_its_own_is_refused() -> None:
    class Own(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4))
    assert "0 (Own)" in refusal(model, LoraConfig(r=2, lora_dropout=0.1, target_modules=["0"]))
    adapt.attach(model, LoraConfig(r=2, target_modules=["0"]))


def test_rows_of_an_attention_with_rows_behind_are_refused() -> None:
    """Where `batch_first` is false, dimension 0 is the position."""

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x, x, x)[0]

    model = redrawn(Behind())
    for name in ("a", "b"):
        adapt.attach(model, LoraConfig(r=2, target_modules=["inner"]), name)
    with adapt.rows(model, ["a", "b"]), pytest.raises(IngraftError, match=r"does not go with rows|rows: inner"):
        model(torch.randn(2, 2, 8))


def test_ia3_on_the_keys_of_a_joint_projection_is_refused() -> None:
    model = SUBJECTS["encoder"].make_redrawn()
    assert "keys and values are no layers of their own" in refusal(model, IA3Config())


# ------------------------------------------------------------------------------------------------------ torch's encoder


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("targets", [["linear1"], ["self_attn"], ["self_attn.out_proj"], ["norm2"]])
def test_an_encoder_in_evaluation_does_not_pass_over_its_adapters(targets: list[str]) -> None:
    """Without gradients, with and without padding, torch's encoder computes past its children; adapted it gives what training mode gives."""
    config = (
        make_config("full", {"target_modules": targets})
        if targets == ["norm2"]
        else LoraConfig(r=2, target_modules=targets)
    )
    layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
    for make in (lambda: layer, lambda: nn.TransformerEncoder(layer, 2)):
        model = redrawn(make()).eval()
        x = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(1))
        mask = torch.arange(5) >= torch.tensor([5, 3, 4])[:, None]
        with torch.no_grad():
            expected = model(x, src_key_padding_mask=mask)
            adapt.attach(model, config)
            randomise(model, "default")
            passed = model(x, src_key_padding_mask=mask)
            with adapt.disabled(model):
                same(model(x, src_key_padding_mask=mask), expected, "disabled and base")
            model.train()
            slow = model(x, src_key_padding_mask=mask)
            model.eval()
        real = ~mask
        close(passed[real], slow[real], "evaluation and training mode", times=2.0)
        differs(passed[real], expected[real], "adapter and base")
        adapt.detach(model)
        with torch.no_grad():
            same(model(x, src_key_padding_mask=mask), expected, "detached and base")


def test_bottlenecks_find_the_places_of_torchs_encoder() -> None:
    model = SUBJECTS["encoder"].make_redrawn()
    adapt.attach(model, HoulsbyConfig(reduction_factor=4.0))
    assert sites(model)[:2] == ["encoder.layers.0.self_attn", "encoder.layers.0.linear2"]


def test_all_linear_takes_attentions_and_bitfit_their_biases() -> None:
    model = SUBJECTS["encoder"].make_redrawn()
    adapt.attach(model, LoraConfig(r=2))
    start = "encoder.layers.0."
    assert sites(model)[:4] == [start + name for name in ("self_attn", "self_attn.out_proj", "linear1", "linear2")]
    assert len(sites(model)) == 8  # repeated blocks have no output head among them
    adapt.detach(model)
    adapt.attach(model, BitFitConfig())
    assert {start + "self_attn", start + "self_attn.out_proj"} <= set(sites(model))


# --------------------------------------------------------------------------------------------------------- stacked experts


def test_an_expert_of_its_own_for_every_matrix() -> None:
    model = SUBJECTS["mixtral"].make_redrawn()
    adapt.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, rank_pattern={"down_proj": 3}))
    own = adapt.parameters(model, "default")
    assert len(own) == 2 * 2 * 3 * 2
    assert own["model.layers.0.mlp.experts.gate_up_proj.2.lora_A"].shape == (2, 16)
    assert own["model.layers.1.mlp.experts.down_proj.0.lora_A"].shape == (3, 24)
    first = own["model.layers.0.mlp.experts.gate_up_proj.0.lora_A"]
    assert not torch.equal(first, own["model.layers.0.mlp.experts.gate_up_proj.1.lora_A"])


def test_experts_kept_the_other_way_round() -> None:
    """Expert modules that declare `is_transposed` keep (in, out)."""

    class Experts(nn.Module):
        is_transposed = True

        def __init__(self) -> None:
            super().__init__()
            self.weights = nn.Parameter(torch.randn(2, 6, 4))

        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("ni,eio->no", x, self.weights)

    model = nn.Sequential(Experts())
    adapt.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=["weights"]))
    shapes = {key: tuple(p.shape) for key, p in adapt.parameters(model, "default").items()}
    assert shapes["0.weights.0.lora_A"] == (2, 6) and shapes["0.weights.0.lora_B"] == (4, 2)
    randomise(model, "default")
    x = torch.randn(3, 6)
    with torch.no_grad():
        active = model(x)
        adapt.merge(model)
        close(model(x), active, "merged and active")


def test_what_target_parameters_cannot_mean_is_refused() -> None:
    model = SUBJECTS["mixtral"].make_redrawn()
    text = refusal(model, LoraConfig(r=2, target_parameters=["experts.gate_up"]))
    assert "'experts.gate_up' matches no parameter" in text and "gate_up_proj" in text
    text = refusal(model, LoraConfig(r=2, target_parameters=["input_layernorm.weight"]))
    assert "has 1 dimensions" in text
    text = refusal(model, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["q_proj.weight"]))
    assert "target_modules and target_parameters both mean it" in text
    assert "no change of a weight" in refusal(model, HoulsbyConfig(target_parameters=EXPERTS))
    text = refusal(model, LoraConfig(r=2, target_modules=["mlp.experts"]))
    assert "target_parameters (gate_up_proj, down_proj)" in text
    assert "starts from" in refusal(
        model, make_config("eva", {"target_modules": [], "target_parameters": list(EXPERTS)})
    )


def test_layers_and_exclusion_narrow_the_experts_too() -> None:
    model = SUBJECTS["mixtral"].make_redrawn()
    adapt.attach(model, LoraConfig(r=2, target_modules=[], target_parameters=EXPERTS, layers_to_transform=[1]))
    assert sites(model) == ["model.layers.1.mlp.experts"]
    adapt.detach(model)
    config = LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=EXPERTS, exclude_modules=["layers.0.mlp.experts"]
    )
    adapt.attach(model, config)
    assert "model.layers.0.mlp.experts" not in sites(model) and "model.layers.1.mlp.experts" in sites(model)


def test_a_transposed_convolution_is_refused_by_name() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 2), nn.Flatten())
    assert "transposed convolutions are not adapted" in refusal(model, LoraConfig(r=2, target_modules=["0"]))
