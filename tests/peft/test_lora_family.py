"""LoRA's variants train as Hugging Face PEFT trains them: the gradient of every tensor, and ten optimiser steps; and what each does to a file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ingraft
import peft
from ingraft.adapt.files import CONFIG
from ingraft.errors import IngraftError
from ingraft.methods.registry import make_config
from ingraft.testing.cases import loss_of

TARGETS = ["q_proj", "v_proj", "down_proj"]

CASES: dict[str, Callable[[], Any]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, rank_pattern={"v_proj": 2}),
    "lora-bias": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
    "rslora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_rslora=True, alpha_pattern={"q_proj": 3}),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
    "dora-rslora": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, use_dora=True, use_rslora=True, rank_pattern={"v_proj": 2}, lora_alpha=3
    ),
    "pissa": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa"),
    "olora": lambda: peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="olora"),
    "pissa-rslora": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights="pissa", use_rslora=True, lora_alpha=5
    ),
    "olora-rslora": lambda: peft.LoraConfig(
        r=4, target_modules=TARGETS, init_lora_weights="olora", use_rslora=True, lora_alpha=3
    ),
}


def forward(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


def trained(parameters: Iterable[nn.Parameter], loss: Callable[[], Tensor]) -> list[float]:
    """Ten steps of AdamW; the losses on the way."""
    optimiser = torch.optim.AdamW(list(parameters), lr=1e-2)
    losses: list[float] = []
    for _ in range(10):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        losses.append(float(value.detach()))
    return losses


@pytest.mark.filterwarnings("ignore:.*have invalid shape", "ignore:.*has no bias")
@pytest.mark.parametrize("name", CASES)
def test_gradients_and_ten_steps_are_theirs(name: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    torch.manual_seed(2)
    theirs = peft.get_peft_model(tiny.make("llama"), CASES[name]()).eval()
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "start"))
    ours = tiny.make("llama")
    ingraft.load(ours, tmp_path / "start", trainable=True)
    assert ingraft.status(ours).adapters[0].method == name.partition("-")[0]

    own = ingraft.parameters(ours, "default")
    loss_of(forward(theirs, batch)).backward()
    loss_of(forward(ours, batch)).backward()
    others = {key: p for key, p in theirs.named_parameters() if p.requires_grad}
    assert len(own) == len(others)
    size = max(float(p.grad.abs().max()) for p in others.values())
    for key, p in own.items():
        path, _, tensor = key.rpartition(".")
        suffix = {"lora_bias": "lora_B.default.bias", "magnitude": "lora_magnitude_vector.default.weight"}
        other = others[f"base_model.model.{path}.{suffix.get(tensor, f'{tensor}.default.weight')}"]
        assert p.grad is not None and float((p.grad - other.grad).abs().max()) < 1e-5 * size, key

    losses = trained(own.values(), lambda: loss_of(forward(ours, batch)))
    expected = trained(others.values(), lambda: loss_of(forward(theirs, batch)))
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(expected, rel=1e-4)
    assert float((forward(ours, batch) - forward(theirs, batch)).detach().abs().max()) < 1e-3


@pytest.mark.parametrize(
    ("method", "options"),
    [("pissa", {}), ("olora", {}), ("lora-plus", {}), ("pissa", {"use_rslora": True}), ("olora", {"use_rslora": True})],
)
def test_a_file_is_a_lora_to_others_and_goes_on_as_what_it_is_here(
    method: str, options: dict[str, Any], tmp_path: Path, tiny: SimpleNamespace
) -> None:
    batch = tiny.example("llama")
    model = tiny.make("llama")
    ingraft.attach(model, make_config(method, {"r": 3, "rank_pattern": {"down_proj": 5}, **options}), seed=1)
    tiny.perturb(ingraft.parameters(model, "default").values())
    expected = tiny.output(model, batch)
    ingraft.save(model, tmp_path / "a")
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "a", trainable=True)
    assert ingraft.status(again).adapters[0].method == method
    assert torch.equal(tiny.output(again, batch), expected)
    for key, p in ingraft.parameters(model, "default").items():
        assert torch.equal(p, ingraft.parameters(again, "default")[key]), key

    (tmp_path / "a" / "ingraft.json").unlink()  # without our manifest it is what everyone sees
    plain = tiny.make("llama")
    ingraft.load(plain, tmp_path / "a")
    assert ingraft.status(plain).adapters[0].method == ("rslora" if options else "lora")
    assert float((tiny.output(plain, batch) - expected).abs().max()) < 1e-5


def test_options_in_a_manifest_that_do_not_fit_the_file_are_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    from ingraft import durable
    from ingraft.adapt import files

    model = tiny.make("llama")
    ingraft.attach(model, make_config("pissa", {"r": 4}), seed=1)
    config, weights, facts = files.serialised(model, "default")
    for wrong in ({"r": 3}, {"lora_alpha": 1}, {"r": "x"}, {"rank_pattern": {"q_proj": 2}}):
        facts["options"] = {"r": 4} | wrong
        with durable.folder(tmp_path / "a", True, facts) as staging:
            durable.write_file(staging / CONFIG, config)
            durable.write_file(staging / "adapter_model.safetensors", weights)
        fresh = tiny.make("llama")
        with pytest.raises(ingraft.IngraftError, match=r"ingraft\.json"):
            ingraft.load(fresh, tmp_path / "a")
        assert not hasattr(fresh, "ingraft_control")


def test_pissa_and_olora_leave_the_base_alone(tiny: SimpleNamespace) -> None:
    for method in ("pissa", "olora"):
        model = tiny.make("llama")
        before = {key: p.clone() for key, p in model.named_parameters()}
        expected = tiny.output(model, tiny.example("llama"))
        ingraft.attach(model, make_config(method, {}), seed=1)
        assert float((tiny.output(model, tiny.example("llama")) - expected).abs().max()) < 1e-6
        ingraft.detach(model)
        assert all(torch.equal(p, before[key]) for key, p in model.named_parameters())


def test_lora_plus_gives_b_its_own_rate(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora-plus", {"loraplus_lr_ratio": 8}), seed=1)
    groups = {group["lr"]: group["params"] for group in ingraft.param_groups(model, 0.01)}
    own = ingraft.parameters(model, "default")
    assert {id(p) for p in groups[0.01]} == {id(p) for key, p in own.items() if key.endswith("lora_A")}
    assert {id(p) for p in groups[0.08]} == {id(p) for key, p in own.items() if key.endswith("lora_B")}


def test_a_saved_lora_plus_has_the_tensors_of_a_lora(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora-plus", {}), seed=1)
    ingraft.save(model, tmp_path / "a")
    keys = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)


# ------------------------------------------------------------------------------------------------------------------ eva


def data(tiny: SimpleNamespace, n: int = 6) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(4)
    return [{**tiny.example("llama"), "input_ids": torch.randint(2, 64, (2, 7), generator=generator)} for _ in range(n)]


def inputs_of(model: nn.Module, path: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """Every real token that a layer of the base is given, (N, in)."""
    seen: list[Tensor] = []
    mask: Tensor = batches[0]["attention_mask"]
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _, args: seen.append(args[0][mask.bool()]))
    for batch in batches:
        model(**batch)
    handle.remove()
    return torch.cat(seen).detach()


def test_eva_starts_from_the_directions_of_its_inputs(tiny: SimpleNamespace) -> None:
    """One batch: A spans what the exact decomposition finds, and the model answers as before."""
    batches = data(tiny, 1)
    model = tiny.make("llama")
    expected = tiny.output(model, batches[0])
    path = "model.layers.1.mlp.down_proj"
    _, _, V = torch.linalg.svd(inputs_of(tiny.make("llama"), path, batches), full_matrices=False)
    ingraft.attach(model, make_config("eva", {"r": 3, "rho": 1}), seed=1)
    modes = [module.training for module in model.modules()]
    ingraft.prepare(model, "default", batches)
    assert [module.training for module in model.modules()] == modes
    A = ingraft.parameters(model, "default")[f"{path}.lora_A"]
    assert torch.linalg.svdvals(A.detach() @ V[:3].mT).min() > 0.99
    assert torch.equal(tiny.output(model, batches[0]), expected)


def test_eva_shares_out_its_budget(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Ranks differ between layers, add up to the budget, keep each layer's scale, and survive a file; the same seed gives the same adapter."""
    made: list[nn.Module] = []
    for _ in range(2):
        model = tiny.make("llama")
        ingraft.attach(model, make_config("eva", {"r": 3, "rho": 2.5, "lora_alpha": 6}), seed=1)
        ingraft.prepare(model, "default", data(tiny))
        made.append(model)
    one, other = (ingraft.parameters(model, "default") for model in made)
    assert all(torch.equal(p, other[key]) for key, p in one.items())
    ranks = [p.shape[0] for key, p in one.items() if key.endswith("lora_A")]
    assert sum(ranks) == 3 * len(ranks) and len(set(ranks)) > 1 and min(ranks) >= 1 and max(ranks) <= 7
    scales = {module.scale for module in made[0].modules() if hasattr(module, "lora_A")}
    assert scales == {2.0}

    tiny.perturb(one.values())
    batch = tiny.example("llama")
    ingraft.save(made[0], tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "a").eval()
    assert float((tiny.output(theirs, batch) - tiny.output(made[0], batch)).abs().max()) < 1e-5
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "a")
    assert ingraft.status(again).adapters[0].method == "eva"
    assert torch.equal(tiny.output(again, batch), tiny.output(made[0], batch))


