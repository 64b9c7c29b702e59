"""AdapterHub's names, and its numbers: the bottlenecks equal the reference implementation."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers

import ingraft.adapters as hub
from ingraft import adapt
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "adapterhub.json").read_text())["cases"]
TENSORS = {"down": "down", "down_bias": "down_bias", "up": "up", "up_bias": "up_bias"}


def _maker() -> ModuleType:
    """The script that made the numbers, for its formula and its configs."""
    spec = importlib.util.spec_from_file_location("make_adapterhub", GOLDEN / "make_adapterhub.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


def _base(family: str) -> Any:
    if family == "bert":
        model: Any = transformers.BertModel(transformers.BertConfig(**MAKER.BERT), add_pooling_layer=False)
    elif family == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**MAKER.GPT2))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**MAKER.LLAMA))
    MAKER.fill_base(model)
    return model.eval()


def _fill(model: Any) -> None:
    """Give each part the numbers of its block, place and tensor."""
    with torch.no_grad():
        for key, parameter in adapt.parameters(model, "a").items():
            path, _, tensor = key.rpartition(".")
            index = next(part for part in path.split(".") if part.isdigit())
            attention = path.endswith(("attention.output.dense", "attn.c_proj", "self_attn.o_proj"))
            label = f"{index}.{'attention' if attention else 'output'}.{TENSORS[tensor]}"
            parameter.copy_(MAKER.values(label, tuple(parameter.shape), 0.3))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['family']}-{case['method']}")
def test_bottlenecks_equal_adapterhub(case: dict[str, Any]) -> None:
    """With the same weights in base and adapter, the outputs are AdapterHub's."""
    model = _base(case["family"])
    adapt.attach(model, make_config(case["method"], case["options"]), "a")
    _fill(model)
    with torch.no_grad():
        output = model(torch.tensor(MAKER.INPUT))[0]
    expected = torch.tensor(case["output"])
    difference = (output.flatten()[::7] - expected).abs().max().item()
    assert difference < 2e-5, difference


def test_the_names_of_a_pfeiffer_run() -> None:
    """init, add, train, save, load, switch off: the model stays what it is, and its numbers come back."""
    model = hub.init(_base("bert"))
    inputs = torch.tensor(MAKER.INPUT)
    before = model(inputs)[0]
    model.add_adapter("task", config=hub.AdapterConfig.load("pfeiffer", reduction_factor=8))
    assert torch.equal(model(inputs)[0], before), "an added adapter does not act before it is asked to"
    model.train_adapter("task")
    assert all("adapter:task" in name for name, p in model.named_parameters() if p.requires_grad)
    for parameter in adapt.parameters(model, "task").values():
        torch.nn.init.normal_(parameter, std=0.1)
    tuned = model(inputs)[0]
    assert not torch.allclose(tuned, before)
    model.set_active_adapters(None)
    assert torch.equal(model(inputs)[0], before)


def test_saved_and_loaded(tmp_path: Path) -> None:
    """An adapter saved by one model acts the same in another."""
    model, other = hub.init(_base("gpt2")), hub.init(_base("gpt2"))
    model.add_adapter("a", config="houlsby", set_active=True)
    _fill(model)
    model.save_adapter(tmp_path / "a", "a")
    assert other.load_adapter(tmp_path / "a", load_as="again", set_active=True) == "again"
    inputs = torch.tensor(MAKER.INPUT)
    assert torch.equal(other(inputs)[0], model(inputs)[0])


def test_stacked_adapters_act_in_order() -> None:
    """Stack("a", "b") is both, a first."""
    model = hub.init(_base("gpt2"))
    inputs = torch.tensor(MAKER.INPUT)
    for name in ("a", "b"):
        model.add_adapter(name, config="pfeiffer")
        for parameter in adapt.parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.2)
    model.set_active_adapters(hub.Stack("a", "b"))
    first = model(inputs)[0]
    model.set_active_adapters(hub.Stack("b", "a"))
    assert not torch.allclose(model(inputs)[0], first)
    model.set_active_adapters(["a", "b"])
    assert torch.equal(model(inputs)[0], first)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": "pfeifer"}, "pfeiffer"),
        ({"config": "pfeiffer", "reduction": 4}, "reduction_factor"),
        ({"config": "lora", "mh_adapter": True}, "mh_adapter"),
        ({"config": "houlsby", "mh_adapter": False, "output_adapter": False}, "no adapter"),
    ],
)
def test_wrong_configs_are_refused_by_name(options: dict[str, Any], words: str) -> None:
    """What is wrong is named, with what was meant."""
    with pytest.raises(IngraftError, match=words):
        hub.AdapterConfig.load(options.pop("config"), **options)


def test_flags_choose_the_places() -> None:
    """mh_adapter and output_adapter mean the attention's output and the MLP's."""
    assert hub.AdapterConfig.load("houlsby", output_adapter=False).target_modules == ("attention-out",)
    assert hub.AdapterConfig.load("seq_bn", mh_adapter=True, output_adapter=True).method == "houlsby"
    assert hub.AdapterConfig.load("pfeiffer").target_modules is None
