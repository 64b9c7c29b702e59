"""LoRA on every kind of layer that Hugging Face PEFT has it on: files of either side load in the other and compute the same."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ingraft.adapt as adapt
import peft
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config
from ingraft.testing.cases import close, differs, randomise, run
from ingraft.testing.subjects import SUBJECTS

EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]

KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora-conv1d": ("conv1d", "lora", {"target_modules": ["first"]}),
    "dora-conv1d": ("conv1d", "dora", {"target_modules": ["first"]}),
    "lora-conv3d": ("conv3d", "lora", {"target_modules": ["second"]}),
    "dora-conv3d": ("conv3d", "dora", {"target_modules": ["second"]}),
    "ia3-conv3d": ("conv3d", "ia3", {"target_modules": ["second"]}),
    "lora-attention": ("attention", "lora", {"target_modules": ["joint", "head"]}),
    "lora-experts": ("mixtral", "lora", {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "lora-one-tensor": ("mixtral", "lora", {"target_modules": [], "target_parameters": ["experts.down_proj"]}),
    "rslora-experts": ("mixtral", "rslora", {"target_modules": [], "target_parameters": EXPERTS}),
}
"""Name -> subject, method, and the places, which both sides call the same. (PEFT knows neither dilation nor padding modes.)"""


def _theirs(method: str, options: dict[str, Any]) -> Any:
    if method == "ia3":
        return peft.IA3Config(feedforward_modules=[], **options)
    return peft.LoraConfig(r=4, lora_alpha=12, use_dora=method == "dora", use_rslora=method == "rslora", **options)


def _ours(method: str, options: dict[str, Any]) -> Any:
    return make_config(method, options if method == "ia3" else {"r": 4, "lora_alpha": 12, **options})


@pytest.mark.parametrize("name", KINDS)
def test_ours_loads_in_peft(name: str, tmp_path: Path) -> None:
    """A file written here, loaded by PEFT, computes what it computes here."""
    where, method, options = KINDS[name]
    subject = SUBJECTS[where]
    model, batch = subject.make_redrawn(), subject.batch(3)
    base = run(model, batch)
    adapt.attach(model, _ours(method, options), "default", seed=1)
    randomise(model, "default")
    ours = run(model, batch)
    differs(ours, base, "adapter and base")
    adapt.save(model, tmp_path, dtype=torch.float32)
    theirs: Any = peft.PeftModel.from_pretrained(subject.make_redrawn(), str(tmp_path)).eval()  # type: ignore[arg-type]
    close(run(theirs, batch), ours, "PEFT and Ingraft", times=2.0)


@pytest.mark.parametrize("name", KINDS)
def test_theirs_loads_here(name: str, tmp_path: Path) -> None:
    """A file written by PEFT, loaded here, computes what it computes there, and is written back tensor by tensor."""
    where, method, options = KINDS[name]
    subject = SUBJECTS[where]
    batch = subject.batch(3)
    torch.manual_seed(2)
    theirs: Any = peft.get_peft_model(subject.make_redrawn(), _theirs(method, options)).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = run(theirs, batch)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    here = subject.make_redrawn()
    differs(expected, run(here, batch), "PEFT's adapter and base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt.load(here, tmp_path / "theirs")
    close(run(here, batch), expected, "Ingraft and PEFT", times=2.0)
    adapt.save(here, tmp_path / "back", dtype=torch.float32)
    before, after = (load_file(tmp_path / side / "adapter_model.safetensors") for side in ("theirs", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_the_first_registered_tensor_lies_innermost(tmp_path: Path) -> None:
    """The keys of stacked experts say which tensor is meant by nesting alone: the first that the class registers is the innermost."""
    model = SUBJECTS["mixtral"].make_redrawn()
    adapt.attach(model, make_config("lora", {"r": 2, "target_modules": [], "target_parameters": EXPERTS[::-1]}))
    adapt.save(model, tmp_path)
    shapes = {key: list(value.shape) for key, value in load_file(tmp_path / "adapter_model.safetensors").items()}
    start = "base_model.model.model.layers.0.mlp.experts."
    assert shapes[start + "base_layer.lora_A.weight"] == [6, 16] and shapes[start + "base_layer.lora_B.weight"] == [
        48,
        6,
    ]
    assert shapes[start + "lora_A.weight"] == [6, 24] and shapes[start + "lora_B.weight"] == [16, 6]


def test_what_peft_does_not_have_is_kept_in_a_format_of_our_own(tmp_path: Path) -> None:
    """Attentions with a tensor for each projection, one projection alone, DoRA on experts: our own files, whole."""
    for where, method, options in (
        ("attention", "lora", {"target_modules": ["split"]}),
        ("attention", "lora", {"target_modules": ["joint.out_proj"]}),
        ("mixtral", "dora", {"target_modules": [], "target_parameters": EXPERTS}),
    ):
        subject = SUBJECTS[where]
        model, batch = subject.make_redrawn(), subject.batch(3)
        adapt.attach(model, _ours(method, options), "a", seed=1)
        randomise(model, "a")
        adapt.save(model, tmp_path / "a", "a", dtype=torch.float32, overwrite=True)
        assert f'"INGRAFT_{method.upper()}"' in (tmp_path / "a" / "adapter_config.json").read_text()
        other: nn.Module = subject.make_redrawn()
        adapt.load(other, tmp_path / "a")
        close(run(other, batch), run(model, batch), f"{method} on {where}, saved and loaded")


def test_tensors_that_a_method_cannot_have_in_peft_are_refused(tmp_path: Path) -> None:
    """A file that claims an IA3 on expert tensors means something that PEFT does not have."""
    model = SUBJECTS["mixtral"].make_redrawn()
    adapt.attach(model, make_config("ia3", {"target_modules": ["k_proj"]}))
    adapt.save(model, tmp_path)
    (tmp_path / "ingraft.json").unlink()
    config = tmp_path / "adapter_config.json"
    config.write_text(
        config.read_text().replace(
            '"peft_type": "IA3"', '"peft_type": "IA3",\n  "target_parameters": ["experts.down_proj"]'
        )
    )
    with pytest.raises(IngraftError, match="target_parameters"):
        adapt.load(SUBJECTS["mixtral"].make_redrawn(), tmp_path)
