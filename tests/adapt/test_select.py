"""Selection: what a config means, and what is said when it means nothing. Regressions 8 and 18."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.bitfit import BitFitConfig
from ingraft.methods.full import FullConfig
from ingraft.methods.houlsby import HoulsbyConfig
from ingraft.methods.lora import LoraConfig
from ingraft.methods.parallel import ParallelConfig
from ingraft.methods.pfeiffer import PfeifferConfig
from ingraft.methods.prefix import PrefixTuningConfig
from ingraft.testing.cases import Snapshot
from ingraft.testing.subjects import SUBJECTS


class Net(nn.Module):
    """A plain module with a body and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.q_proj, self.v_proj = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(self.v_proj(self.q_proj(self.embed(x)))))


def sites(model: nn.Module, name: str = "default") -> list[str]:
    return list(require_control(model).adapters[name].sites)


def error_of(model: nn.Module, config: object, **options: object) -> IngraftError:
    before = Snapshot.of(model)
    with pytest.raises(IngraftError) as caught:
        adapt.attach(model, config, **options)  # type: ignore[arg-type]
    before.assert_restored(model)
    return caught.value


def test_all_linear_leaves_the_head_of_a_plain_module_alone() -> None:
    """Regression 18: the incumbent adapts the output head as well."""
    model = Net()
    adapt.attach(model, LoraConfig(r=2))
    assert sites(model) == ["q_proj", "v_proj"]


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit"])
def test_all_linear_leaves_the_head_of_a_model_alone(name: str) -> None:
    model = SUBJECTS[name].make_redrawn()
    adapt.attach(model, LoraConfig(r=2))
    head = model.get_output_embeddings() or model.classifier  # type: ignore[operator]
    assert all(model.get_submodule(path) is not head for path in sites(model))
    kinds = {type(module).__name__ for path, module in model.named_modules() if path in sites(model)}
    assert kinds == ({"Conv1D"} if name == "gpt2" else {"Linear"})


def test_a_pattern_without_match_is_named_with_the_nearest() -> None:
    error = error_of(Net(), LoraConfig(r=2, target_modules=["q_porj", "v_proj"]))
    assert "'q_porj' matches no module" in str(error) and "did you mean 'q_proj'" in str(error)


def test_every_pattern_without_match_is_named() -> None:
    error = error_of(
        Net(), LoraConfig(r=2, target_modules=["q_porj", "vproj"], modules_to_save=["hed"], exclude_modules=["nowhere"])
    )
    assert [word for word in ("q_porj", "vproj", "hed", "nowhere") if word not in str(error)] == []
    assert len(error.problems) >= 4


def test_modules_to_save_matches_whole_components() -> None:
    """Regression 8: the incumbent takes `head` to mean `lm_head`, and says nothing where nothing matches."""
    error = error_of(Net(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["head"]))
    assert "'head' matches no module" in str(error) and "lm_head" in str(error)


def test_a_string_is_a_regular_expression_over_whole_names() -> None:
    model = Net()
    adapt.attach(model, LoraConfig(r=2, target_modules=r"(q|v)_proj"))
    assert sites(model) == ["q_proj", "v_proj"]
    assert "matches no module" in str(error_of(Net(), LoraConfig(r=2, target_modules="q_pro")))
    assert "no regular expression" in str(error_of(Net(), LoraConfig(r=2, target_modules="(q_proj")))


def test_strict_false_warns_and_goes_on() -> None:
    model = Net()
    with pytest.warns(UserWarning, match="nowhere"):
        adapt.attach(model, LoraConfig(r=2, target_modules=["q_proj", "nowhere"]), strict=False)
    assert sites(model) == ["q_proj"]
    assert "nowhere" in str(error_of(Net(), LoraConfig(r=2, target_modules=["nowhere"]), strict=False))


