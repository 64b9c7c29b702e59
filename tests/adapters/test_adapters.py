"""AdapterHub's names, and its numbers: the bottlenecks equal the reference implementation."""

from __future__ import annotations

import importlib.util
import json
import shutil
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


def _fill(model: Any, name: str = "a", prefix: str = "") -> set[str]:
    """Give each part the numbers of its block, place and tensor; returns their labels."""
    method = next(one.method for one in adapt.status(model).adapters if one.name == name)
    used: set[str] = set()
    with torch.no_grad():
        for key, parameter in adapt.parameters(model, name).items():
            index = next((part for part in key.split(".") if part.isdigit()), "shared")
            attention = any(part in key for part in ("attention.output.dense", "attn.c_proj", "self_attn.o_proj"))
            place = "" if index == "shared" or method == "reft" else ".attention" if attention else ".output"
            # The path of the site ends where the part's own names begin.
            own = key.split(".")[-2:] if method == "compacter" and index != "shared" else key.split(".")[-1:]
            label = f"{prefix}{index}{place}.{'.'.join(own)}"
            parameter.copy_(MAKER.values(label, tuple(parameter.shape), 0.7 if method == "compacter" else 0.3))
            used.add(label)
    return used


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['family']}-{case['name']}-{case['options'].get('of', '')}"
)
def test_outputs_equal_adapterhub(case: dict[str, Any]) -> None:
    """With the same weights in base and adapters, the outputs are AdapterHub's."""
    model = hub.init(_base(case["family"]))
    if case["method"] == "fusion":
        for member in ("p", "q"):
            model.add_adapter(member, config=hub.AdapterConfig.load(case["options"]["of"], reduction_factor=4))
        model.add_adapter_fusion(hub.Fuse("p", "q"), config=case["name"])
        used = _fill(model, hub.Fuse("p", "q").adapter, "f.") | _fill(model, "p", "p.") | _fill(model, "q", "q.")
        model.set_active_adapters(hub.Fuse("p", "q"))
    else:
        config = hub.AdapterConfig.load(case["name"], **case["options"])
        assert config.method == case["method"]
        model.add_adapter("a", config=config, set_active=True)
        used = _fill(model)
    assert used == {one["label"] for one in case["tensors"]}
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


def _members(model: Any, *names: str) -> None:
    for name in names:
        model.add_adapter(name, config="pfeiffer")
        for parameter in adapt.parameters(model, name).values():
            torch.nn.init.normal_(parameter, std=0.3)


def test_the_names_of_a_fusion_run(tmp_path: Path) -> None:
    """Members stay as they are, the fusion is trained, saved, and loaded over members loaded first."""
    model, inputs = hub.init(_base("bert")), torch.tensor(MAKER.INPUT)
    bare = model(inputs)[0]
    _members(model, "p", "q")
    fuse = hub.Fuse("p", "q")
    model.add_adapter_fusion(fuse)
    assert torch.equal(model(inputs)[0], bare), "an added fusion does not act before it is asked to"
    model.train_adapter_fusion(fuse)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all("adapter:fusion" in name for name in trained)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(5):
        loss = (model(inputs)[0] - 1.0).square().mean()
        losses.append(float(loss.detach()))
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == trained
    tuned = model(inputs)[0]
    for name in ("p", "q"):
        model.save_adapter(tmp_path / name, name)
    model.save_adapter_fusion(tmp_path / "f", fuse)
    other = hub.init(_base("bert"))
    shutil.move(tmp_path / "f" / "adapters", tmp_path / "elsewhere")
    with pytest.raises(IngraftError, match="'p', and no adapter of that name is attached") as caught:
        other.load_adapter_fusion(tmp_path / "f")
    assert len(caught.value.problems) == 2
    shutil.move(tmp_path / "elsewhere" / "q", tmp_path / "f" / "adapters" / "q")
    other.load_adapter(tmp_path / "p")
    other.load_adapter_fusion(tmp_path / "f", set_active=True)
    assert torch.equal(other(inputs)[0], tuned)
    other.set_active_adapters("p")
    assert not torch.allclose(other(inputs)[0], tuned)
    other.set_active_adapters(fuse)
    assert torch.equal(other(inputs)[0], tuned)