# ------------------------------------------------------------------------------------------------------------------ lora-fa


def test_lora_fa_keeps_activations_of_the_ranks_width() -> None:
    """For backward, a layer keeps exactly r numbers a token beside weights, where LoRA keeps the layer's input as well."""
    tokens, width, r = 50, 64, 4
    kept: dict[str, int] = {}
    for method in ("lora", "lora-fa"):
        model = nn.Sequential(nn.Linear(width, 96))
        ingraft.attach(model, make_config(method, {"r": r, "target_modules": ["0"]}), seed=1)
        weights = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
        sizes: dict[int, int] = {}

        def note(tensor: Tensor, sizes: dict[int, int] = sizes, weights: set[int] = weights) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(tokens, width, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = model(x)
        kept[method] = sum(sizes.values())
        y.sum().backward()
    assert kept == {"lora-fa": 4 * tokens * r, "lora": 4 * tokens * (r + width)}


def test_lora_fa_never_moves_a(tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = tiny.make("llama")
    ingraft.attach(model, make_config("lora-fa", {"r": 3}), seed=1)
    own = ingraft.parameters(model, "default")
    assert all(key.endswith("lora_B") for key in own)
    before = {key: buffer.clone() for key, buffer in model.named_buffers() if key.endswith("lora_A")}
    losses = trained(own.values(), lambda: loss_of(forward(model, batch)))
    assert losses[-1] < losses[0]
    assert before and all(torch.equal(model.get_buffer(key), value) for key, value in before.items())
    ingraft.save(model, tmp_path / "a")
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "a").eval()
    assert float((tiny.output(theirs, batch) - tiny.output(model, batch)).abs().max()) < 1e-5


# ------------------------------------------------------------------------------------------------------------------ loftq


def test_loftq_starts_from_what_is_missing() -> None:
    """Over a weight with a coarse copy in its place, the start is the best approximation of the difference at that rank."""
    from ingraft.methods.contract import SiteFacts
    from ingraft.methods.loftq import LoftQ, LoftQConfig

    torch.manual_seed(3)
    W = torch.randn(40, 30)
    Q = (W * 2).round() / 2
    config = LoftQConfig(r=4, lora_alpha=12)
    facts = SiteFacts(
        path="x", role="weight", module=nn.Linear(30, 40), kind="linear", shape=(40, 30), W=Q, original=lambda: W
    )
    part = LoftQ(config, facts).requires_grad_(False)
    U, S, Vh = torch.linalg.svd(W - Q)
    best = U[:, :4] @ torch.diag(S[:4]) @ Vh[:4]
    assert float((part.delta(Q) - best).norm() / best.norm()) < 1e-2
    assert float((part.weight(Q, None)[0] - W).norm()) < float((Q - W).norm())


def test_loftq_over_packed_blocks_is_nearer_to_the_original(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The blocks stay as they are; adapted, the model is nearer to the one they were made from; the file is a LoRA that goes on as LoftQ."""
    from dataclasses import replace

    from ingraft.adapt.select import all_linear, base_modules
    from ingraft.quant.formats import QUANTISERS
    from ingraft.quant.layers import quantised

    def packed() -> nn.Module:
        model = tiny.make("llama")
        for path in all_linear(model, base_modules(model)):
            layer: Any = model.get_submodule(path)
            made = quantised(layer, QUANTISERS["nf4"])
            assert made.origin is not None
            made.origin = replace(made.origin, read=layer.weight.detach)
            model.set_submodule(path, made)
        return model.eval()

    batch = tiny.example("llama")
    original, model = tiny.output(tiny.make("llama"), batch), packed()
    before = float((tiny.output(model, batch) - original).norm())
    ingraft.attach(model, make_config("loftq", {"r": 8}), seed=1)
    near = tiny.output(model, batch)
    assert float((near - original).norm()) < 0.7 * before
    ingraft.save(model, tmp_path / "a")
    again = packed()
    ingraft.load(again, tmp_path / "a")
    assert ingraft.status(again).adapters[0].method == "loftq"
    assert torch.equal(tiny.output(again, batch), near)
    ingraft.detach(again)
    assert float((tiny.output(again, batch) - original).norm()) == before


def test_loftq_over_a_dense_base_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(ingraft.IngraftError, match="not quantised here"):
        ingraft.attach(tiny.make("llama"), make_config("loftq", {}))


# ------------------------------------------------------------------------------------------------------------------ ingraft.peft


def habit(tiny: SimpleNamespace, config: Any) -> Any:
    from ingraft.peft import get_peft_model

    torch.manual_seed(1)
    return get_peft_model(tiny.make("llama"), config)


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, "lora"),
        ({"use_rslora": True}, "rslora"),
        ({"use_dora": True}, "dora"),
        ({"use_dora": True, "use_rslora": True}, "dora"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "pissa_niter_4", "use_rslora": True}, "pissa"),
        ({"init_lora_weights": "olora", "use_rslora": True}, "olora"),
        ({"init_lora_weights": "eva"}, "eva"),
        ({"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 3}, "lora_bias": True}, "lora"),
    ],
)
def test_switches_of_the_incumbent_are_methods_here(
    options: dict[str, Any], method: str, tmp_path: Path, tiny: SimpleNamespace
) -> None:
    from ingraft.peft import LoraConfig, PeftModel

    model = habit(tiny, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))
    assert isinstance(model, PeftModel) and ingraft.status(model).adapters[0].method == method
    tiny.perturb(ingraft.parameters(model, "default").values())
    batch = tiny.example("llama")
    expected = tiny.output(model, batch)
    model.save_pretrained(tmp_path / "a")
    again = PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "a")
    assert ingraft.status(again).adapters[0].method == method
    assert torch.equal(tiny.output(again, batch), expected)


def test_eva_by_the_incumbents_names(tiny: SimpleNamespace) -> None:
    from ingraft.peft import EvaConfig, LoraConfig, initialize_lora_eva_weights

    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="eva", eva_config=EvaConfig(rho=1.5))
    assert config.to_dict()["eva_config"]["rho"] == 1.5
    model = habit(tiny, config)
    initialize_lora_eva_weights(model, data(tiny, 3))
    ranks = {p.shape[0] for key, p in ingraft.parameters(model, "default").items() if key.endswith("lora_A")}
    assert max(ranks) <= 6 and len(ranks) > 1
    for wrong, words in (
        (LoraConfig(init_lora_weights="eva", eva_config={"whiten": True}), "whiten"),
        (LoraConfig(init_lora_weights="eva", use_rslora=True), "plain LoRA"),
        (LoraConfig(init_lora_weights="eva", eva_config={"rhoo": 2}), "rhoo"),
        (LoraConfig(init_lora_weights="loftq"), "not quantised"),
        (LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_iter": 3}), "loftq_iter"),
        (LoraConfig(init_lora_weights="corda"), "corda"),
    ):
        with pytest.raises(ingraft.IngraftError, match=words):
            habit(tiny, wrong)


def test_adalora_by_the_incumbents_names(tmp_path: Path, tiny: SimpleNamespace) -> None:
    from ingraft.peft import AdaLoraConfig, PeftConfig, PeftModel, PeftType

    model = habit(tiny, AdaLoraConfig(init_r=5, target_r=2, total_step=4, tinit=0, tfinal=1, target_modules=TARGETS))
    assert model.peft_type is PeftType.ADALORA
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for step in range(1, 5):
        batch = data(tiny, step)[-1]
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
        model.update_and_allocate(step)
        optimiser.zero_grad()
    model.eval().save_pretrained(tmp_path / "a")
    config = PeftConfig.from_pretrained(tmp_path / "a")
    assert isinstance(config, AdaLoraConfig) and config.rank_pattern
    again = PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "a")
    sizes = [p.shape[0] for key, p in ingraft.parameters(again, "default").items() if key.endswith("lora_E")]
    assert sum(sizes) == 2 * len(sizes)
    batch = tiny.example("llama")
    assert float((tiny.output(again, batch) - tiny.output(model, batch)).abs().max()) < 1e-6


@pytest.mark.parametrize("start", ["loftq", "corda", "lora_ga"])
def test_how_a_file_of_the_incumbents_started(start: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """LoftQ's is an ordinary LoRA by now; what changed the base's weights cannot be honoured, and says so."""
    model, batch = tiny.make("llama"), tiny.example("llama")
    ingraft.attach(model, make_config("lora", {"r": 3}), seed=1)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "a")
    (tmp_path / "a" / "ingraft.json").unlink()
    file = tmp_path / "a" / CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": start}))
    other = tiny.make("llama")
    if start == "loftq":
        ingraft.load(other, tmp_path / "a")
        assert torch.equal(tiny.output(other, batch), tiny.output(model, batch))
    else:
        with pytest.raises(IngraftError, match=r"changed the base's weights.*path_initial_model_for_weight_conversion"):
            ingraft.load(other, tmp_path / "a")


def test_a_pissa_start_that_was_approximate(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The file leaves it to whoever reads it to find the start again; where the weight has a start worth the name all find the same."""

    @torch.no_grad()
    def base() -> Any:
        model, generator = tiny.make("llama"), torch.Generator().manual_seed(9)
        for path, module in model.named_modules():
            if path.endswith(tuple(TARGETS)):
                assert isinstance(module, nn.Linear)
                rows, columns = module.weight.shape
                first, second = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
                module.weight.copy_(0.1 * first @ second + 0.01 * module.weight)
        return model

    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights="pissa_niter_16")
    theirs = peft.get_peft_model(base(), config).eval()
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    ours, batch = base(), tiny.example("llama")
    with pytest.warns(UserWarning, match="init_lora_weights = 'pissa_niter_16'.*the exact decomposition"):
        ingraft.load(ours, tmp_path)
    assert ingraft.status(ours).adapters[0].method == "pissa"
    assert float((tiny.output(ours, batch) - tiny.output(theirs, batch)).abs().max()) < 1e-4
