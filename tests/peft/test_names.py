"""Scripts written for Hugging Face PEFT: its names, with its meaning, over the same model object."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.utils import constants
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MT5Config, MT5ForConditionalGeneration, PreTrainedModel

import ingraft
import ingraft.peft as ours
import peft
from ingraft import IngraftError
from ingraft.methods.registry import records
from ingraft.peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForSequenceClassification,
    PeftType,
    PrefixTuningConfig,
    PromptTuningConfig,
    TaskType,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
    targets,
)


def tuned(tiny: SimpleNamespace, kind: str = "llama", config: PeftConfig | None = None, name: str = "default") -> Any:
    model = get_peft_model(tiny.make(kind), config or LoraConfig(r=4, task_type="CAUSAL_LM"), name)
    tiny.perturb(ingraft.parameters(model, name).values())
    return model


def trainable(model: nn.Module) -> set[str]:
    """Adapters with a trainable tensor."""
    return {adapter.name for adapter in ingraft.status(model).adapters if adapter.trainable}


# ------------------------------------------------------------------------------------------------------------------ the habit


def test_the_model_stays_what_it_was(tiny: SimpleNamespace) -> None:
    base = tiny.make("llama")
    model = get_peft_model(base, LoraConfig(task_type=TaskType.CAUSAL_LM))
    assert model is base
    assert isinstance(model, PeftModel)
    assert isinstance(model, PeftModelForCausalLM)
    assert not isinstance(model, PeftModelForSequenceClassification)
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model, PreTrainedModel)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.get_base_model() is base
    assert not isinstance(tiny.make("llama"), PeftModel)


def test_mt0_large_counts_2359296(capsys: pytest.CaptureFixture[str]) -> None:
    config = MT5Config(
        d_model=1024, d_ff=2816, num_layers=24, num_decoder_layers=24, num_heads=16, d_kv=64, vocab_size=250112
    )
    with torch.device("meta"):
        base = MT5ForConditionalGeneration(config)
    total = sum(parameter.numel() for parameter in base.parameters()) + 2_359_296
    peft_config = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM, inference_mode=False, r=8, lora_alpha=32, lora_dropout=0.1
    )
    model = get_peft_model(base, peft_config)
    model.print_trainable_parameters()
    percent = f"{100 * 2_359_296 / total:.4f}"
    assert capsys.readouterr().out == f"trainable params: 2,359,296 || all params: {total:,} || trainable%: {percent}\n"
    assert {path.rpartition(".")[2] for path in model.ingraft_control.adapters["default"].sites} == {"q", "v"}


class Fused(nn.Module):
    """A block with one projection for queries, keys and values, as Baichuan has."""

    def __init__(self) -> None:
        super().__init__()
        self.W_pack = nn.Linear(8, 24, bias=False)
        self.o_proj = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.W_pack(x).chunk(3, dim=-1)
        return self.o_proj(torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ v)


def test_a_fused_projection_is_a_target_like_any_other() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(Fused(), Fused())
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["W_pack"]))
    assert model.get_nb_trainable_parameters() == (2 * 2 * (8 + 24), 2 * 2 * (8 + 24) + 2 * (8 * 24 + 8 * 8))
    x = torch.randn(1, 3, 8)
    with torch.no_grad():
        before = model(x)
        ingraft.parameters(model, "default")["0.W_pack.lora_B"].normal_()
        after = model(x)
        assert not torch.allclose(before, after)
        assert torch.allclose(model.merge_and_unload()(x), after, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "task", "name", "options"),
    [
        ("llama", "CAUSAL_LM", "LoraConfig", {}),
        ("gpt2", "CAUSAL_LM", "LoraConfig", {"use_dora": True, "r": 2, "fan_in_fan_out": True}),
        ("bert", "SEQ_CLS", "LoraConfig", {"modules_to_save": ["pooler"]}),
        ("mt5", "SEQ_2_SEQ_LM", "LoraConfig", {}),
        ("llama", "CAUSAL_LM", "IA3Config", {}),
        ("gpt2", "CAUSAL_LM", "IA3Config", {"fan_in_fan_out": True}),
        ("bert", "SEQ_CLS", "IA3Config", {}),
        ("llama", "CAUSAL_LM", "PromptTuningConfig", {"num_virtual_tokens": 4}),
        ("bert", "SEQ_CLS", "PromptTuningConfig", {"num_virtual_tokens": 4}),
        ("llama", "CAUSAL_LM", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
        ("gpt2", "CAUSAL_LM", "PrefixTuningConfig", {"num_virtual_tokens": 4, "prefix_projection": True}),
        ("bert", "SEQ_CLS", "PrefixTuningConfig", {"num_virtual_tokens": 4}),
        ("llama", "CAUSAL_LM", "LoraConfig", {"target_modules": "all-linear", "exclude_modules": ["up_proj"]}),
    ],
)
def test_the_same_config_trains_the_same_number_of_parameters(
    kind: str, task: str, name: str, options: dict[str, Any], tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in (peft, ours):
        library.get_peft_model(
            tiny.make(kind), getattr(library, name)(task_type=task, **options)
        ).print_trainable_parameters()
    theirs, mine = capsys.readouterr().out.splitlines()
    assert mine == theirs


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_prompt_tuning_keeps_the_longer_logits_and_the_loss(kind: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    task = "SEQ_CLS" if kind == "bert" else "CAUSAL_LM"
    model = tuned(tiny, kind, PromptTuningConfig(num_virtual_tokens=4, task_type=task))
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.make(kind), tmp_path).eval()
    batch = tiny.example(kind)
    batch["labels"] = torch.tensor([0, 1]) if kind == "bert" else batch["input_ids"]
    mine, other = model(**batch), theirs(**batch)
    assert mine.logits.shape == other.logits.shape == ((2, 3) if kind == "bert" else (2, 11, 64))
    assert (mine.logits - other.logits).abs().max() < 1e-5
    assert abs(mine.loss - other.loss) < 1e-5


def test_the_tables_of_usual_targets_are_the_incumbents() -> None:
    theirs = constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    mine = {kind: names if isinstance(names, str) else list(names) for kind, names in targets.LORA.items()}
    assert mine == theirs
    forward = constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING
    names = constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING
    assert {kind: (sorted(a + b), list(b)) for kind, (a, b) in targets.IA3.items()} == {
        kind: (sorted(names[kind]), forward[kind]) for kind in names
    }


# ------------------------------------------------------------------------------------------------------------------ several


def test_adapters_come_and_go(tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = tuned(tiny)
    first = tiny.output(model, batch)
    model.add_adapter("second", IA3Config())
    assert (model.active_adapter, model.active_adapters, model.active_adapters()) == (
        "default",
        ["default"],
        ["default"],
    )
    assert trainable(model) == {"default"}
    model.set_adapter("second")
    assert (model.active_adapter, trainable(model)) == ("second", {"second"})
    assert model.peft_config["second"].peft_type == PeftType.IA3
    assert model.peft_type == PeftType.IA3
    model.set_adapter(["default", "second"])
    assert model.active_adapter == ["default", "second"]
    model.set_adapter("default")
    assert torch.equal(tiny.output(model, batch), first)
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ingraft.json",
        "second",
    }
    model.delete_adapter("default")
    assert (model.active_adapter, list(model.peft_config)) == ("second", ["second"])
    again = PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    again.load_adapter(tmp_path / "second", "second")
    assert (again.active_adapter, trainable(again), again.training) == ("default", set(), False)
    assert torch.equal(tiny.output(again, batch), first)


def test_both_argument_orders_of_add_adapter(tiny: SimpleNamespace) -> None:
    model = tuned(tiny)
    model.add_adapter(LoraConfig(r=2), "transformers")
    assert model.active_adapter == "transformers"
    model.add_adapter(adapter_name="peft", peft_config=LoraConfig(r=2))
    assert model.active_adapter == "transformers"
    with pytest.raises(IngraftError, match="attached already"):
        model.add_adapter("peft", LoraConfig())
    assert model.active_adapter == "transformers"
    assert trainable(model) == {"transformers"}


def test_rows_have_adapters_by_name(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    base = tiny.output(tiny.make("llama"), batch)
    model = tuned(tiny)
    both = tiny.output(model, batch)
    mixed = tiny.output(model, {**batch, "adapter_names": ["__base__", "default"]})
    assert torch.allclose(mixed[0], base[0], atol=1e-6)
    assert torch.allclose(mixed[1], both[1], atol=1e-6)
    ids = {"input_ids": batch["input_ids"], "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    tuned_ids, base_ids = model.generate(**ids), tiny.make("llama").generate(**ids)
    mixed_ids = model.generate(**ids, adapter_names=["default", "__base__"])
    assert torch.equal(mixed_ids[0], tuned_ids[0])
    assert torch.equal(mixed_ids[1], base_ids[1])
    with pytest.raises(IngraftError, match="nobody"):
        model(**batch, adapter_names=["nobody", "default"])


def test_regression_16_trainability_is_the_users(tmp_path: Path, tiny: SimpleNamespace) -> None:
    base = tiny.make("llama")
    base.model.embed_tokens.requires_grad_(False)
    was = [parameter.requires_grad for parameter in base.parameters()]
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    frozen = ingraft.parameters(model, "default")["model.layers.0.self_attn.q_proj.lora_A"]
    frozen.requires_grad_(False)
    with model.disable_adapter():
        pass
    assert not frozen.requires_grad
    model.add_adapter("other", LoraConfig(r=2))
    model.set_adapter("other")
    model.set_adapter("default")
    assert not frozen.requires_grad
    assert trainable(model) == {"default"}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    loaded.set_adapter("default")
    assert trainable(loaded) == set()
    assert trainable(PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True)) == {"default"}
    assert [parameter.requires_grad for parameter in model.unload().parameters()] == was


def test_disable_adapter_is_the_base(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    base = tiny.output(tiny.make("llama"), batch)
    model = tuned(tiny)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model, batch), base)
    assert not torch.equal(tiny.output(model, batch), base)
    model.disable_adapters()
    assert torch.equal(tiny.output(model, batch), base)
    model.enable_adapters()
    assert model.active_adapter == "default"


WAYS = [
    *("svd", "cat", "linear", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd"),
    *("magnitude_prune", "magnitude_prune_svd"),
]


RANK_STABILISED = {"use_rslora": True} if "rslora" in records() else {}


def chosen(share: Tensor, **_: object) -> Tensor:
    """In place of `torch.bernoulli`: the same entries for both sides, whatever else has drawn from the generator."""
    rows, columns = (torch.arange(1, n + 1, dtype=torch.float64) for n in share.flatten(1).shape)
    places = (
        rows[:, None] * columns * 0.7548776662
    ).frac()  # symmetric: an embedding's change is stored the other way round
    return (places.reshape(share.shape) < share).to(share.dtype)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "picture"])
def test_weighted_sums_are_the_incumbents(
    how: str, kind: str, tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The factors' scales differ, a weight is negative, one site has one adapter only."""
    monkeypatch.setattr(torch, "bernoulli", chosen)
    names = {"picture": ["first", "second"], "gpt2": ["c_attn", "c_fc"]}.get(
        kind, ["q_proj", "up_proj", "embed_tokens"]
    )
    task = None if kind == "picture" else "CAUSAL_LM"
    settings: dict[str, Any] = {"density": 0.6} if "_" in how or how == "ties" else {}
    model = tuned(tiny, kind, LoraConfig(r=4, lora_alpha=8, target_modules=names, task_type=task))
    model.add_adapter("b", LoraConfig(r=4, lora_alpha=2, target_modules=names[:1], task_type=task, **RANK_STABILISED))
    tiny.perturb(ingraft.parameters(model, "b").values())
    model.save_pretrained(tmp_path)
    for name, weights in (("sum", [0.5, 2.0]), ("difference", [1.5, -0.5])):
        model.add_weighted_adapter(["default", "b"], weights, name, combination_type=how, **settings)
    model.add_weighted_adapter(["default"], [1.0], "itself", combination_type=how, **settings)
    assert model.active_adapter == "default"
    theirs: Any = peft.PeftModel.from_pretrained(tiny.make(kind), tmp_path)
    theirs.load_adapter(str(tmp_path / "b"), "b")
    for name, weights in (("sum", [0.5, 2.0]), ("difference", [1.5, -0.5])):
        theirs.add_weighted_adapter(["default", "b"], weights, name, combination_type=how, **settings)
    batch, theirs = tiny.example(kind), theirs.eval()
    for name in ("sum", "difference"):
        model.set_adapter(name)
        theirs.set_adapter(name)
        assert torch.allclose(tiny.output(model, batch), tiny.output(theirs, batch), atol=1e-5)
    model.set_adapter("itself")
    mine = tiny.output(model, batch)
    model.set_adapter("default")
    assert torch.allclose(tiny.output(model, batch), mine, atol=1e-5)


