"""Files of kohya-ss, LyCORIS and diffusers: tensors and no config, read by what they hold and checked against the published formulas.

The formulas below are written as the formats define them, not with this package's own code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import ingraft
from ingraft.errors import IngraftError
from ingraft.testing.cases import close, run


class Block(nn.Module):
    """A corner of a diffusion UNet, with its names."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(12, 16, bias=False), nn.ModuleList([nn.Linear(16, 12), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        return self.to_out[1](self.to_out[0](torch.tanh(self.to_q(x))))


class UNet(nn.Module):
    """Convolutions with a kernel of three and of one, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 12, 3, padding=1)
        self.mid_block = nn.ModuleDict({"attentions": nn.ModuleList([Block()]), "proj_in": nn.Conv2d(12, 12, 1)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.mid_block["proj_in"](torch.tanh(self.conv_in(x)))
        return self.mid_block["attentions"][0](y.flatten(2).transpose(1, 2))


PATHS = ("conv_in", "mid_block.proj_in", "mid_block.attentions.0.to_q", "mid_block.attentions.0.to_out.0")
LINEAR = PATHS[2:]


def unet() -> UNet:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet().eval()


BATCH = {"x": torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(2))}


def drawn(*shape: int, seed: int = 3) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def with_changes(changes: dict[str, Tensor]) -> Tensor:
    """The output of the model with these changes added to its weights."""
    model = unet()
    with torch.no_grad():
        for path, change in changes.items():
            weight = model.get_submodule(path).weight
            weight += change.reshape(weight.shape)
    return run(model, BATCH)


def kohya(path: str, prefix: str = "lora_unet") -> str:
    return f"{prefix}_{path.replace('.', '_')}"


def lora(path: str, r: int, alpha: float | None, seed: int = 3) -> tuple[dict[str, Tensor], Tensor]:
    """Tensors by ending in kohya-ss' names, and the change they mean."""
    weight = unet().get_submodule(path).weight
    down, up = drawn(r, *weight.shape[1:], seed=seed), drawn(len(weight), r, *[1] * (weight.dim() - 2), seed=seed)
    scale = 1.0 if alpha is None else alpha / r
    tensors = {"lora_down.weight": down, "lora_up.weight": up}
    return tensors | ({} if alpha is None else {"alpha": torch.tensor(alpha)}), scale * up.flatten(1) @ down.flatten(1)


