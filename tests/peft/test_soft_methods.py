"""Methods that learn tokens, against Hugging Face PEFT: both directions, the habits around them, and the two regressions they are known for."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

import ingraft
import peft
from ingraft import IngraftError
from ingraft import peft as ours
from ingraft.methods.registry import make_config

TOLERANCE = 1e-5

CONFIGS: dict[str, Any] = {
    "prompt": lambda library: library.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda library: library.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix-projection": lambda library: library.PrefixTuningConfig(
        num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "p-tuning": lambda library: library.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
    "p-tuning-lstm": lambda library: library.PromptEncoderConfig(
        num_virtual_tokens=4, encoder_hidden_size=8, encoder_reparameterization_type="LSTM", task_type="CAUSAL_LM"
    ),
    "multitask-prompt": lambda library: library.MultitaskPromptTuningConfig(
        num_virtual_tokens=4, num_tasks=3, num_ranks=2, task_type="CAUSAL_LM"
    ),
    "llama-adapter": lambda library: library.AdaptionPromptConfig(
        adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM"
    ),
}
"""Scripts' configs, in either library."""

TASKS = torch.tensor([2, 0])


def apart(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


def told(method: str, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | ({"task_ids": TASKS} if method == "multitask-prompt" else {})


@pytest.mark.parametrize("method", CONFIGS)
def test_a_script_written_for_the_incumbent(
    method: str, tmp_path: Path, tiny: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same number of trained parameters, logits, loss and saved file as there."""
    batch = told(method, tiny.example("llama"))
    for library in (peft, ours):
        library.get_peft_model(tiny.make("llama"), CONFIGS[method](library)).print_trainable_parameters()
    there, here = capsys.readouterr().out.splitlines()
    # Their projected prefix starts from embeddings of the keys' width, ours from the model's, as the paper's does.
    assert here == there or method == "prefix-projection"
    model = ours.get_peft_model(tiny.make("llama"), CONFIGS[method](ours))
    tiny.perturb(ingraft.parameters(model, "default").values())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    assert model.peft_config["default"].peft_type == theirs.peft_config["default"].peft_type.value
    one, other = (x(**batch, labels=batch["input_ids"]) for x in (model, theirs))
    assert apart(one.logits, other.logits) < TOLERANCE
    assert abs(one.loss - other.loss) < TOLERANCE
    with model.disable_adapter():
        assert apart(tiny.output(model, batch), one.logits[:, -7:]) > 100 * TOLERANCE


@pytest.mark.parametrize("method", CONFIGS)
def test_files_from_there_load_here(method: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = told(method, tiny.example("llama"))
    torch.manual_seed(2)
    theirs = peft.get_peft_model(tiny.make("llama"), CONFIGS[method](peft)).eval()
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    here = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path)
    assert apart(tiny.output(here, batch), tiny.output(theirs, batch)) < TOLERANCE


@pytest.mark.parametrize("method", ["multitask-prompt", "llama-adapter", "prompt"])
def test_gradients_of_every_tensor_are_the_incumbents(method: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    batch = told(method, tiny.example("llama"))
    theirs = peft.get_peft_model(tiny.make("llama"), CONFIGS[method](peft))
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path))
    here = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True)
    found: list[list[float]] = []
    for model in (theirs.eval(), here.eval()):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        found.append(sorted(float(p.grad.norm()) for p in model.parameters() if p.grad is not None))
    assert len(found[0]) == len(found[1]) >= 1
    assert torch.allclose(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4)


def test_tasks_differ_in_generation_and_each_row_has_its_own(tiny: SimpleNamespace) -> None:
    batch = tiny.example("llama")
    model = ours.get_peft_model(tiny.make("llama"), CONFIGS["multitask-prompt"](ours))
    tiny.perturb(ingraft.parameters(model, "default").values())
    with torch.no_grad():
        for p in ingraft.parameters(model, "default").values():
            p.mul_(4)
    mixed = tiny.output(model, {**batch, "task_ids": torch.tensor([2, 1])})
    for row, task in enumerate([2, 1]):
        alone = tiny.output(
            model, {**{k: v[row : row + 1] for k, v in batch.items()}, "task_ids": torch.tensor([task])}
        )
        assert apart(mixed[row : row + 1], alone) < TOLERANCE
        assert apart(mixed[row : row + 1], tiny.output(model, batch)[row : row + 1]) > 100 * TOLERANCE
    ids = batch["input_ids"][:1].expand(3, -1)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "num_beams": 2}
    text = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), task_ids=torch.tensor([0, 1, 2]), **options
    )
    for task in range(3):
        own = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1])}
        assert torch.equal(text[task : task + 1], model.generate(**own, task_ids=torch.tensor([task]), **options))
    with pytest.raises(IngraftError, match="tasks are numbered from 0 to 2"):
        model(**batch, task_ids=torch.tensor([0, 3]))


@pytest.mark.parametrize("how", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
def test_a_multitask_prompt_starts_from_a_source(how: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    source = ours.get_peft_model(tiny.make("llama"), CONFIGS["multitask-prompt"](ours))
    tiny.perturb(ingraft.parameters(source, "default").values())
    source.save_pretrained(tmp_path)
    options: dict[str, Any] = {
        "num_virtual_tokens": 4,
        "num_ranks": 2,
        "task_type": "CAUSAL_LM",
        "prompt_tuning_init": how,
        "prompt_tuning_init_task": 2,
        "prompt_tuning_init_state_dict_path": str(tmp_path / "adapter_model.safetensors"),
    }
    here = ours.get_peft_model(tiny.make("llama"), ours.MultitaskPromptTuningConfig(**options))
    there = peft.get_peft_model(tiny.make("llama"), peft.MultitaskPromptTuningConfig(**options))
    mine, theirs = ours.get_peft_model_state_dict(here), peft.get_peft_model_state_dict(there)
    assert mine.keys() == theirs.keys()
    same = ["prompt_embeddings"] if how == "ONLY_SOURCE_SHARED" else list(mine)
    assert all(torch.equal(mine[key], theirs[key]) for key in same)
    options["num_virtual_tokens"] = 5
    model = tiny.make("llama")
    with pytest.raises(IngraftError, match="has shape"):
        ours.get_peft_model(model, ours.MultitaskPromptTuningConfig(**options))
    assert type(model) is type(tiny.make("llama"))


# ------------------------------------------------------------------------------------------------------------ kept apart, kept alike


def test_llama_adapter_on_gpt2_means_something_else_there(tmp_path: Path, tiny: SimpleNamespace) -> None:
    theirs = peft.get_peft_model(tiny.make("gpt2"), CONFIGS["llama-adapter"](peft))
    theirs.save_pretrained(str(tmp_path / "theirs"))
    with pytest.raises(IngraftError, match="llama and mistral only"):
        ingraft.load(tiny.make("gpt2"), tmp_path / "theirs")
    model, batch = tiny.make("gpt2"), tiny.example("gpt2")
    ingraft.attach(model, make_config("llama-adapter", {"adapter_len": 4}))
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "ours")
    with pytest.raises(KeyError, match="INGRAFT_LLAMA_ADAPTER"):
        peft.PeftModel.from_pretrained(tiny.make("gpt2"), str(tmp_path / "ours"))
    again = tiny.make("gpt2")
    ingraft.load(again, tmp_path / "ours")
    assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))


def test_llama_adapter_on_mistral_both_ways(tmp_path: Path, tiny: SimpleNamespace) -> None:
    def mistral() -> Any:
        config = MistralConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            sliding_window=4,
        )
        torch.manual_seed(0)
        return MistralForCausalLM(config).eval()

    batch = tiny.example("llama")
    theirs = peft.get_peft_model(mistral(), peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=2)).eval()
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(str(tmp_path / "theirs"))
    here = mistral()
    ingraft.load(here, tmp_path / "theirs")
    assert apart(tiny.output(here, batch), tiny.output(theirs, batch)) < TOLERANCE
    ingraft.save(here, tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(mistral(), str(tmp_path / "ours")).eval()
    assert apart(tiny.output(again, batch), tiny.output(here, batch)) < TOLERANCE
    assert apart(tiny.output(here, batch), tiny.output(mistral(), batch)) > 100 * TOLERANCE


def test_more_layers_than_there_are_is_refused(tiny: SimpleNamespace) -> None:
    with pytest.raises(IngraftError, match="only 2 attentions"):
        ingraft.attach(tiny.make("llama"), make_config("llama-adapter", {"adapter_layers": 3}))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_p_tuning_v2_is_a_prefix_there_and_itself_here(kind: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model, batch = tiny.make(kind), tiny.example(kind)
    options = {"num_virtual_tokens": 5} | ({"modules_to_save": ["classifier"]} if kind == "bert" else {})
    ingraft.attach(model, make_config("p-tuning-v2", options))
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path)
    expected = tiny.output(model, batch)
    theirs = peft.PeftModel.from_pretrained(tiny.make(kind), str(tmp_path)).eval()
    assert theirs.peft_config["default"].peft_type == peft.PeftType.PREFIX_TUNING
    assert apart(tiny.output(theirs, batch), expected) < TOLERANCE
    again = tiny.make(kind)
    ingraft.load(again, tmp_path)
    assert ingraft.status(again).adapters[0].method == "p-tuning-v2"
    assert torch.equal(tiny.output(again, batch), expected)


def test_a_prefix_in_some_of_the_blocks_is_kept_under_a_name_of_ours(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model, batch = tiny.make("llama"), tiny.example("llama")
    ingraft.attach(model, make_config("prefix", {"num_virtual_tokens": 4, "layers_to_transform": [1]}))
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path)
    again = tiny.make("llama")
    ingraft.load(again, tmp_path)
    assert torch.equal(tiny.output(again, batch), tiny.output(model, batch))
    assert "INGRAFT_PREFIX" in (tmp_path / "adapter_config.json").read_text()


# ------------------------------------------------------------------------------------------------------------------- regressions


@pytest.mark.parametrize("method", CONFIGS)
def test_regression_12_soft_prompts_train_on_after_loading(method: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """What was trained is loaded trainable, encoders included, and a step from there is the step without the break."""
    batch = told(method, tiny.example("llama"))

    def step(model: Any) -> None:
        own = list(ingraft.parameters(model, "default").values())
        optimiser = torch.optim.SGD(own, lr=0.1)
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
        optimiser.zero_grad()

    model = ours.get_peft_model(tiny.make("llama"), CONFIGS[method](ours))
    tiny.perturb(ingraft.parameters(model, "default").values())
    step(model)
    model.save_pretrained(tmp_path)
    again = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path, is_trainable=True)
    assert ingraft.parameters(again, "default").keys() == ingraft.parameters(model, "default").keys()
    before = {key: p.detach().clone() for key, p in ingraft.parameters(again, "default").items()}
    step(again)
    step(model)
    for key, p in ingraft.parameters(again, "default").items():
        assert not torch.equal(p, before[key]), f"{key} did not move"
        assert torch.equal(p, ingraft.parameters(model, "default")[key]), f"{key} moved elsewhere"


def test_regression_12_an_encoder_is_kept_and_the_incumbent_passes_over_it(
    tmp_path: Path, tiny: SimpleNamespace
) -> None:
    model = ours.get_peft_model(tiny.make("llama"), CONFIGS["p-tuning-lstm"](ours))
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert "prompt_embeddings" in keys
    assert {key for key in keys if key.startswith("base_model.shared.")} == keys - {"prompt_embeddings"} != set()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*base_model.shared.*")
        peft.PeftModel.from_pretrained(tiny.make("llama"), str(tmp_path))


@pytest.mark.parametrize("method", ["prefix", "prefix-projection", "p-tuning", "llama-adapter"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_regression_13_prefix_and_gradient_checkpointing_in_both_orders(
    method: str, reentrant: bool, tiny: SimpleNamespace
) -> None:
    batch = tiny.example("llama")
    found: list[dict[str, Tensor]] = []
    for order in ("none", "before", "after"):
        model = tiny.make("llama").train()

        def checkpointing(model: Any = model) -> None:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})

        if order == "before":
            checkpointing()
        torch.manual_seed(0)
        ours.get_peft_model(model, CONFIGS[method](ours))
        tiny.perturb(ingraft.parameters(model, "default").values())
        if order == "after":
            checkpointing()
        model.enable_input_require_grads()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        own = ingraft.parameters(model, "default")
        found.append({key: p.grad for key, p in own.items() if p.grad is not None})
        assert found[-1].keys() == own.keys(), order
    plain, *saving = found
    assert all(torch.allclose(one[key], plain[key], atol=1e-6) for one in saving for key in plain)