def test_layers_and_exclusion_narrow_the_choice() -> None:
    model = SUBJECTS["llama"].make_redrawn()
    adapt.attach(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[1], exclude_modules=["v_proj"])
    )
    assert sites(model) == ["model.layers.1.self_attn.q_proj"]
    assert "leaves no module" in str(
        error_of(Net(), LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"]))
    )


def test_what_leaves_no_module_is_named() -> None:
    """An option that narrows the choice to nothing says so, and where there was something."""
    for options, words in (
        ({"layers_to_transform": [9]}, "layers_to_transform: 9 is the index of no block of model.layers; they go from 0 to 1 ("),
        ({"layers_to_transform": [-5]}, "layers_to_transform: -5 is the index of no block of model.layers; they go from 0 to 1 ("),
        ({"layers_to_transform": [0, 9]}, "layers_to_transform: 9 is the index of no block"),
        ({"exclude_modules": ["q_proj"]}, "leaves no module to adapt in LlamaForCausalLM: exclude_modules takes out all that were chosen"),
    ):  # fmt: skip
        error = error_of(SUBJECTS["llama"].make_redrawn(), LoraConfig(r=2, target_modules=["q_proj"], **options))  # type: ignore[arg-type]
        assert words in str(error), str(error)
    error = error_of(
        Net(), LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=["q_proj"], rank_pattern={"q_proj": 3})
    )
    assert len(error.problems) == 1 and "exclude_modules takes out all" in str(error)
    deep = {"target_modules": ["layers.0.self_attn.q_proj"], "layers_to_transform": [1]}
    error = error_of(SUBJECTS["llama"].make_redrawn(), LoraConfig(r=2, **deep))  # type: ignore[arg-type]
    assert "layers_to_transform = 1 (they lie in blocks 0) takes out all that were chosen" in str(error)
    error = error_of(Net(), LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[0]))
    assert "layers_to_transform: 0 is the index of no block: none of the modules lies in one" in str(error)
    model = SUBJECTS["llama"].make_redrawn()
    with pytest.warns(UserWarning, match="9 is the index of no block"):
        adapt.attach(model, LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[-1, 9]), strict=False)
    assert sites(model) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize(
    ("targets", "whole", "named"),
    [
        (["q_proj", "v_proj"], ["q_proj"], "model.layers.0.self_attn.q_proj"),
        (["q_proj"], ["layers.1.self_attn.q_proj"], "model.layers.1.self_attn.q_proj"),
        (["q_proj", "up_proj"], ["mlp"], "model.layers.0.mlp.up_proj"),
        (".*(q|v)_proj", ["q_proj"], "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_module_is_not_adapted_and_trained_in_full(targets: list[str] | str, whole: list[str], named: str) -> None:
    """The incumbent drops the adapter there and says nothing."""
    config = LoraConfig(r=2, target_modules=targets, modules_to_save=whole)  # type: ignore[arg-type]
    error = error_of(SUBJECTS["llama"].make_redrawn(), config)
    assert named in str(error) and "modules_to_save" in str(error) and "target_modules" in str(error)
    model = SUBJECTS["llama"].make_redrawn()
    if targets != ["q_proj"]:
        with pytest.warns(UserWarning, match="modules_to_save"):
            adapt.attach(model, config, strict=False)
        assert named in require_control(model).adapters["default"].saved_whole


def test_what_is_trained_in_full_is_left_out_of_a_wider_choice() -> None:
    """A default, a role or a name that means more than a head's own layer steps back; so do those that train a module's own numbers."""
    for targets in (None, "all-linear", ["all-linear"], ["attention-kv", "mlp-out"]):
        model = SUBJECTS["llama"].make_redrawn()
        adapt.attach(model, LoraConfig(r=2, target_modules=targets, modules_to_save=["layers.1.mlp.down_proj"]))  # type: ignore[arg-type]
        own = require_control(model).adapters["default"]
        assert own.saved_whole == ("model.layers.1.mlp.down_proj",) and "model.layers.0.mlp.down_proj" in own.sites
    two = nn.ModuleDict({name: nn.ModuleDict({"dense": nn.Linear(4, 4)}) for name in ("body", "head")})
    adapt.attach(two, LoraConfig(r=2, target_modules=["dense"], modules_to_save=["head"]))
    assert require_control(two).adapters["default"].sites.keys() == {"body.dense", "head.dense"}
    assert require_control(two).adapters["default"].saved_whole == ("head.dense",)
    plain = Net()
    adapt.attach(plain, FullConfig(target_modules=["norm", "q_proj"], modules_to_save=["norm"]))
    assert require_control(plain).adapters["default"].saved_whole == ("norm",)


def test_a_tied_weight_is_adapted_on_one_side_and_said() -> None:
    model = SUBJECTS["gpt2"].make_redrawn()
    with pytest.warns(UserWarning, match=r"shares its weight with transformer\.wte"):
        adapt.attach(model, LoraConfig(r=2, target_modules=["lm_head"]))
    expected = {key: p.detach().clone() for key, p in adapt.base_parameters(model).items()}
    with pytest.raises(IngraftError, match=r"tied to transformer\.wte.*untie=True"):
        adapt.merge(model)
    assert all(torch.equal(p, expected[key]) for key, p in adapt.base_parameters(model).items())
    adapt.merge(model, untie=True)
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    adapt.unmerge(model)
    assert model.config.tie_word_embeddings is True  # type: ignore[union-attr]
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------- what cannot host


def test_a_weight_normed_layer_is_refused() -> None:
    model = nn.Sequential(weight_norm(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert "parametrized or weight-normed" in str(error_of(model, LoraConfig(r=2, target_modules=["0"])))


def test_what_changes_outputs_is_refused_at_a_layer_that_is_read_and_never_called() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    assert "never calls it" in str(error_of(model, HoulsbyConfig(target_modules=["self_attn.out_proj"])))


def test_a_replaced_forward_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    original = model[0].forward
    model[0].forward = lambda x: original(x)  # type: ignore[method-assign]
    assert "replaced `forward`" in str(error_of(model, LoraConfig(r=2, target_modules=["0"])))
    wrapped = nn.Sequential(nn.Sequential(model[1]))
    adapt.attach(wrapped, LoraConfig(r=2, target_modules=["0.0"]))


def test_a_container_is_refused() -> None:
    model = nn.ModuleDict({"inside": nn.ModuleList([nn.Linear(4, 4)])})
    assert "no forward of its own" in str(error_of(model, HoulsbyConfig(target_modules=["inside"])))


def test_a_layer_without_a_matrix_is_refused_by_methods_that_need_one() -> None:
    assert "needs a layer with a weight matrix" in str(error_of(Net(), LoraConfig(r=2, target_modules=["norm"])))


def test_a_bias_cannot_be_grafted_where_nothing_would_add_it() -> None:
    assert "knows no bias" in str(error_of(Net(), BitFitConfig(add_bias=True, target_modules=["embed"])))
    bare = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    assert "add_bias" in str(error_of(bare, BitFitConfig(target_modules=["0"])))


def test_a_llama_has_no_biases_and_bitfit_says_so() -> None:
    model = SUBJECTS["llama"].make_redrawn()
    error = error_of(model, BitFitConfig())
    assert "bitfit" in str(error) and "add_bias" in str(error)


def test_a_parallel_bottleneck_needs_as_many_features_out_as_in() -> None:
    model = SUBJECTS["llama"].make_redrawn()
    assert "from 24 features to 16" in str(error_of(model, ParallelConfig(target_modules=["down_proj"])))
    adapt.attach(model, ParallelConfig(target_modules=["mlp"]))
    with torch.no_grad():
        model(**SUBJECTS["llama"].batch(2))


def test_methods_of_a_transformer_are_refused_on_a_plain_module() -> None:
    for config in (PfeifferConfig(), PrefixTuningConfig()):
        assert str(error_of(Net(), config))


def test_a_name_is_checked_and_taken_once() -> None:
    for name in ("", "a/b", "../x", ".hidden", "x" * 65):
        assert "no name for an adapter" in str(error_of(Net(), LoraConfig(r=2), name=name))
    model = Net()
    adapt.attach(model, LoraConfig(r=2), "one")
    with pytest.raises(IngraftError, match="attached already"):
        adapt.attach(model, LoraConfig(r=2), "one")


@pytest.mark.parametrize("name", ["forward", "q_proj", "mlp", "self_attn", "weight", "training", "a.b"])
def test_an_adapter_may_be_called_like_anything(name: str) -> None:
    """Regression 1: an adapter named like a module was saved without a tensor."""
    model = Net()
    adapt.attach(model, LoraConfig(r=2), "default")
    adapt.attach(model, LoraConfig(r=2), name)
    assert len(adapt.parameters(model, name)) == len(adapt.parameters(model, "default")) == 4
    model(torch.tensor([[1, 2]]))
    adapt.detach(model)


def test_full_tuning_of_a_part_trains_all_of_it() -> None:
    model = Net()
    adapt.attach(model, FullConfig(target_modules=["norm", "q_proj"]))
    assert sorted(adapt.parameters(model, "default")) == ["norm.bias", "norm.weight", "q_proj.bias", "q_proj.weight"]


def test_no_warning_where_nothing_is_odd() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for subject in SUBJECTS.values():
            if subject.transformers:
                adapt.attach(subject.make_redrawn(), LoraConfig(r=2))
