"""Files of Hugging Face PEFT's that hold less than their config says, or part of what a base ties: read as they are meant, or refused in words."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import ingraft
import ingraft.peft
import peft
from ingraft.errors import IngraftError

SOME = ["q_proj", "v_proj", "down_proj"]
VBLORA = {"r": 3, "vector_length": 16, "target_modules": SOME, "save_only_topk_weights": True}

SHORT: dict[str, Callable[[], Any]] = {
    "boft-two-factors": lambda: peft.BOFTConfig(boft_n_butterfly_factor=2, target_modules=SOME),
    "boft-more-than-fit": lambda: peft.BOFTConfig(boft_block_size=16, boft_n_butterfly_factor=4, target_modules=SOME),
    "vblora-three": lambda: peft.VBLoRAConfig(num_vectors=7, topk=3, **VBLORA),
    "vblora-one": lambda: peft.VBLoRAConfig(num_vectors=300, topk=1, **VBLORA),
    "vblora-all": lambda: peft.VBLoRAConfig(num_vectors=4, topk=4, **VBLORA),
}


def theirs(config: Any, kind: str, folder: Path, tiny: SimpleNamespace) -> tuple[Any, Tensor]:
    """A stirred adapter of PEFT's in a folder, its model, and what that computes."""
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny.make(kind), config).eval()
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(folder))
    return model, tiny.output(model, tiny.example(kind))


@pytest.fixture(autouse=True)
def known() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension|Setting boft_n_butterfly_factor")
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        yield


@pytest.mark.parametrize("case", SHORT)
def test_a_short_file_is_read_as_it_is_meant(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The same outputs, and the same again there once it was written here."""
    _, wanted = theirs(SHORT[case](), "llama", tmp_path / "theirs", tiny)
    model, batch = tiny.make("llama"), tiny.example("llama")
    base = tiny.output(model, batch)
    ingraft.load(model, tmp_path / "theirs")
    ours = tiny.output(model, batch)
    assert (wanted - base).abs().max() > 1e-3
    assert (ours - wanted).abs().max() < 1e-5
    ingraft.save(model, tmp_path / "ours", dtype=torch.float32)
    again = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "ours").eval()  # type: ignore[arg-type]
    assert (tiny.output(again, batch) - wanted).abs().max() < 1e-5


def test_weights_without_logits_train_further_with_a_warning(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The vectors that were not mixed get nothing, in any number of steps."""
    theirs(SHORT["vblora-three"](), "llama", tmp_path / "theirs", tiny)
    model = tiny.make("llama")
    with pytest.warns(UserWarning, match="mixes no others"):
        ingraft.load(model, tmp_path / "theirs", trainable=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    logits = next(p for name, p in model.named_parameters() if name.endswith("vblora_logits_A"))
    chosen = logits.topk(3).indices.sort().values
    optimiser = torch.optim.AdamW(trained, lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(**tiny.example("llama")).logits.square().mean().backward()
        optimiser.step()
    assert all(bool(p.isfinite().all()) for p in trained)
    assert torch.equal(logits.topk(3).indices.sort().values, chosen)


@pytest.mark.parametrize("damage", ["beyond", "negative", "without", "narrow"])
def test_weights_that_do_not_go_with_their_vectors_are_refused(
    damage: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    theirs(SHORT["vblora-three"](), "llama", tmp_path / "theirs", tiny)
    file = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("_topk_indices"))
    weights = key.replace("_indices", "_weights")
    if damage == "without":
        del tensors[weights]
    elif damage == "narrow":
        tensors[weights] = tensors[weights][..., :1].contiguous()
    else:
        tensors[key] = torch.full_like(tensors[key].int(), 7 if damage == "beyond" else -1)
    save_file(tensors, file)
    model = tiny.make("llama")
    with pytest.raises(IngraftError, match="do not go with each other"):
        ingraft.load(model, tmp_path / "theirs")
    assert type(model) is type(tiny.make("llama")) and not any(":" in name for name, _ in model.named_modules())


@pytest.mark.parametrize(
    "config",
    [
        peft.TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=["lm_head"]),
        peft.LoraConfig(
            r=4, trainable_token_indices={"lm_head": [3, 5, 9]}, target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ],
)
def test_rows_of_a_tied_head_alone_are_refused_in_words(config: Any, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """There the head parts from the embedding that it is tied to; here rows that are trained stay tied."""
    model, _ = theirs(config, "gpt2", tmp_path / "theirs", tiny)
    plain = tiny.make("gpt2")
    ids = torch.tensor([3, 5, 9])
    assert torch.equal(model.get_input_embeddings()(ids), plain.get_input_embeddings()(ids))
    with pytest.raises(IngraftError, match=r"lm_head\.\S+ was trained alone.*stays one here") as error:
        ingraft.load(plain, tmp_path / "theirs")
    assert len(error.value.problems) == 1
    assert type(plain) is type(tiny.make("gpt2"))


def test_rows_of_an_untied_head_alone_are_read(tmp_path: Path, tiny: SimpleNamespace) -> None:
    config = peft.TrainableTokensConfig(token_indices=[3, 5, 9], target_modules=["lm_head"])
    _, wanted = theirs(config, "llama", tmp_path / "theirs", tiny)
    model = tiny.make("llama")
    ingraft.load(model, tmp_path / "theirs")
    assert (tiny.output(model, tiny.example("llama")) - wanted).abs().max() < 1e-5


@pytest.mark.parametrize("pattern", ["q_proj", ".*_proj"])
def test_hiras_ranks_are_those_of_the_file(pattern: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """PEFT passes over the pattern for a model's first adapter, and follows it for a second one; the config says the same of both."""
    config = peft.HiraConfig(r=4, rank_pattern={pattern: 2}, target_modules=SOME)
    model, batch = peft.get_peft_model(tiny.make("llama"), config).eval(), tiny.example("llama")
    model.add_adapter("second", config)
    for name in ("default", "second"):
        model.set_adapter(name)
        tiny.perturb(p for p in model.parameters() if p.requires_grad)
        wanted = tiny.output(model, batch)
        model.save_pretrained(str(tmp_path), selected_adapters=[name])
        folder = tmp_path if name == "default" else tmp_path / name
        here = tiny.make("llama")
        ingraft.load(here, folder, name)
        assert (tiny.output(here, batch) - wanted).abs().max() < 1e-5
        ingraft.save(here, tmp_path / "ours", name, dtype=torch.float32, overwrite=True)
        again = tiny.make("llama")
        ingraft.load(again, tmp_path / "ours", name)
        assert torch.equal(tiny.output(again, batch), tiny.output(here, batch))


def test_hiras_pattern_of_a_script_is_followed(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """And its file is of a type that PEFT, which would want other ranks, does not mistake."""
    config = ingraft.peft.HiraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=SOME)
    model = ingraft.peft.get_peft_model(tiny.make("llama"), config)
    ranks = {name.split(".")[-3]: p.shape[0] for name, p in model.named_parameters() if name.endswith("hira_A")}
    assert ranks == {"q_proj": 2, "v_proj": 4, "down_proj": 4}
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    again = ingraft.peft.PeftModel.from_pretrained(tiny.make("llama"), str(tmp_path))
    batch = tiny.example("llama")
    assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))
    assert "INGRAFT_HIRA" in (tmp_path / "adapter_config.json").read_text()
