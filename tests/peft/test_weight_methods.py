"""Methods on weights, held to Hugging Face PEFT in both directions: files, outputs in float32 and bfloat16, the gradient of every tensor."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ingraft
import peft
from ingraft.methods.registry import make_config
from ingraft.testing.cases import loss_of

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}

Case = tuple[str, str, dict[str, Any], Callable[[], Any]]

SOME = ["q_proj", "v_proj", "down_proj"]

CASES: dict[str, Case] = {
    "loha-llama": ("llama", "loha", {"r": 3, "alpha": 6}, lambda: peft.LoHaConfig(r=3, alpha=6, target_modules=SOME)),
    "loha-large-rank-bert": (
        "bert",
        "loha",
        {"r": 6, "rank_pattern": {"key": 2}, "modules_to_save": ["classifier"]},
        lambda: peft.LoHaConfig(
            r=6, alpha_pattern={"value": 3}, target_modules=["query", "value", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "loha-conv2d": (
        "picture",
        "loha",
        {"r": 3, "target_modules": ["first", "second"]},
        lambda: peft.LoHaConfig(r=3, target_modules=["first", "second", "head"]),
    ),
    "loha-cores-conv2d": (
        "picture",
        "loha",
        {"r": 3, "use_effective_conv2d": True, "target_modules": ["first", "second"]},
        lambda: peft.LoHaConfig(r=3, use_effective_conv2d=True, target_modules=["first", "second", "head"]),
    ),
    "lokr-llama": ("llama", "lokr", {"r": 2}, lambda: peft.LoKrConfig(r=2, target_modules=SOME)),
    "lokr-full-llama": (
        "llama",
        "lokr",
        {"r": 8, "alpha": 4},
        lambda: peft.LoKrConfig(r=8, alpha=4, target_modules=SOME),
    ),
    "lokr-both-bert": (
        "bert",
        "lokr",
        {"r": 1, "decompose_both": True, "decompose_factor": 4, "modules_to_save": ["classifier"]},
        lambda: peft.LoKrConfig(
            r=1, decompose_both=True, decompose_factor=5, target_modules=["query", "dense"], task_type="SEQ_CLS"
        ),
    ),
    "lokr-conv2d": (
        "picture",
        "lokr",
        {"r": 1, "target_modules": ["first", "second"]},
        lambda: peft.LoKrConfig(r=8, target_modules=["first", "second", "head"]),
    ),
    "lokr-cores-conv2d": (
        "picture",
        "lokr",
        {"r": 1, "use_effective_conv2d": True, "target_modules": ["first", "second"]},
        lambda: peft.LoKrConfig(r=1, use_effective_conv2d=True, decompose_factor=2, target_modules=["first", "second"]),
    ),
    "vera-llama": ("llama", "vera", {"r": 12}, lambda: peft.VeraConfig(r=12, target_modules=SOME)),
    "vera-unsaved-bert": (
        "bert",
        "vera",
        {"r": 12, "save_projection": False, "projection_prng_key": 3, "modules_to_save": ["classifier"]},
        lambda: peft.VeraConfig(
            r=7,
            save_projection=False,
            projection_prng_key=5,
            target_modules=["key", "dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "vera-gpt2": (
        "gpt2",
        "vera",
        {"target_modules": ["c_attn", "c_proj"]},
        lambda: peft.VeraConfig(r=9, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "randlora-llama": (
        "llama",
        "randlora",
        {"r": 4, "randlora_alpha": 2},
        lambda: peft.RandLoraConfig(r=5, randlora_alpha=2, target_modules=SOME),
    ),
    "randlora-sparse-bert": (
        "bert",
        "randlora",
        {"r": 4, "randlora_alpha": 1, "sparse": True, "save_projection": False, "modules_to_save": ["classifier"]},
        lambda: peft.RandLoraConfig(
            r=6, randlora_alpha=1, very_sparse=True, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "randlora-gpt2": (
        "gpt2",
        "randlora",
        {"r": 4, "randlora_alpha": 2},
        lambda: peft.RandLoraConfig(
            r=8,
            randlora_alpha=2,
            save_projection=False,
            target_modules=["c_attn", "mlp.c_proj"],
            fan_in_fan_out=True,
        ),
    ),
    "fourierft-llama": (
        "llama",
        "fourierft",
        {"n_frequency": 40, "n_frequency_pattern": {"v_proj": 15}},
        lambda: peft.FourierFTConfig(n_frequency=50, n_frequency_pattern={"q_proj": 20}, target_modules=SOME),
    ),
    "fourierft-bert": (
        "bert",
        "fourierft",
        {"n_frequency": 300, "scaling": 50, "random_loc_seed": 5, "modules_to_save": ["classifier"]},
        lambda: peft.FourierFTConfig(
            n_frequency=200, init_weights=True, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "fourierft-gpt2": (
        "gpt2",
        "fourierft",
        {"n_frequency": 300, "target_modules": ["c_attn", "mlp.c_proj"]},
        lambda: peft.FourierFTConfig(n_frequency=200, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "c3a-llama": (
        "llama",
        "c3a",
        {"block_size": 8, "block_size_pattern": {"v_proj": 16}},
        lambda: peft.C3AConfig(block_size=4, block_size_pattern={"q_proj": 16}, target_modules=SOME),
    ),
    "c3a-bert": (
        "bert",
        "c3a",
        {"block_size": 1, "modules_to_save": ["classifier"]},
        lambda: peft.C3AConfig(
            block_size=16, init_weights="gaussian", target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "shira-llama": ("llama", "shira", {"r": 2}, lambda: peft.ShiraConfig(r=3, target_modules=SOME)),
    "shira-seed-bert": (
        "bert",
        "shira",
        {"r": 3, "random_seed": 4, "modules_to_save": ["classifier"]},
        lambda: peft.ShiraConfig(r=2, random_seed=9, target_modules=["key", "dense"], task_type="SEQ_CLS"),
    ),
    "miss-llama": ("llama", "miss", {"r": 5}, lambda: peft.MissConfig(r=7, target_modules=SOME)),
    "miss-bert": (
        "bert",
        "miss",
        {"r": 8, "modules_to_save": ["classifier"]},
        lambda: peft.MissConfig(r=4, target_modules=["key", "output.dense"], task_type="SEQ_CLS"),
    ),
    "miss-mini-llama": (
        "llama",
        "miss",
        {"r": 5, "mini_r": 8, "init_weights": "mini"},
        lambda: peft.MissConfig(r=7, mini_r=4, init_weights="mini", target_modules=SOME),
    ),
    "miss-bat-bert": (
        "bert",
        "miss",
        {"r": 4, "init_weights": "bat", "modules_to_save": ["classifier"]},
        lambda: peft.MissConfig(r=8, init_weights="bat", target_modules=["key", "output.dense"], task_type="SEQ_CLS"),
    ),
    "oft-llama": ("llama", "oft", {"oft_block_size": 8}, lambda: peft.OFTConfig(oft_block_size=4, target_modules=SOME)),
    "oft-exact-bert": (
        "bert",
        "oft",
        {"oft_block_size": 0, "r": 4, "use_cayley_neumann": False, "modules_to_save": ["classifier"]},
        lambda: peft.OFTConfig(
            oft_block_size=16,
            block_share=True,
            use_cayley_neumann=False,
            target_modules=["key", "output.dense"],
            task_type="SEQ_CLS",
        ),
    ),
    "oft-held-llama": (
        "llama",
        "oft",
        {"oft_block_size": 8, "coft": True, "eps": 0.8, "num_cayley_neumann_terms": 3},
        lambda: peft.OFTConfig(oft_block_size=8, coft=True, eps=0.9, num_cayley_neumann_terms=7, target_modules=SOME),
    ),
    "oft-embedding": (
        "llama",
        "oft",
        {"oft_block_size": 8, "target_modules": ["embed_tokens", "v_proj"]},
        lambda: peft.OFTConfig(oft_block_size=4, target_modules=["embed_tokens"]),
    ),
    "oft-pointwise-conv2d": (
        "points",
        "oft",
        {"oft_block_size": 4, "target_modules": ["second"]},
        lambda: peft.OFTConfig(oft_block_size=2, target_modules=["second", "head"]),
    ),
    "boft-llama": ("llama", "boft", {"boft_block_size": 8}, lambda: peft.BOFTConfig(target_modules=SOME)),
    "boft-number-bert": (
        "bert",
        "boft",
        {"boft_block_size": 0, "boft_block_num": 4, "modules_to_save": ["classifier"]},
        lambda: peft.BOFTConfig(
            boft_block_size=0, boft_block_num=2, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "boft-conv2d": (
        "picture",
        "boft",
        {"boft_block_size": 3, "target_modules": ["first", "second"]},
        lambda: peft.BOFTConfig(boft_block_size=3, target_modules=["first", "second", "head"]),
    ),
    "hra-llama": ("llama", "hra", {"r": 4}, lambda: peft.HRAConfig(r=6, target_modules=SOME)),
    "hra-orthogonal-bert": (
        "bert",
        "hra",
        {"r": 3, "apply_GS": True, "modules_to_save": ["classifier"]},
        lambda: peft.HRAConfig(
            r=5, apply_GS=True, init_weights=False, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "hra-conv2d": (
        "picture",
        "hra",
        {"r": 4, "target_modules": ["first", "second"]},
        lambda: peft.HRAConfig(r=2, target_modules=["first", "second", "head"]),
    ),
    "ia3-feedforward-conv2d": (
        "picture",
        "ia3",
        {"target_modules": ["first", "second"], "feedforward_modules": ["second"]},
        lambda: peft.IA3Config(target_modules=["first", "second", "head"], feedforward_modules=["first", "second"]),
    ),
    "ia3-feedforward-grouped-conv2d": (
        "groups",
        "ia3",
        {"target_modules": ["first", "second"], "feedforward_modules": ["second"]},
        lambda: peft.IA3Config(target_modules=["first", "second"], feedforward_modules=["second"]),
    ),
    "road-llama": ("llama", "road", {"group_size": 8}, lambda: peft.RoadConfig(group_size=16, target_modules=SOME)),
    "road-2-bert": (
        "bert",
        "road",
        {"variant": "road_2", "group_size": 16, "modules_to_save": ["classifier"]},
        lambda: peft.RoadConfig(
            variant="road_4", group_size=4, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
    "ln-tuning-llama": (
        "llama",
        "ln-tuning",
        {},
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    ),
    "ln-tuning-bert": (
        "bert",
        "ln-tuning",
        {"modules_to_save": ["classifier"]},
        lambda: peft.LNTuningConfig(target_modules=["LayerNorm"], task_type="SEQ_CLS"),
    ),
    "tokens-llama": (
        "llama",
        "trainable-tokens",
        {"token_indices": range(2, 40)},
        lambda: peft.TrainableTokensConfig(token_indices=list(range(1, 30))),
    ),
    "tokens-and-a-head-llama": (
        "llama",
        "trainable-tokens",
        {"token_indices": range(2, 40), "target_modules": ["embed_tokens", "lm_head"]},
        lambda: peft.TrainableTokensConfig(token_indices=[4, 2, 9, 11], target_modules=["embed_tokens", "lm_head"]),
    ),
    "tokens-tied-gpt2": (
        "gpt2",
        "trainable-tokens",
        {"token_indices": range(2, 40)},
        lambda: peft.TrainableTokensConfig(token_indices=list(range(1, 30)), target_modules=["wte"]),
    ),
    "lora-and-tokens-llama": (
        "llama",
        "lora",
        {"r": 4, "trainable_token_indices": list(range(2, 40))},
        lambda: peft.LoraConfig(r=4, trainable_token_indices=list(range(1, 30)), target_modules=SOME),
    ),
    "lora-and-tokens-of-a-head-llama": (
        "llama",
        "lora",
        {"r": 4, "trainable_token_indices": {"embed_tokens": list(range(2, 40)), "lm_head": [7, 9]}},
        lambda: peft.LoraConfig(
            r=4, trainable_token_indices={"lm_head": [4, 1], "embed_tokens": [7]}, target_modules=SOME
        ),
    ),
    "lora-and-tied-tokens-gpt2": (
        "gpt2",
        "lora",
        {"r": 4, "trainable_token_indices": list(range(2, 40))},
        lambda: peft.LoraConfig(
            r=4, trainable_token_indices=list(range(1, 30)), target_modules=["c_attn"], fan_in_fan_out=True
        ),
    ),
    "tokens-bert": (
        "bert",
        "trainable-tokens",
        {"token_indices": range(2, 40)},
        lambda: peft.TrainableTokensConfig(token_indices=list(range(1, 30)), target_modules=["word_embeddings"]),
    ),
    "hira-llama": (
        "llama",
        "hira",
        {"r": 3},
        lambda: peft.HiraConfig(r=4, rank_pattern={"q_proj": 2}, target_modules=SOME),
    ),
    "hira-bert": (
        "bert",
        "hira",
        {"r": 3, "modules_to_save": ["classifier"]},
        lambda: peft.HiraConfig(r=4, target_modules=["key", "output.dense"], task_type="SEQ_CLS"),
    ),
    "hira-conv2d": (
        "picture",
        "hira",
        {"r": 3, "target_modules": ["first", "second"]},
        lambda: peft.HiraConfig(r=4, target_modules=["first", "second", "head"]),
    ),
    "gralora-llama": ("llama", "gralora", {"r": 4}, lambda: peft.GraloraConfig(r=8, gralora_k=4, target_modules=SOME)),
    "gralora-hybrid-bert": (
        "bert",
        "gralora",
        {"r": 8, "gralora_k": 4, "hybrid_r": 3, "modules_to_save": ["classifier"]},
        lambda: peft.GraloraConfig(r=4, hybrid_r=2, target_modules=["key", "output.dense"], task_type="SEQ_CLS"),
    ),
    "vblora-llama": (
        "llama",
        "vblora",
        {"r": 2, "num_vectors": 9, "vector_length": 8},
        lambda: peft.VBLoRAConfig(r=3, num_vectors=7, vector_length=16, topk=3, target_modules=SOME),
    ),
    "vblora-bert": (
        "bert",
        "vblora",
        {"r": 2, "num_vectors": 9, "vector_length": 16, "modules_to_save": ["classifier"]},
        lambda: peft.VBLoRAConfig(
            r=3, num_vectors=7, vector_length=16, target_modules=["key", "output.dense"], task_type="SEQ_CLS"
        ),
    ),
}
"""Name -> kind of model, our method and options, their config. The two sides of a case need not adapt the same modules."""

CAST = [name for name in CASES if name.endswith(("-llama", "-bert"))]


@pytest.fixture(autouse=True)
def unsaved() -> Iterator[None]:
    """PEFT remarks on every file that leaves projections out, or does not repeat them for every layer, on every norm and odd number, and on
    what it lacks; torch on its sparse tensors."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Specified to not")
        warnings.filterwarnings("ignore", message=r"Found missing adapter keys .*randlora_A")
        warnings.filterwarnings("ignore", message="Sparse invariant checks")
        warnings.filterwarnings("ignore", message="Failed to load the CUDA extension|Setting boft_n_butterfly_factor")
        warnings.filterwarnings("ignore", message="The symmetric initialization|Unsupported layer type")
        warnings.filterwarnings("ignore", message="Setting `save_embedding_layers` to `True`")
        warnings.filterwarnings("ignore", message=r"Found missing adapter keys .*lm_head.trainable_tokens_delta")
        yield


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one.float() - other.float()).abs().max().item()


