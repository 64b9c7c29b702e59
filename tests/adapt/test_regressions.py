"""Defects of other libraries that concern places and ties, each as a test of its own (the numbers are those of the list they come from)."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ingraft.adapt as adapt
from ingraft.adapt.control import part_of, require_control
from ingraft.errors import IngraftError
from ingraft.methods.lora import LoRA, LoraConfig
from ingraft.peft import LoraConfig as TheirConfig
from ingraft.peft import get_peft_model
from ingraft.testing.cases import Case, Snapshot, close, randomise, run, same
from ingraft.testing.subjects import SUBJECTS
from ingraft.testing.table import METHODS, row


def test_regression_1_an_adapter_named_like_a_module_is_saved_whole(tmp_path: Path) -> None:
    """The incumbent's file of `default` holds no tensor where another adapter is called `mlp` or `self_attn`."""
    model = SUBJECTS["llama"].make_redrawn()
    for name in ("default", "mlp", "self_attn"):
        adapt.attach(model, LoraConfig(r=2), name)
        randomise(model, name)
    for name in ("default", "mlp", "self_attn"):
        adapt.save(model, tmp_path / name, name, dtype=torch.float32)
        saved = load_file(tmp_path / name / "adapter_model.safetensors")
        own = adapt.parameters(model, name)
        assert len(saved) == len(own) == 28
        for key, value in own.items():
            same(saved[f"base_model.model.{key}.weight"], value.detach(), key)


def test_regression_2_layers_that_share_their_weights_are_never_merged_into_one() -> None:
    """The incumbent's replicated layers share weights, and merging lands every layer's change on the same matrix."""
    model: Any = SUBJECTS["llama"].make_redrawn()
    batch = SUBJECTS["llama"].batch(3)
    model.model.layers.append(copy.copy(model.model.layers[1]))  # a third layer of the second one's weights
    replica = model.model.layers[2]
    replica._modules = dict(replica._modules)
    replica.mlp = copy.deepcopy(replica.mlp)
    for name in ("gate_proj", "up_proj", "down_proj"):
        replica.mlp.get_submodule(name)._parameters["weight"] = model.model.layers[1].mlp.get_submodule(name).weight
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the layers share a weight
        adapt.attach(model, LoraConfig(r=2, target_modules=["down_proj"]))
    randomise(model, "default")
    bits = {key: p.detach().clone() for key, p in adapt.base_parameters(model).items()}
    active = run(model, batch)
    with pytest.raises(
        IngraftError, match=r"layers\.1\.mlp\.down_proj\.weight is tied to model\.layers\.2\.mlp\.down_proj"
    ):
        adapt.merge(model)
    for key, p in adapt.base_parameters(model).items():
        same(p.detach(), bits[key], key)
    adapt.merge(model, untie=True)
    close(run(model, batch), active, "merged and active")


def test_regression_2_the_incumbents_option_is_refused_by_name() -> None:
    model: Any = SUBJECTS["llama"].make_redrawn()
    before = Snapshot.of(model)
    with pytest.raises(IngraftError, match="layer_replication"):
        get_peft_model(model, TheirConfig(layer_replication=[(0, 2)], target_modules=["q_proj"]))
    before.assert_restored(model)


def test_regression_3_merging_a_tied_weight_moves_it_by_one_change_exactly() -> None:
    """The incumbent moves a tied embedding by twice the change, or by the change of one side only where both are adapted."""
    for targets in (["wte"], ["wte", "lm_head"]):
        model: Any = SUBJECTS["gpt2"].make_redrawn()
        batch = SUBJECTS["gpt2"].batch(3)
        old = model.lm_head.weight.detach().clone()
        assert model.lm_head.weight is model.transformer.wte.weight
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the two share a weight
            adapt.attach(model, LoraConfig(r=2, target_modules=targets))
        randomise(model, "default")
        active = run(model, batch)
        with pytest.raises(IngraftError, match="tied to"):
            adapt.merge(model)
        same(model.lm_head.weight.detach(), old, "the tied weight after the refusal")
        part = part_of(model.transformer.wte, "default")
        assert isinstance(part, LoRA)
        adapt.merge(model, untie=True)
        close(run(model, batch), active, "merged and active")
        close(
            model.transformer.wte.weight.detach() - old,
            part.delta(old.T).T.detach(),
            "what the merge moved the embedding by",
            times=4.0,
        )
        if targets == ["wte"]:
            same(model.lm_head.weight.detach(), old, "the side without an adapter")
        adapt.unmerge(model)
        assert model.lm_head.weight is model.transformer.wte.weight


def test_regression_3_the_incumbents_option_makes_no_two_adapters_of_one_weight() -> None:
    """`ensure_weight_tying` means a pair of factors on one storage there, stepped twice and merged twice; a script with it is refused here. (Its
    files are read, `tests/peft/test_heads.py`: nothing trains them as one.)"""
    model: Any = SUBJECTS["gpt2"].make_redrawn()
    before = Snapshot.of(model)
    with pytest.raises(IngraftError, match="ensure_weight_tying"):
        get_peft_model(model, TheirConfig(ensure_weight_tying=True, target_modules=["wte"]))
    before.assert_restored(model)


def test_regression_8_every_pattern_that_means_nothing_is_named() -> None:
    """The incumbent says nothing of a name in target_modules, modules_to_save, exclude_modules or rank_pattern that matches no module."""
    model = SUBJECTS["llama"].make_redrawn()
    before = Snapshot.of(model)
    config = LoraConfig(
        r=2,
        target_modules=["q_proj", "v_porj"],
        modules_to_save=["head"],
        exclude_modules=["k_prj"],
        rank_pattern={"o_poj": 4},
        target_parameters=["experts.down"],
    )
    with pytest.raises(IngraftError) as caught:
        adapt.attach(model, config)
    text = str(caught.value)
    for name in ("'v_porj'", "'head'", "'k_prj'", "'o_poj'", "'experts.down'"):
        assert name in text
    before.assert_restored(model)


PLAIN = [subject for subject in SUBJECTS.values() if not subject.transformers]


@pytest.mark.parametrize("subject", PLAIN, ids=lambda one: one.name)
def test_regression_15_a_method_trains_something_at_every_place_or_is_refused(subject: Any) -> None:
    """The incumbent has a method that takes any kind of layer, trains nothing there, and says nothing."""
    for name in METHODS:
        case = Case(row=row(name), subject=subject)
        if case.method.over is not None:
            continue
        model: nn.Module = case.base()
        before = Snapshot.of(model)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                adapt.attach(model, case.config, "a")
        except IngraftError as error:
            assert str(error).strip(), name
            before.assert_restored(model)
            continue
        trained = adapt.parameters(model, "a")
        for path in require_control(model).adapters["a"].sites:
            assert any(key.startswith(f"{path}.") for key in trained), f"{name} trains nothing in {path}"


def test_regression_18_all_linear_leaves_the_head_of_a_plain_module_alone() -> None:
    """The incumbent adapts the output head of a plain module as well."""
    plain = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    adapt.attach(plain, LoraConfig(r=2))
    assert list(require_control(plain).adapters["default"].sites) == ["0", "2"]


def test_a_refusal_names_the_places_once_and_not_all_of_a_hundred() -> None:
    """A rank above every layer's: each place is said once, a few of many, and how many there are."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(40)))
    before = Snapshot.of(model)
    with pytest.raises(IngraftError) as caught:
        adapt.attach(model, LoraConfig(r=64))
    assert len(caught.value.problems) == len(set(caught.value.problems)) < 12
    assert "and 31 other places" in caught.value.problems[-1]
    before.assert_restored(model)
