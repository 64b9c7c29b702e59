"""AdapterHub's adapter folders, as `adapters` 1.3 writes them: settings and names below are copied from such folders.

That the methods compute what AdapterHub computes is held by `tests/adapters`; here it is that each number lands where it belongs.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import ingraft
from ingraft.errors import IngraftError

OFF = ["cross_adapter", "inv_adapter", "ln_after", "ln_before", "phm_layer", "use_gating", "adapter_residual_before_ln"]
BOTTLENECK: dict[str, Any] = {
    **dict.fromkeys(OFF, False),
    "dropout": 0.0,
    "scaling": 1.0,
    "stochastic_depth": 0.0,
    "leave_out": [],
    "is_parallel": False,
    "mh_adapter": True,
    "output_adapter": True,
    "original_ln_before": False,
    "original_ln_after": True,
    "non_linearity": "swish",
    "reduction_factor": 4,
    "residual_before_ln": True,
    "init_weights": "bert",
    "phm_bias": True,
    "phm_c_init": "normal",
    "phm_dim": 4,
    "phm_init_range": 0.0001,
    "phm_rank": 1,
    "learn_phm": True,
    "factorized_phm_W": True,
    "factorized_phm_rule": False,
    "shared_phm_rule": True,
    "shared_W_phm": False,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "init_weights_seed": None,
}
SEQ = BOTTLENECK | {"mh_adapter": False, "original_ln_before": True, "non_linearity": "relu"}
PAR = BOTTLENECK | {"mh_adapter": False, "is_parallel": True, "non_linearity": "relu", "scaling": 4.0}
LORA: dict[str, Any] = {
    "architecture": "lora",
    "alpha": 16,
    "r": 2,
    "dropout": 0.0,
    "composition_mode": "add",
    "use_gating": False,
    "attn_matrices": ["q", "v"],
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "init_weights": "lora",
    "leave_out": [],
    "dtype": None,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
}
IA3 = LORA | {"alpha": 1, "r": 1, "composition_mode": "scale", "init_weights": "ia3", "intermediate_lora": True}

LAYERS = [f"bert.encoder.layer.{index}" for index in (0, 1)]
BOTH = [f"{layer}.{place}" for layer in LAYERS for place in ("attention.output", "output")]
LAST = [f"{layer}.output" for layer in LAYERS]


def drawn(name: str, *shape: int) -> Tensor:
    """A value of its own for every name."""
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


def narrow(places: list[str]) -> dict[str, Tensor]:
    shapes = {
        "adapter_down.0.weight": (8, 32),
        "adapter_down.0.bias": (8,),
        "adapter_up.weight": (32, 8),
        "adapter_up.bias": (32,),
    }
    keys = {f"{place}.adapters.task.{end}": shape for place in places for end, shape in shapes.items()}
    return {key: drawn(key, *shape) for key, shape in keys.items()}


def loras(*shapes: tuple[str, str, tuple[int, ...]]) -> dict[str, Tensor]:
    keys = {f"{layer}.{path}.loras.task.{end}": shape for layer in LAYERS for path, end, shape in shapes}
    return {key: drawn(key, *shape) for key, shape in keys.items()}


def written(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor], **other: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"config": settings, "hidden_size": 32, "model_class": "BertForSequenceClassification", "model_name": ""}
    config |= {"model_type": "bert", "name": "task", "version": "adapters.1.3.0", **other}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter.safetensors")
    return folder


OURS = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}


@pytest.mark.parametrize(
    ("method", "settings", "places", "sites"),
    [
        ("houlsby", BOTTLENECK, BOTH, [f"{place}.dense" for place in BOTH]),
        ("houlsby", BOTTLENECK | {"output_adapter": False}, BOTH[::2], [f"{place}.dense" for place in BOTH[::2]]),
        ("pfeiffer", SEQ, LAST, [f"{place}.LayerNorm" for place in LAST]),
        ("parallel", PAR, LAST, [f"{place}.dense" for place in LAST]),
    ],
)
def test_bottlenecks(
    method: str, settings: dict[str, Any], places: list[str], sites: list[str], tmp_path: Path, tiny: SimpleNamespace
) -> None:
    tensors, model = narrow(places), tiny.make("bert")
    assert ingraft.load(model, written(tmp_path / "x", settings, tensors)) == "task"
    assert ingraft.status(model).adapters[0].method == method
    own = ingraft.parameters(model, "task")
    assert len(own) == len(tensors)
    for place, site in zip(places, sites, strict=True):
        for theirs, ours in OURS.items():
            assert torch.equal(own[f"{site}.{ours}"], tensors[f"{place}.adapters.task.{theirs}"])
    config = model.ingraft_control.adapters["task"].config
    assert config.non_linearity == settings["non_linearity"]
    assert config.scaling == settings["scaling"]


def test_lora_and_ia3_sit_where_the_file_says(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model, batch = tiny.make("bert"), tiny.example("bert")
    tensors = loras(("attention.self.query", "lora_A", (2, 32)), ("attention.self.query", "lora_B", (32, 2)))
    scales = loras(("attention.self.key", "lora_B", (32, 1)), ("intermediate.dense", "lora_B", (48, 1)))
    ingraft.load(model, written(tmp_path / "lora", LORA, tensors), "lora")
    ingraft.load(model, written(tmp_path / "ia3", IA3, scales), "ia3")
    ingraft.activate(model, "lora", "ia3")
    by_hand = tiny.make("bert")
    with torch.no_grad():
        for layer in LAYERS:
            query = f"{layer}.attention.self.query"
            change = 8.0 * tensors[f"{query}.loras.task.lora_B"] @ tensors[f"{query}.loras.task.lora_A"]
            by_hand.get_submodule(query).weight += change
            for path in (f"{layer}.attention.self.key", f"{layer}.intermediate.dense"):
                module, factor = by_hand.get_submodule(path), scales[f"{path}.loras.task.lora_B"]
                module.weight *= factor
                module.bias *= factor[:, 0]
    assert torch.allclose(tiny.output(model, batch), tiny.output(by_hand, batch), atol=1e-5)


def test_names_without_the_bases_prefix_and_a_head_that_stays(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Saved from a bare base, loaded into a classifier; the head in the folder is left alone, which is said."""
    tensors = {key.removeprefix("bert."): value for key, value in narrow(LAST).items()}
    folder = written(tmp_path / "x", SEQ, tensors)
    (folder / "head_config.json").write_text("{}")
    model = tiny.make("bert")
    with pytest.warns(UserWarning, match="prediction head beside the adapter is not read"):
        ingraft.load(model, folder, "mine")
    assert len(ingraft.parameters(model, "mine")) == len(tensors)