def stir(model: nn.Module, least: float = 0.3) -> None:
    """Move what is trained away from its start by something of its own size."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                size = max(float(parameter.square().mean().sqrt()), least)
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def theirs_from(model: nn.Module, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model, folder, is_trainable=True).eval()  # type: ignore[arg-type]


def into_gradients(model: nn.Module, batch: dict[str, Tensor]) -> None:
    """Replace every trained value by its gradient under one loss, so that a file holds the gradients."""
    out = model(**batch)
    loss_of(out if isinstance(out, Tensor) else out.logits).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None
                parameter.copy_(parameter.grad)


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file of PEFT's without its copies: of shared tensors for every layer (regression 10), of a base's embedding, of rows that are tied."""
    shared = {key.rpartition(".")[2] for key in tensors if key.count(".") == 1}
    tied = (
        {"base_model.model.lm_head.trainable_tokens_delta"}
        if "base_model.model.transformer.wte.trainable_tokens_delta" in tensors
        else set()
    )
    found: dict[str, Tensor] = {}
    for key, value in tensors.items():
        repeated = key.count(".") > 1 and key.rpartition(".")[2] in shared
        if not repeated and ".base_layer." not in key and key not in tied:
            found[key] = value
    return found


def cores(*tensors: Tensor, scale: Tensor) -> Tensor:
    """PEFT's formula for LoHa's cores."""
    sides = [torch.einsum("ijkl,jr,ip->prkl", core, b, a) for core, a, b in (tensors[:3], tensors[3:])]
    return sides[0] * sides[1] * scale