@pytest.mark.parametrize("majority", ["total", "frequency"])
@pytest.mark.parametrize("how", ["ties", "ties_svd"])
def test_signs_are_elected_as_by_the_incumbent(how: str, majority: Any, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tuned(tiny, "llama", LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for seed, name in enumerate(("b", "c")):
        model.add_adapter(name, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
        torch.manual_seed(seed)
        for parameter in ingraft.parameters(model, name).values():
            parameter.data.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    for name in ("b", "c"):
        theirs.load_adapter(str(tmp_path / name), name)
    batch, options = tiny.example("llama"), {"density": 0.5, "majority_sign_method": majority}
    for one in (model, theirs):
        one.add_weighted_adapter(["default", "b", "c"], [1.0, 0.7, 0.4], "sum", combination_type=how, **options)
        one.set_adapter("sum")
    assert torch.allclose(tiny.output(model, batch), tiny.output(theirs.eval(), batch), atol=1e-5)


def test_ia3_adapters_sum_their_vectors_as_the_incumbents_do(tmp_path: Path, tiny: SimpleNamespace) -> None:
    config = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "task_type": "CAUSAL_LM"}
    model = tuned(tiny, "llama", IA3Config(**config))
    model.add_adapter("b", IA3Config(**config))
    with torch.no_grad():
        for parameter in ingraft.parameters(model, "b").values():
            parameter.fill_(0.5)
    model.save_pretrained(tmp_path)
    theirs: Any = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    theirs.load_adapter(str(tmp_path / "b"), "b")
    for one in (model, theirs):
        one.add_weighted_adapter(["default", "b"], [0.3, 0.9], "sum")
        one.set_adapter("sum")
    batch = tiny.example("llama")
    assert torch.allclose(tiny.output(model, batch), tiny.output(theirs.eval(), batch), atol=1e-5)


def test_regression_4_the_incumbents_call_keeps_a_scale(tiny: SimpleNamespace) -> None:
    """Rank-stabilised LoRA, and DoRA with its magnitudes: one adapter with weight 1 gives itself."""
    batch = tiny.example("llama")
    for options in (RANK_STABILISED, {"use_dora": True}):
        for how in ("svd", "linear", "cat"):
            model = tuned(tiny, "llama", LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
            expected = tiny.output(model, batch)
            model.add_weighted_adapter(["default"], [1.0], "itself", combination_type=how)
            model.set_adapter("itself")
            assert torch.allclose(tiny.output(model, batch), expected, atol=1e-5), (options, how)


def test_what_cannot_be_combined_is_refused_at_once(tiny: SimpleNamespace) -> None:
    model = tuned(tiny)
    model.add_adapter("soft", PromptTuningConfig(num_virtual_tokens=2))
    with pytest.raises(IngraftError) as error:
        model.add_weighted_adapter(["default", "soft"], [1.0, 1.0], "sum", combination_type="magic")
    assert len(error.value.problems) == 2
    assert list(model.peft_config) == ["default", "soft"]


# ------------------------------------------------------------------------------------------------------------------ merge, save


def test_merge_and_unload_gives_a_plain_model(tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    base, model = tiny.make("llama"), tuned(tiny)
    active = tiny.output(model, batch)
    plain = model.merge_and_unload(progressbar=True, safe_merge=True)
    assert plain is model
    assert type(plain) is LlamaForCausalLM
    assert not isinstance(plain, PeftModel)
    assert plain.state_dict().keys() == base.state_dict().keys()
    assert torch.allclose(tiny.output(plain, batch), active, atol=1e-5)
    plain.save_pretrained(tmp_path)
    assert torch.equal(tiny.output(LlamaForCausalLM.from_pretrained(tmp_path).eval(), batch), tiny.output(plain, batch))


def test_merge_and_unload_of_chosen_adapters(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = tuned(tiny)
    model.add_adapter("b", LoraConfig(r=2, target_modules=["down_proj"]))
    tiny.perturb(ingraft.parameters(model, "b").values())
    model.set_adapter("b")
    active = tiny.output(model, batch)
    model.set_adapter("default")
    model.merge_adapter(["b"])
    assert torch.allclose(tiny.output(model, batch), active, atol=1e-5)
    model.unmerge_adapter()
    assert model.active_adapter == "default"
    assert torch.allclose(tiny.output(model.merge_and_unload(adapter_names=["b"]), batch), active, atol=1e-5)


def test_safe_merge_refuses_what_is_not_finite(tiny: SimpleNamespace) -> None:
    model = tuned(tiny)
    with torch.no_grad():
        ingraft.parameters(model, "default")["model.layers.0.self_attn.v_proj.lora_B"][0, 0] = float("inf")
    with pytest.raises(IngraftError, match="not finite"):
        model.merge_and_unload(safe_merge=True)
    assert isinstance(model, PeftModel)


def test_unload_is_the_base(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    plain = tuned(tiny).unload()
    assert type(plain) is LlamaForCausalLM
    assert torch.equal(tiny.output(plain, batch), tiny.output(tiny.make("llama"), batch))
    assert not hasattr(plain, "print_trainable_parameters")


def test_auto_classes_load_base_and_adapter(tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    tiny.make("llama").save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    tiny.perturb(ingraft.parameters(model, "default").values())
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoPeftModelForCausalLM, AutoPeftModel):
        again = auto.from_pretrained(tmp_path / "adapter")
        assert isinstance(again, PeftModelForCausalLM)
        assert torch.equal(tiny.output(again, batch), tiny.output(model.eval(), batch))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.allclose(tiny.output(theirs, batch), tiny.output(model, batch), atol=1e-5)


def test_regression_12_soft_prompts_train_further_after_loading(tmp_path: Path, tiny: SimpleNamespace) -> None:
    for config in (
        PromptTuningConfig(num_virtual_tokens=4),
        PrefixTuningConfig(num_virtual_tokens=4, prefix_projection=True),
    ):
        config.task_type = TaskType.CAUSAL_LM
        folder = tmp_path / type(config).__name__
        model = tuned(tiny, "llama", config)
        model.save_pretrained(folder)
        again = PeftModel.from_pretrained(tiny.make("llama"), folder, is_trainable=True)
        batch = tiny.example("llama")
        again(**batch, labels=batch["input_ids"]).loss.backward()
        own = ingraft.parameters(again, "default")
        assert own.keys() == ingraft.parameters(model, "default").keys()
        assert all(parameter.grad is not None for parameter in own.values())


def test_state_dicts_go_in_and_out(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = tuned(tiny)
    state = get_peft_model_state_dict(model)
    theirs = peft.get_peft_model(tiny.make("llama"), peft.LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert {key: value.shape for key, value in state.items()} == {
        key: value.shape for key, value in peft.get_peft_model_state_dict(theirs).items()
    }
    other = get_peft_model(tiny.make("llama"), LoraConfig(r=4, task_type="CAUSAL_LM"))
    result = set_peft_model_state_dict(other, {**state, "something.else": torch.zeros(1)})
    assert (result.missing_keys, result.unexpected_keys) == ([], ["something.else"])
    assert torch.equal(tiny.output(other, batch), tiny.output(model, batch))
    with pytest.raises(IngraftError, match="has shape"):
        set_peft_model_state_dict(other, {next(iter(state)): torch.zeros(1, 1)})


def test_copies_carry_the_methods(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = tuned(tiny)
    before = tiny.output(model, batch)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(again, PeftModel)
        assert torch.equal(tiny.output(again, batch), before)
        tiny.perturb(ingraft.parameters(again, "default").values())
        assert again.merge_and_unload() is again
    assert torch.equal(tiny.output(model, batch), before)


def test_native_verbs_work_on_it_too(tiny: SimpleNamespace) -> None:
    model = tuned(tiny)
    ingraft.detach(model)
    assert type(model) is LlamaForCausalLM


# ------------------------------------------------------------------------------------------------------------------ configs


def test_configs_are_saved_and_read(tmp_path: Path) -> None:
    config = LoraConfig(r=3, target_modules={"b", "a"}, task_type="SEQ_CLS", modules_to_save=["x"])
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert isinstance(again, LoraConfig)
    assert (again.r, again.target_modules, again.task_type) == (3, ["a", "b"], TaskType.SEQ_CLS)
    theirs = peft.PeftConfig.from_pretrained(tmp_path)
    assert theirs.target_modules == {"a", "b"}
    assert get_peft_config({"peft_type": "IA3", "target_modules": ["k"]}) == IA3Config(target_modules=["k"])
    with pytest.raises(IngraftError, match="did you mean 'CAUSAL_LM'"):
        LoraConfig(task_type="CAUSAL")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(bias="some"), "bias = 'some'"),
        (LoraConfig(use_dora=True, init_lora_weights="pissa"), "got 'pissa'"),
        (LoraConfig(rank_pattern={"q_proj": 0}), "rank_pattern"),
        (LoraConfig(r=33, target_modules=["q_proj"]), "it must be at most 32"),
        (LoraConfig(r=0), "r must be at least 1"),
        (LoraConfig(target_modules=["nothing"]), "matches no module"),
        (LoraConfig(modules_to_save=["head"]), "'head' matches no module (did you mean 'lm_head'"),
        (PromptTuningConfig(num_virtual_tokens=0), "num_virtual_tokens must be at least 1"),
    ],
)
def test_what_a_config_cannot_mean_is_refused(config: PeftConfig, words: str, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    with pytest.raises(IngraftError) as error:
        get_peft_model(model, config)
    assert words in str(error.value)
    assert type(model) is LlamaForCausalLM


def test_regression_8_names_that_match_nothing_are_not_silent(tiny: SimpleNamespace) -> None:
    with pytest.warns(UserWarning, match="'v_prj' matches no module.*v_proj"):
        get_peft_model(tiny.make("llama"), LoraConfig(target_modules=["q_proj", "v_prj"]))
    with pytest.raises(IngraftError, match="no usual choice"):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig())


def test_regression_18_all_linear_leaves_a_plain_modules_head_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    assert list(model.ingraft_control.adapters["default"].sites) == ["0"]


def test_saving_as_a_pickle_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    with pytest.raises(IngraftError, match="safetensors"):
        tuned(tiny).save_pretrained(tmp_path / "a", safe_serialization=False)
    assert not (tmp_path / "a").exists()


def test_an_adapter_that_is_nowhere_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(IngraftError, match=r"holds no adapter_config\.json"):
        PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "empty")
    with pytest.raises(IngraftError, match="no such folder"):
        PeftModel.from_pretrained(tiny.make("llama"), "nobody/nothing", local_files_only=True)


def test_what_is_no_folder_here_comes_from_the_hub_files_of_an_adapter_only(
    tmp_path: Path, tiny: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tuned(tiny)
    model.save_pretrained(tmp_path / "inner")
    asked: dict[str, Any] = {}

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    again = PeftModel.from_pretrained(tiny.make("llama"), "somebody/an-adapter", subfolder="inner", revision="v1")
    assert torch.equal(tiny.output(again, tiny.example("llama")), tiny.output(model, tiny.example("llama")))
    files = ["inner/adapter_config.json", "inner/adapter_model.safetensors", "inner/ingraft.json"]
    assert (asked["name"], asked["revision"], asked["allow_patterns"]) == ("somebody/an-adapter", "v1", files)


def test_preparation_for_training_over_a_quantised_base(tiny: SimpleNamespace) -> None:
    model = prepare_model_for_kbit_training(tiny.make("llama").bfloat16())
    assert {(p.dtype, p.requires_grad) for p in model.parameters()} == {(torch.float32, False)}
    assert not model.model.layers[0].gradient_checkpointing
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.model.layers[0].gradient_checkpointing
