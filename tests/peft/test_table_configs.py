"""The incumbent's config classes that are made from a table: its names, fields and defaults, and what they mean for a model."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import constants

import ingraft.peft as ours
import peft
from ingraft import IngraftError
from ingraft.methods.registry import incumbents
from ingraft.peft import targets

SMALL: dict[str, dict[str, Any]] = {
    "BOFTConfig": {"boft_block_size": 4},
    "C3AConfig": {"block_size": 16},
    "FourierFTConfig": {"n_frequency": 20},
    "GraloraConfig": {"r": 4, "alpha": 6},
    "HiraConfig": {"r": 4},
    "HRAConfig": {"r": 4},
    "LNTuningConfig": {},
    "LoHaConfig": {"r": 3, "alpha": 5},
    "LoKrConfig": {"r": 3},
    "MissConfig": {"r": 8},
    "OFTConfig": {"oft_block_size": 8},
    "RandLoraConfig": {"r": 4},
    "RoadConfig": {"group_size": 8},
    "ShiraConfig": {"r": 2},
    "TrainableTokensConfig": {"token_indices": [2, 3, 4]},
    "VBLoRAConfig": {"num_vectors": 8, "vector_length": 16},
    "VeraConfig": {"r": 4},
}
"""Options that fit a small model."""


def test_every_method_of_both_libraries_has_its_class() -> None:
    for kind, own in incumbents().items():
        assert getattr(ours, own.name).kind == kind
        assert own.name in ours.__all__


@pytest.mark.parametrize("name", [own.name for own in incumbents().values()])
def test_no_field_of_theirs_is_a_type_error(name: str) -> None:
    """What cannot be honoured is refused by name when the config is used; a file of theirs reads without a word about their fields."""
    theirs = getattr(peft, name)(**({"total_step": 100} if name == "AdaLoraConfig" else {}))
    values = theirs.to_dict()
    known = {field.name for field in dataclasses.fields(getattr(ours, name))}
    assert set(values) - known <= {"peft_type", "peft_version"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(ours.get_peft_config(values)) is getattr(ours, name)


@pytest.mark.parametrize("name", SMALL)
def test_a_class_has_their_fields_and_defaults(name: str, tmp_path: Path) -> None:
    mine, theirs = getattr(ours, name)(), getattr(peft, name)(**({"total_step": 1} if name == "AdaLoraConfig" else {}))
    for field in dataclasses.fields(mine):
        assert getattr(mine, field.name) == getattr(theirs, field.name), field.name
    assert mine.peft_type.value == theirs.peft_type.value
    assert mine == pickle.loads(pickle.dumps(mine)) == copy.deepcopy(mine)
    mine.save_pretrained(tmp_path)
    assert ours.PeftConfig.from_pretrained(tmp_path) == mine
    assert isinstance(peft.PeftConfig.from_pretrained(str(tmp_path)), getattr(peft, name))
    with pytest.raises(TypeError, match="'nothing'"):
        getattr(ours, name)(nothing=1)


@pytest.mark.parametrize("name", SMALL)
def test_a_script_makes_the_adapter_that_theirs_makes(name: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The same modules and numbers of parameters; a file of theirs reads back with their field names."""
    options = SMALL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.make("llama"), getattr(peft, name)(**options, task_type="CAUSAL_LM")).eval()
        mine = ours.get_peft_model(tiny.make("llama"), getattr(ours, name)(**options, task_type="CAUSAL_LM"))
        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (mine, theirs)]
        assert counts[0] == counts[1]
        tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(str(tmp_path))
        again = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
        batch = tiny.example("llama")
        assert torch.allclose(tiny.output(again, batch), tiny.output(theirs, batch), atol=1e-5)
    config = again.peft_config["default"]
    assert type(config) is getattr(ours, name)
    assert {key: getattr(config, key) for key in options} == options
    mine.save_pretrained(tmp_path / "mine")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        there = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "mine").eval()
        assert torch.allclose(tiny.output(there, batch), tiny.output(mine.eval(), batch), atol=1e-5)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ours.LoHaConfig(module_dropout=0.1, rank_dropout=0.2), ("module_dropout = 0.1 has no effect", "rank_dropout")),
        (ours.OFTConfig(r=4, oft_block_size=4), ("exactly one of oft_block_size and r",)),
        (ours.VBLoRAConfig(save_only_topk_weights=True), ("save_only_topk_weights = True",)),
        (ours.VeraConfig(r=0), ("r must be at least 1",)),
        (ours.TrainableTokensConfig(), ("token_indices",)),
        (ours.LoraConfig(use_qalora=True, kasa_config={"r": 1}), ("use_qalora = True", "kasa_config")),
        (ours.PrefixTuningConfig(num_virtual_tokens=2, init_weights="one"), ("init_weights",)),
    ],
)
def test_what_a_config_cannot_mean_is_refused(config: Any, words: tuple[str, ...], tiny: SimpleNamespace) -> None:
    with pytest.raises(IngraftError) as error:
        ours.get_peft_model(tiny.make("llama"), config)
    assert all(text in str(error.value) for text in words)


def test_a_file_may_hold_what_a_script_may_not_ask(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """How it was trained does not concern who uses it."""
    theirs = peft.get_peft_model(tiny.make("llama"), peft.LoHaConfig(r=3, module_dropout=0.1)).eval()
    theirs.save_pretrained(str(tmp_path))
    again = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert again.peft_config["default"].module_dropout == 0.1


NAMES = {"LN_TUNING": "LNTUNING"}


@pytest.mark.parametrize("kind", sorted(targets.BY_TYPE))
def test_the_usual_targets_are_theirs(kind: str) -> None:
    theirs = getattr(constants, f"TRANSFORMERS_MODELS_TO_{NAMES.get(kind, kind)}_TARGET_MODULES_MAPPING")
    for model, names in theirs.items():
        mine = targets.BY_TYPE[kind][model]
        assert (mine if isinstance(mine, str) else list(mine)) == names, model


@pytest.mark.parametrize("kind", sorted({kind.value for kind in ours.PeftType} - set(targets.BY_TYPE)))
def test_the_others_have_loras(kind: str) -> None:
    name = f"TRANSFORMERS_MODELS_TO_{kind}_TARGET_MODULES_MAPPING"
    if kind != "IA3" and hasattr(constants, name):
        assert getattr(constants, name) == constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