def written(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(tensors, file, metadata=metadata)
    return file


# ------------------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize("alphas", [(None, None), (2.0, 2.0), (1.0, 8.0)])
def test_kohya_lora_with_ranks_and_alphas_of_their_own(alphas: tuple[float | None, ...], tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for path, r, alpha in zip(PATHS, (2, 4, 4, 3), (*alphas, *alphas), strict=True):
        own, changes[path] = lora(path, r, alpha)
        tensors |= {f"{kohya(path)}.{name}": value for name, value in own.items()}
    model = unet()
    assert ingraft.load(model, written(tmp_path / "style.safetensors", tensors)) == "default"
    close(run(model, BATCH), with_changes(changes), "loaded and added by hand")
    assert (
        model.ingraft_control.adapters["default"].facts["found"]
        == "lora at 4 modules, as kohya-ss or LyCORIS writes it"
    )
    ingraft.save(model, tmp_path / "peft", dtype=torch.float32)
    other = unet()
    ingraft.load(other, tmp_path / "peft")
    assert torch.equal(run(other, BATCH), run(model, BATCH))


def test_a_folder_with_the_one_file_does_as_well(tmp_path: Path) -> None:
    own, change = lora(LINEAR[0], 2, 1.0)
    written(tmp_path / "pytorch_lora_weights.safetensors", {f"{kohya(LINEAR[0])}.{n}": v for n, v in own.items()})
    model = unet()
    ingraft.load(model, tmp_path, "style", trainable=True)
    close(run(model, BATCH), with_changes({LINEAR[0]: change}), "from a folder")
    assert ingraft.status(model).adapters[0].trainable


def test_a_core_between_the_factors_of_a_kernel(tmp_path: Path) -> None:
    down, mid, up = drawn(2, 4, 1, 1), drawn(2, 2, 3, 3), drawn(12, 2, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": torch.tensor(1.0)}
    model = unet()
    ingraft.load(model, written(tmp_path / "x.safetensors", {f"{kohya('conv_in')}.{n}": v for n, v in tensors.items()}))
    change = 0.5 * torch.einsum("oa,abkl,bi->oikl", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    close(run(model, BATCH), with_changes({"conv_in": change}), "a core multiplied out")


@pytest.mark.parametrize("norms", [(16, 1), (16,)])
def test_norms_of_outputs_make_it_a_dora(norms: tuple[int, ...], tmp_path: Path) -> None:
    own, change = lora(LINEAR[0], 2, 1.0)
    scale = drawn(*norms).abs() + 0.5
    tensors = {f"{kohya(LINEAR[0])}.{n}": v for n, v in (own | {"dora_scale": scale}).items()}
    model = unet()
    ingraft.load(model, written(tmp_path / "x.safetensors", tensors))
    W = model.get_submodule(LINEAR[0]).weight.detach()
    moved = scale.reshape(-1, 1) * (W + change) / (W + change).norm(dim=1, keepdim=True)
    close(run(model, BATCH), with_changes({LINEAR[0]: moved - W}), "DoRA")
    assert ingraft.status(model).adapters[0].method == "dora"
    tensors[f"{kohya(LINEAR[0])}.dora_scale"] = drawn(1, 12).abs()
    with pytest.raises(IngraftError, match="norms over each input"):
        ingraft.load(unet(), written(tmp_path / "y.safetensors", tensors))


def test_loha(tmp_path: Path) -> None:
    """Linear layers and a kernel with cores, as LyCORIS rebuilds them."""
    w = {f"hada_w{n}_{s}": drawn(*shape, seed=n) for n in (1, 2) for s, shape in (("a", (16, 3)), ("b", (3, 12)))}
    changes = {LINEAR[0]: 2.0 / 3 * (w["hada_w1_a"] @ w["hada_w1_b"]) * (w["hada_w2_a"] @ w["hada_w2_b"])}
    c = {f"hada_w{n}_{s}": drawn(3, size, seed=n) for n in (1, 2) for s, size in (("a", 12), ("b", 4))}
    c |= {f"hada_t{n}": drawn(3, 3, 3, 3, seed=n) for n in (1, 2)}
    one, two = (torch.einsum("ijkl,jr,ip->prkl", c[f"hada_t{n}"], c[f"hada_w{n}_b"], c[f"hada_w{n}_a"]) for n in (1, 2))
    changes["conv_in"] = 2.0 / 3 * one * two
    tensors = {
        f"lycoris_{LINEAR[0].replace('.', '_')}.{name}": v for name, v in (w | {"alpha": torch.tensor(2.0)}).items()
    }
    tensors |= {f"lycoris_conv_in.{name}": v for name, v in (c | {"alpha": torch.tensor(2.0)}).items()}
    model = unet()
    ingraft.load(model, written(tmp_path / "x.safetensors", tensors))
    close(run(model, BATCH), with_changes(changes), "LoHa")
    assert ingraft.status(model).adapters[0].method == "loha"


@pytest.mark.parametrize(
    ("split", "thin", "both"),
    [((4, 3), False, False), ((4, 3), True, False), ((2, 2), False, False), ((4, 3), True, True)],
)
def test_lokr(split: tuple[int, int], thin: bool, both: bool, tmp_path: Path) -> None:
    """Whole or factored, split near to square or by a factor; where both are whole the scale is 1."""
    (a, c), r = split, 1
    b, d = 16 // a, 12 // c
    w1a, w1b, w2a, w2b = drawn(a, r), drawn(r, c), drawn(b, r), drawn(r, d)
    w1 = {"lokr_w1_a": w1a, "lokr_w1_b": w1b} if both else {"lokr_w1": drawn(a, c)}
    w2 = {"lokr_w2_a": w2a, "lokr_w2_b": w2b} if thin else {"lokr_w2": drawn(b, d)}
    own = w1 | w2 | {"alpha": torch.tensor(4.0)}
    change = torch.kron(w1.get("lokr_w1", w1a @ w1b), w2.get("lokr_w2", w2a @ w2b)) * (4.0 / r if thin or both else 1.0)
    model = unet()
    ingraft.load(model, written(tmp_path / "x.safetensors", {f"{kohya(LINEAR[0])}.{n}": v for n, v in own.items()}))
    close(run(model, BATCH), with_changes({LINEAR[0]: change}), "LoKr")
    assert ingraft.status(model).adapters[0].method == "lokr"


@pytest.mark.parametrize("form", ["lora_A", "lora.down", "processor", "metadata"])
def test_diffusers(form: str, tmp_path: Path) -> None:
    """Its three spellings, and the settings it keeps in the file's metadata."""
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    metadata = None
    for path in LINEAR:
        own, changes[path] = lora(path, 2, None)
        attention, _, name = path.removesuffix(".0").rpartition(".")
        down, up = {
            "lora.down": (f"unet.{path}.lora.down.weight", f"unet.{path}.lora.up.weight"),
            "processor": tuple(f"unet.{attention}.processor.{name}_lora.{side}.weight" for side in ("down", "up")),
        }.get(form, (f"unet.{path}.lora_A.weight", f"unet.{path}.lora_B.weight"))
        tensors |= {down: own["lora_down.weight"], up: own["lora_up.weight"]}
    if form == "metadata":
        settings: dict[str, Any] = {
            "unet.r": 2,
            "unet.lora_alpha": 6,
            "unet.alpha_pattern": {"to_q": 1},
            "unet.use_rslora": True,
        }
        metadata = {"lora_adapter_metadata": json.dumps(settings)}
        changes = {path: change * (1 if "to_q" in path else 6) / 2**0.5 for path, change in changes.items()}
    model = unet()
    ingraft.load(model, written(tmp_path / "pytorch_lora_weights.safetensors", tensors, metadata))
    close(run(model, BATCH), with_changes(changes), form)
    assert "diffusers" in model.ingraft_control.adapters["default"].facts["found"]


@pytest.mark.parametrize("start", ["", "text_model."])
def test_each_model_of_a_pipeline_takes_its_own(start: str, tmp_path: Path) -> None:
    """One file for UNet and text encoder: each takes its part and says what is left; a model that holds both takes both."""
    encoder = nn.ModuleDict({"encoder": nn.ModuleDict({"q_proj": nn.Linear(6, 6)})})
    own, _ = lora(LINEAR[0], 2, 1.0)
    tensors = {f"{kohya(LINEAR[0])}.{name}": value for name, value in own.items()}
    text = f"lora_te_{start.replace('.', '_')}encoder_q_proj"
    tensors |= {f"{text}.lora_down.weight": drawn(2, 6), f"{text}.lora_up.weight": drawn(6, 2)}
    file = written(tmp_path / "x.safetensors", tensors)
    model = unet()
    with pytest.warns(UserWarning, match="1 modules under 'lora_te' are for another model"):
        ingraft.load(model, file)
    with pytest.warns(UserWarning, match="'lora_unet'"):
        ingraft.load(encoder, file)
    assert list(encoder.ingraft_control.adapters["default"].sites) == ["encoder.q_proj"]
    ingraft.detach(encoder)
    whole = nn.ModuleDict({"unet": unet(), "text_encoder": encoder})
    ingraft.load(whole, file)
    assert set(whole.ingraft_control.adapters["default"].sites) == {f"unet.{LINEAR[0]}", "text_encoder.encoder.q_proj"}


# ---------------------------------------------------------------------------------------------------------------- what is refused


def bad(kind: str) -> dict[str, Tensor]:
    own, _ = lora(LINEAR[0], 2, 1.0)
    start, other = kohya(LINEAR[0]), kohya(LINEAR[1])
    tensors = {f"{start}.{name}": value for name, value in own.items()}
    if kind == "strange":
        return tensors | {"epoch": torch.zeros(1), "unet.norm.weight": torch.zeros(3)}
    if kind == "peft":
        return {"base_model.model.to_q.lora_A.weight": torch.zeros(2, 2)}
    if kind == "module":
        return tensors | {f"{kohya('up_block.nine')}.{name}": value.clone() for name, value in own.items()}
    if kind == "shape":
        return tensors | {f"{start}.lora_down.weight": torch.zeros(2, 11)}
    if kind == "half":
        return {f"{start}.lora_down.weight": torch.zeros(2, 12)}
    if kind == "mixed":
        w = {f"hada_w{n}_{s}": torch.zeros(12, 12) for n in (1, 2) for s in "ab"}
        return tensors | {f"{other}.{name}": value for name, value in w.items()}
    if kind == "algorithm":
        return tensors | {f"{start}.lokr_w1": torch.zeros(2, 2)}
    return tensors | {f"{start}.lora_up.weight": torch.full((16, 2), float("nan"))}


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("strange", "2 of its tensors belong to no form of adapter known here: epoch, unet.norm.weight"),
        ("peft", "adapter_config.json has to lie beside them"),
        ("module", "1 of the 2 modules under 'lora_unet' are not in this model: up_block_nine"),
        ("shape", r"lora_A has shape \[2, 11\]; this layer needs \[2, 12\]"),
        ("half", "no method here has the tensors lora_down"),
        ("mixed", "holds several methods"),
        ("algorithm", "no method here has the tensors lokr_w1, lora_down, lora_up"),
        ("nan", "not finite"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(kind: str, words: str, tmp_path: Path) -> None:
    model = unet()
    before = run(model, BATCH)
    with pytest.raises(IngraftError, match=words):
        ingraft.load(model, written(tmp_path / "x.safetensors", bad(kind)))
    assert not hasattr(model, "ingraft_control")
    assert torch.equal(run(model, BATCH), before)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"nonsense")
    with pytest.raises(IngraftError, match="not a readable safetensors file"):
        ingraft.load(unet(), tmp_path / "x.safetensors")
    with pytest.raises(IngraftError, match="no folder"):
        ingraft.load(unet(), tmp_path / "nothing")
