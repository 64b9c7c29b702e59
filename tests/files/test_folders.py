"""Adapter folders: what save promises, and what load refuses."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ingraft
from ingraft import IngraftError, LoraConfig
from ingraft.adapt.files.fingerprint import fingerprint
from ingraft.methods.registry import load as load_method
from ingraft.methods.registry import make_config, records
from ingraft.testing.table import METHODS, row

CONFIG, WEIGHTS, MANIFEST = "adapter_config.json", "adapter_model.safetensors", "ingraft.json"

OPTIONS: dict[str, dict[str, Any]] = {name: row(name).config.options() for name in METHODS} | {
    "lora": {"r": 4, "lora_alpha": 8},
    "bitfit": {"add_bias": True, "target_modules": "all-linear"},
    "prefix": {"num_virtual_tokens": 5, "prefix_projection": True},
    "prompt": {"num_virtual_tokens": 5},
}
"""The laws' options, whose sizes fit a tiny model."""


def attached(
    tiny: SimpleNamespace, method: str = "lora", kind: str = "llama", name: str = "default", **options: Any
) -> Any:
    """A model with a perturbed adapter."""
    model = tiny.make(kind)
    ingraft.attach(model, make_config(method, {**OPTIONS.get(method, {}), **options}), name, seed=3)
    tiny.perturb(ingraft.parameters(model, name).values())
    return model


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that a refused load must leave alone."""
    return (
        type(model),
        {k: v.clone() for k, v in model.state_dict().items()},
        [p.requires_grad for p in model.parameters()],
    )


def unchanged(before: tuple[Any, ...], model: nn.Module) -> bool:
    after = state(model)
    return (
        before[0] is after[0]
        and before[1].keys() == after[1].keys()
        and all(torch.equal(before[1][key], after[1][key]) for key in before[1])
        and before[2] == after[2]
    )


ON_A_DENSE_BASE = [name for name in records() if name != "loftq" and load_method(name).over is None]
"""LoftQ wants packed weights, methods over adapters want those; they have tests of their own."""


def unsealed(folder: Path) -> Path:
    """The same folder as if another program had written it."""
    (folder / MANIFEST).unlink()
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(config | changes))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# ------------------------------------------------------------------------------------------------------------------ save


@pytest.mark.parametrize("method", ON_A_DENSE_BASE)
def test_round_trip_gives_the_same_bits_and_the_same_files(method: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model, batch = attached(tiny, method), tiny.example("llama")
    ingraft.save(model, tmp_path / "once")
    ingraft.save(model, tmp_path / "twice")
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "once")
    assert torch.equal(tiny.output(model, batch), tiny.output(again, batch))
    one, other = ingraft.parameters(model, "default"), ingraft.parameters(again, "default")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    ingraft.save(again, tmp_path / "third")
    assert files(tmp_path / "once") == files(tmp_path / "twice") == files(tmp_path / "third")


@pytest.mark.parametrize("method", ON_A_DENSE_BASE)
def test_a_bfloat16_base_gets_bfloat16_files_with_the_same_logits(
    method: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    model, batch = tiny.make("llama").bfloat16(), tiny.example("llama")
    ingraft.attach(model, make_config(method, OPTIONS.get(method, {})), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "a")
    ingraft.save(model, tmp_path / "exact", dtype=torch.float32)
    stored = {tensor.dtype for key, tensor in load_file(tmp_path / "a" / WEIGHTS).items() if ".shared." not in key}
    assert stored - {torch.int32} == {torch.bfloat16}  # whole numbers stay what they are
    for folder in ("a", "exact"):
        again = tiny.make("llama").bfloat16()
        ingraft.load(again, tmp_path / folder)
        assert torch.equal(tiny.output(model, batch), tiny.output(again, batch))


def test_regression_19_another_process_writes_the_same_bytes(tmp_path: Path) -> None:
    script = (
        "import sys, torch, ingraft\n"
        "torch.manual_seed(0)\n"
        "model = torch.nn.ModuleDict({n: torch.nn.Linear(4, 4) for n in 'abcdefgh'})\n"
        "ingraft.attach(model, ingraft.LoraConfig(r=2, target_modules=set('hgfedcba')), seed=1)\n"
        "ingraft.save(model, sys.argv[1])\n"
    )
    for seed in ("1", "2"):
        subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / seed)], check=True, env={"PYTHONHASHSEED": seed, "PATH": ""}
        )
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_regression_19_an_embedding_is_not_stored_whole(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny, target_modules=["embed_tokens"]), tmp_path / "a")
    assert {key.rpartition(".")[2] for key in load_file(tmp_path / "a" / WEIGHTS)} == {
        "lora_embedding_A",
        "lora_embedding_B",
    }


@pytest.mark.parametrize("name", ["mlp", "self_attn", "layers", "model", "weight", "lora_A", "0"])
def test_regression_1_an_adapter_named_like_a_module_saves_all_its_tensors(
    name: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    model = attached(tiny, name=name)
    ingraft.attach(model, LoraConfig(r=4, lora_alpha=8), "default")
    ingraft.save(model, tmp_path / "named", name)
    ingraft.save(model, tmp_path / "default", "default")
    named, default = load_file(tmp_path / "named" / WEIGHTS), load_file(tmp_path / "default" / WEIGHTS)
    assert len(named) == len(default) == 28
    assert named.keys() == default.keys()
    again = tiny.make("llama")
    assert ingraft.load(again, tmp_path / "named") == name
    ingraft.activate(model, name)
    assert torch.equal(tiny.output(model, tiny.example("llama")), tiny.output(again, tiny.example("llama")))


def test_regression_30_save_and_load_open_no_socket(
    tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    model = attached(tiny, target_modules=["embed_tokens", "q_proj"])
    model.config._name_or_path = "somebody/a-model-on-the-hub"
    ingraft.save(model, tmp_path / "a")
    model.save_pretrained(tmp_path / "b")
    again = tiny.make("llama")
    again.config._name_or_path = "somebody/a-model-on-the-hub"
    ingraft.load(again, tmp_path / "a")


def test_a_folder_is_not_overwritten_silently(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = attached(tiny)
    ingraft.save(model, tmp_path / "a")
    before = files(tmp_path / "a")
    tiny.perturb(ingraft.parameters(model, "default").values())
    with pytest.raises(IngraftError, match="already exists"):
        ingraft.save(model, tmp_path / "a")
    assert files(tmp_path / "a") == before
    ingraft.save(model, tmp_path / "a", overwrite=True)
    assert files(tmp_path / "a") != before


def test_overwriting_leaves_other_files_alone(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = attached(tiny)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "inner").mkdir()
    for _ in range(2):
        ingraft.save(model, tmp_path, overwrite=True)
        (tmp_path / "tokenizer.json").write_text("{1}")  # its owner may go on writing it
        ingraft.load(tiny.make("llama"), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS, MANIFEST, "tokenizer.json", "inner"}


def test_values_that_are_not_finite_are_not_saved(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = attached(tiny)
    with torch.no_grad():
        ingraft.parameters(model, "default")["model.layers.1.mlp.up_proj.lora_B"][0, 0] = float("nan")
    with pytest.raises(IngraftError, match=r"layers\.1\.mlp\.up_proj\.lora_B.* not finite"):
        ingraft.save(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_which_adapter_must_be_clear(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = attached(tiny, name="a")
    ingraft.save(model, tmp_path / "alone")
    ingraft.attach(model, LoraConfig(), "b")
    with pytest.raises(IngraftError, match="a, b"):
        ingraft.save(model, tmp_path / "x")
    with pytest.raises(IngraftError, match="No adapter named 'c'"):
        ingraft.save(model, tmp_path / "x", "c")


def test_the_manifest_tells_where_the_adapter_comes_from(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a", extra={"metrics": {"loss": 1.5}})
    facts = json.loads((tmp_path / "a" / MANIFEST).read_text())["facts"]
    assert (facts["method"], facts["name"], facts["seed"], facts["dtype"]) == ("lora", "default", 3, "float32")
    assert facts["extra"] == {"metrics": {"loss": 1.5}}
    assert facts["base"]["dtype"] == "float32"
    assert facts["versions"]["torch"] == torch.__version__
    assert len(facts["sites"]) == 14


# ------------------------------------------------------------------------------------------------------------------ load


def test_loading_lets_it_act_and_leaves_trainability_alone(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    model = attached(tiny, name="mine")
    assert ingraft.load(model, tmp_path / "a") == "default"
    now = {adapter.name: (adapter.active, adapter.trainable) for adapter in ingraft.status(model).adapters}
    assert now == {"mine": (False, True), "default": (True, False)}
    assert ingraft.load(model, tmp_path / "a", "b", trainable=True) == "b"
    now = {adapter.name: (adapter.active, adapter.trainable) for adapter in ingraft.status(model).adapters}
    assert now == {"mine": (False, False), "default": (False, False), "b": (True, True)}
    with pytest.raises(IngraftError, match="'b' is attached already"):
        ingraft.load(model, tmp_path / "a", "b")


def test_loading_draws_no_random_numbers(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    before = torch.get_rng_state()
    ingraft.load(tiny.make("llama"), tmp_path / "a")
    assert torch.equal(before, torch.get_rng_state())


def test_every_wrong_tensor_is_named_at_once(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    stem = "base_model.model.model.layers.0.self_attn."

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[stem + "q_proj.lora_A.weight"]
        tensors[stem + "k_proj.lora_A.weight"] = torch.zeros(4, 31)
        tensors[stem + "v_proj.lora_A.weight"] = torch.full((4, 32), float("inf"))
        tensors[stem + "o_proj.lora_A.weight"] = torch.zeros(4, 32, dtype=torch.int32)
        tensors["base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 32)

    edit_tensors(unsealed(tmp_path / "a"), spoil)
    model = tiny.make("llama")
    before = state(model)
    with pytest.raises(IngraftError) as error:
        ingraft.load(model, tmp_path / "a")
    found = "\n".join(sorted(text.partition(": ")[2] for text in error.value.problems))
    assert len(error.value.problems) == 5
    for key, words in (
        ("layers.0.self_attn.q_proj", "is missing"),
        ("layers.0.self_attn.k_proj", "has shape [4, 31]"),
        ("layers.0.self_attn.v_proj", "not finite"),
        ("layers.0.self_attn.o_proj", "has dtype I32"),
        ("layers.2.self_attn.q_proj", "belongs to no module"),
    ):
        assert any(key in line and words in line for line in found.splitlines()), (key, found)
    assert unchanged(before, model)
    assert not hasattr(model, "ingraft_control")


def test_a_refusal_beside_another_adapter_changes_nothing(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    edit_tensors(unsealed(tmp_path / "a"), dict.popitem)
    model = attached(tiny, name="mine")
    before, acts = state(model), ingraft.status(model)
    with pytest.raises(IngraftError, match="is missing"):
        ingraft.load(model, tmp_path / "a")
    assert unchanged(before, model)
    assert ingraft.status(model) == acts


@pytest.mark.parametrize("file", [CONFIG, WEIGHTS])
def test_a_changed_file_is_refused_by_its_digest(file: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    data = bytearray((tmp_path / "a" / file).read_bytes())
    data[-3] ^= 1
    (tmp_path / "a" / file).write_bytes(bytes(data))
    with pytest.raises(IngraftError, match=f"{file}: damaged or changed"):
        ingraft.load(tiny.make("llama"), tmp_path / "a")


def test_a_truncated_file_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    weights = unsealed(tmp_path / "a") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(IngraftError, match="not a readable safetensors file"):
        ingraft.load(tiny.make("llama"), tmp_path / "a")


def test_a_pickle_is_refused_with_the_reason(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    folder = unsealed(tmp_path / "a")
    (folder / WEIGHTS).rename(folder / "adapter_model.bin")
    with pytest.raises(IngraftError, match="pickle, which can run code"):
        ingraft.load(tiny.make("llama"), folder)


@pytest.mark.parametrize("missing", [CONFIG, None])
def test_a_folder_without_an_adapter_is_refused(missing: str | None, tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    if missing:
        (tmp_path / "a" / missing).unlink()
    with pytest.raises(IngraftError, match="not an adapter" if missing else "no folder"):
        ingraft.load(tiny.make("llama"), tmp_path / ("a" if missing else "b"))


def test_unknown_fields_are_refused_in_our_files_and_warned_of_in_others(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny, "houlsby"), tmp_path / "ours")
    edit_config(unsealed(tmp_path / "ours"), reduction_facter=2)
    with pytest.raises(IngraftError, match=r"no field 'reduction_facter' \(did you mean 'reduction_factor'"):
        ingraft.load(tiny.make("llama"), tmp_path / "ours")
    ingraft.save(attached(tiny), tmp_path / "theirs")
    edit_config(unsealed(tmp_path / "theirs"), a_field_of_next_year=True)
    with pytest.warns(UserWarning, match="a_field_of_next_year"):
        ingraft.load(tiny.make("llama"), tmp_path / "theirs")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"r": "four"}, "r: "),
        ({"r": 10**12}, "r = 1000000000000 is larger than any size"),
        ({"r": 60_000}, "asks for"),
        ({"r": 0}, "r must be at least 1"),
        ({"peft_type": "LORRA"}, "did you mean 'LORA'"),
        ({"peft_type": 3}, "no peft_type"),
        ({"target_modules": None}, "target_modules is missing"),
        ({"target_modules": ["nothing"]}, "matches no module"),
        ({"target_modules": "(("}, "no regular expression"),
        ({"target_modules": ["q_proj", 3]}, "target_modules must be a name or a list of names"),
        ({"modules_to_save": 3}, "modules_to_save must be"),
        ({"layers_to_transform": ["1"]}, "layers_to_transform must be"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path must be"),
        ({"bias": "some"}, "bias = 'some' is not supported"),
        ({"use_dora": True, "init_lora_weights": "olora"}, "init_lora_weights must be"),
        ({"use_dora": "yes"}, "does not have"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_x"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ],
)
def test_what_a_config_cannot_mean_here_is_refused_by_name(
    changes: dict[str, Any], words: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    edit_config(unsealed(tmp_path / "a"), **changes)
    model = tiny.make("llama")
    with pytest.raises(IngraftError) as error:
        ingraft.load(model, tmp_path / "a")
    assert words in str(error.value)
    assert CONFIG in str(error.value)
    assert not hasattr(model, "ingraft_control")


def test_regression_29_a_config_is_data_and_imports_nothing(tmp_path: Path, tiny: SimpleNamespace) -> None:
    (tmp_path / "evil_module.py").write_text("raise SystemExit('imported')\n")
    ingraft.save(attached(tiny), tmp_path / "a")
    edit_config(
        unsealed(tmp_path / "a"),
        auto_mapping={"base_model_class": "Evil", "parent_library": "evil_module"},
        megatron_core="evil_module",
        megatron_config={"a": 1},
        runtime_config={"import": "evil_module"},
    )
    sys.path.insert(0, str(tmp_path))
    try:
        with pytest.warns(UserWarning, match="runtime_config"):
            ingraft.load(tiny.make("llama"), tmp_path / "a")
    finally:
        sys.path.remove(str(tmp_path))
    assert "evil_module" not in sys.modules


# ------------------------------------------------------------------------------------------------------------------ the base


def test_regression_7_another_base_of_the_same_shapes_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    other = tiny.make("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(IngraftError, match=r"another base.*the values of the weights.*--allow-base-mismatch"):
        ingraft.load(other, tmp_path / "a")
    name = ingraft.load(other, tmp_path / "a", allow_base_mismatch=True)
    assert other.ingraft_control.adapters[name].facts["base_mismatch"] == ["the values of the weights (content)"]


def test_regression_7_other_settings_with_the_same_weights_are_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    other = tiny.make("llama")
    other.config.rms_norm_eps = 0.1
    with pytest.raises(IngraftError, match="the architecture's settings"):
        ingraft.load(other, tmp_path / "a")


@pytest.mark.parametrize("sealed", [True, False])
def test_regression_7_a_base_with_fewer_layers_is_refused(sealed: bool, tmp_path: Path, tiny: SimpleNamespace) -> None:
    ingraft.save(attached(tiny), tmp_path / "a")
    if not sealed:
        unsealed(tmp_path / "a")
    shorter = tiny.make("llama")
    del shorter.model.layers[1]
    with pytest.raises(IngraftError, match="another base" if sealed else r"layers\.1\..* belongs to no module"):
        ingraft.load(shorter, tmp_path / "a")


def test_regression_7_a_file_without_fingerprint_is_compared_by_name(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = attached(tiny)
    model.config._name_or_path = "someone/small-llama"
    ingraft.save(model, tmp_path / "a")
    unsealed(tmp_path / "a")
    here = tiny.make("llama")
    here.config._name_or_path = "models/Small-Llama"
    ingraft.load(here, tmp_path / "a")
    elsewhere = tiny.make("llama")
    elsewhere.config._name_or_path = "someone/other"
    with pytest.warns(UserWarning, match="trained on 'someone/small-llama' and is put into 'someone/other'"):
        ingraft.load(elsewhere, tmp_path / "a")


def test_the_fingerprint_is_the_bases_own(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    bare = fingerprint(model)
    assert {key: value for key, value in fingerprint(tiny.make("llama").bfloat16()).items() if key != "dtype"} == {
        key: value for key, value in bare.items() if key != "dtype"
    }
    ingraft.attach(model, LoraConfig())
    tiny.perturb(ingraft.parameters(model, "default").values())
    assert fingerprint(model) == bare
    ingraft.merge(model)
    assert fingerprint(model) == bare
    ingraft.unmerge(model)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert fingerprint(model)["content"] != bare["content"]


def test_run_time_settings_are_no_part_of_the_fingerprint(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    bare = fingerprint(model)
    model.config.use_cache = False
    model.config.pad_token_id = 5
    model.config.problem_type = "regression"
    model.set_attn_implementation("eager")
    assert fingerprint(model) == bare


def test_a_fresh_head_that_is_saved_whole_may_start_anywhere(tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("bert")
    for where, whole in (("whole", ("classifier",)), ("beside", ())):
        model = attached(tiny, kind="bert", target_modules=["query"], modules_to_save=whole)
        ingraft.save(model, tmp_path / where)
        other = tiny.make("bert")
        nn.init.normal_(other.classifier.weight)
        if whole:
            ingraft.load(other, tmp_path / where)
            assert torch.equal(tiny.output(model, batch), tiny.output(other, batch))
        else:
            with pytest.raises(IngraftError, match="modules_to_save"):
                ingraft.load(other, tmp_path / where)


def test_regression_8_names_that_match_nothing_are_reported_and_head_is_not_lm_head(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    with pytest.raises(IngraftError, match=r"target_modules: 'v_prj' matches no module \(did you mean 'v_proj'"):
        ingraft.attach(model, LoraConfig(target_modules=("q_proj", "v_prj")))
    with pytest.raises(IngraftError, match=r"modules_to_save: 'head' matches no module \(did you mean 'lm_head'"):
        ingraft.attach(model, LoraConfig(modules_to_save=("head",)))
    assert not hasattr(model, "ingraft_control")
    ingraft.attach(model, LoraConfig(modules_to_save=("lm_head",)))
    assert "lm_head" in model.ingraft_control.adapters["default"].sites


def test_regression_18_all_linear_leaves_the_head_of_a_plain_module_alone(tiny: SimpleNamespace) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    ingraft.attach(model, LoraConfig(r=2, target_modules="all-linear"))
    assert list(model.ingraft_control.adapters["default"].sites) == ["0", "2"]