def test_a_fusion_keeps_its_members() -> None:
    """None of them can be taken off alone; together they can, and the base is back."""
    model, inputs = hub.init(_base("gpt2")), torch.tensor(MAKER.INPUT)
    bare = model(inputs)[0]
    _members(model, "p", "q")
    model.add_adapter_fusion(["p", "q"], set_active=True)
    with pytest.raises(IngraftError, match=r"fusion\.p\.q acts on p; detach fusion\.p\.q first"):
        model.delete_adapter("p")
    adapt.detach(model, "p", "fusion.p.q")
    model.set_active_adapters(None)
    assert torch.equal(model(inputs)[0], bare)


def test_equal_members_fuse_to_one() -> None:
    """Weights of the attention sum to one: a fusion of an adapter with its twin is the adapter, up to the ones of V."""
    model, inputs = hub.init(_base("llama")), torch.tensor(MAKER.INPUT)
    _members(model, "p", "q")
    for mine, twin in zip(adapt.parameters(model, "p").values(), adapt.parameters(model, "q").values(), strict=True):
        twin.data.copy_(mine)
    model.add_adapter_fusion(["p", "q"], config="static", set_active=True)
    fused = model(inputs)[0]
    model.set_active_adapters("p")
    torch.testing.assert_close(fused, model(inputs)[0], rtol=1e-5, atol=1e-5)


def test_what_cannot_be_fused_is_refused() -> None:
    """Another kind of adapter, other places, one adapter, an adapter twice; each named."""
    model = hub.init(_base("bert"))
    _members(model, "p", "q")
    model.add_adapter("h", config="houlsby")
    model.add_adapter("low", config="lora")
    adapt.attach(model, make_config("oft", {"oft_block_size": 4}), "turned")
    for names, words in (
        (("p", "h"), "'h' and 'p' lie at different places"),
        (("p", "low"), "'low' and 'p' lie at different places"),
        (("p", "turned"), r"'turned' \(oft\) is no adapter that adds"),
        (("p",), "at least two"),
        (("p", "p"), "more than once"),
        (("p", "x"), "'x', and no adapter"),
    ):
        with pytest.raises(IngraftError, match=words):
            model.add_adapter_fusion(hub.Fuse(*names))
    with pytest.raises(IngraftError, match="no fusion of these adapters is attached"):
        model.set_active_adapters(hub.Fuse("p", "q"))
    with pytest.raises(IngraftError, match="did you mean 'dynamic'"):
        model.add_adapter_fusion(["p", "q"], config="dynamik")


def test_the_penalty_of_a_fusion_is_adapterhubs() -> None:
    """0.01 ||V - 1||^2, summed over the layers; none for a static one."""
    model = hub.init(_base("bert"))
    _members(model, "p", "q")
    model.add_adapter_fusion(["p", "q"], set_active=True, name="f")
    adapt.trainable(model, "f")
    values = [p for key, p in adapt.parameters(model, "f").items() if key.endswith(".value")]
    assert len(values) == 2
    found = adapt.penalty(model)
    assert found is not None and float(found.detach()) < 1e-6
    for V in values:
        torch.nn.init.normal_(V)
    found = adapt.penalty(model)
    expected = sum(0.01 * (V - torch.eye(V.shape[0])).square().sum() for V in values)
    assert found is not None
    torch.testing.assert_close(found.detach(), torch.as_tensor(expected).detach())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"config": "pfeifer"}, "pfeiffer"),
        ({"config": "pfeiffer", "reduction": 4}, "reduction_factor"),
        ({"config": "lora", "mh_adapter": True}, "mh_adapter"),
        ({"config": "houlsby", "mh_adapter": False, "output_adapter": False}, "no adapter"),
        ({"config": "loreft", "prefix_positions": 2, "suffix_positions": 1}, "tied_weights=True"),
        ({"config": "compacter", "shared_W_phm": True}, "shared_phm_rule"),
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
    edit: Any = hub.AdapterConfig.load("loreft", layers=[0, 2], prefix_positions=0, suffix_positions=4)
    assert (edit.positions, edit.layers_to_transform, edit.r) == ("l4", (0, 2), 1)