def circular(x: Tensor, kernel: Tensor) -> Tensor:
    """PEFT's formula for C3A's blocks."""
    pieces = torch.fft.ifft(x.unflatten(-1, (-1, kernel.shape[2])))
    return torch.fft.fft(torch.einsum("...nb,mnb->...mb", pieces, torch.fft.fft(kernel))).real.flatten(-2)


@pytest.mark.parametrize("case", CASES)
def test_ours_loads_in_peft(case: str, tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our file means the same there: outputs and the gradient of every tensor."""
    # Two of their backwards, written by hand, are no derivatives: their forwards, differentiated by autograd.
    monkeypatch.setattr(peft.tuners.loha.layer, "make_weight_cp", cores)
    monkeypatch.setattr(peft.tuners.c3a.layer.BlockCircularConvolution, "apply", circular)
    kind, method, options, config = CASES[case]
    model, batch = tiny.make(kind), tiny.example(kind)
    base = tiny.output(model, batch)
    ingraft.attach(model, make_config(method, options), seed=3)
    stir(model)
    ours = tiny.output(model, batch)
    assert apart(ours, base) > 100 * TOLERANCE[torch.float32]
    ingraft.save(model, tmp_path / "ours", dtype=torch.float32)
    theirs = theirs_from(tiny.make(kind), tmp_path / "ours")
    assert apart(ours, tiny.output(theirs, batch)) < TOLERANCE[torch.float32]
    fields = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert set(fields) <= {field.name for field in dataclasses.fields(config())}
    into_gradients(model, batch)
    into_gradients(theirs, batch)
    ingraft.save(model, tmp_path / "gradients", dtype=torch.float32)
    theirs.save_pretrained(tmp_path / "theirs")
    mine, other = written(tmp_path / "gradients"), once(written(tmp_path / "theirs"))
    assert mine.keys() == other.keys()
    size = max(float(value.abs().max()) for value in other.values() if value.is_floating_point())
    for key, value in other.items():
        assert apart(mine[key], value) < 1e-4 * size, key


@pytest.mark.parametrize("case", CASES)
def test_theirs_loads_here(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Their file means the same here, and written again it is the same file."""
    kind, method, _, config = CASES[case]
    batch = tiny.example(kind)
    torch.manual_seed(2)
    model = peft.get_peft_model(tiny.make(kind), config()).eval()
    stir(model)
    theirs = tiny.output(model, batch)
    model.save_pretrained(str(tmp_path / "theirs"))
    here = tiny.make(kind)
    base = tiny.output(here, batch)
    ingraft.load(here, tmp_path / "theirs")
    ours = tiny.output(here, batch)
    assert apart(theirs, base) > 100 * TOLERANCE[torch.float32]
    assert apart(ours, theirs) < TOLERANCE[torch.float32]
    assert ingraft.status(here).adapters[0].method == method
    ingraft.save(here, tmp_path / "ours", dtype=torch.float32)
    mine, other = written(tmp_path / "ours"), once(written(tmp_path / "theirs"))
    assert mine.keys() == other.keys()
    assert all(torch.equal(mine[key], value.to(mine[key].dtype)) for key, value in other.items())


@pytest.mark.parametrize("case", CAST)
def test_bfloat16_agrees(case: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """On a bfloat16 base, where PEFT computes the adapter in float32 and this package in bfloat16, outputs agree within its rounding."""
    kind, method, options, _ = CASES[case]
    model, batch = tiny.make(kind).bfloat16(), tiny.example(kind)
    ingraft.attach(model, make_config(method, options), seed=3)
    stir(model, 0.1)
    ours = tiny.output(model, batch)
    ingraft.save(model, tmp_path / "ours")
    theirs = tiny.output(theirs_from(tiny.make(kind).bfloat16(), tmp_path / "ours"), batch)
    assert apart(ours, theirs) < TOLERANCE[torch.bfloat16] * max(1.0, float(theirs.float().abs().max()))