@pytest.mark.parametrize(
    ("settings", "tensors", "words"),
    [
        (BOTTLENECK | {"use_gating": True}, narrow(BOTH), "use_gating = True"),
        (BOTTLENECK | {"scaling": "learned"}, narrow(BOTH), "scaling = 'learned'"),
        (SEQ | {"mh_adapter": True}, narrow(BOTH), "mh_adapter = True"),
        (BOTTLENECK | {"leave_out": [0]}, narrow(BOTH), r"leave_out = \[0\]"),
        (LORA | {"use_dora": True}, {}, "use_dora = True"),
        (LORA | {"r": "many"}, {}, "r = 'many'"),
        (BOTTLENECK | {"non_linearity": []}, narrow(BOTH), "non_linearity must be a text"),
        (BOTTLENECK | {"reduction_factor": 1e-9}, narrow(BOTH), "asks for"),
        ({"architecture": "prefix_tuning", "prefix_length": 3}, {}, "not read from its files"),
        (BOTTLENECK, narrow(BOTH[:2]), "holds nothing for"),
        (BOTTLENECK, narrow([*BOTH, "bert.encoder.layer.7.output"]), "places are not in this model"),
        (
            BOTTLENECK,
            narrow(BOTH) | {"bert.invertible": torch.zeros(1)},
            "tensors that houlsby does not have: bert.invertible",
        ),
        (BOTTLENECK | {"reduction_factor": 8}, narrow(BOTH), r"shape \[8, 32\]; this layer needs \[4, 32\]"),
    ],
)
def test_what_is_not_covered_is_refused_by_name(
    settings: dict[str, Any], tensors: dict[str, Tensor], words: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    model = tiny.make("bert")
    with pytest.raises(IngraftError, match=words):
        ingraft.load(model, written(tmp_path / "x", settings, tensors))
    assert not hasattr(model, "ingraft_control")


def test_parallel_bottlenecks_differ_on_blocks_that_begin_with_their_norm(
    tmp_path: Path, tiny: SimpleNamespace
) -> None:
    with pytest.raises(IngraftError, match="begin with their norm"):
        ingraft.load(tiny.make("llama"), written(tmp_path / "x", PAR, narrow(["model.layers.0.mlp"])))


def test_a_pickle_is_refused_with_advice(tmp_path: Path, tiny: SimpleNamespace) -> None:
    folder = written(tmp_path / "x", BOTTLENECK, {"x": torch.zeros(1)})
    (folder / "adapter.safetensors").rename(folder / "pytorch_adapter.bin")
    with pytest.raises(IngraftError, match="use_safetensors=True"):
        ingraft.load(tiny.make("bert"), folder)
