"""The habits around the model: Trainer with checkpoints, generation in all its forms, no PEFT installed, a real base."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainingArguments, set_seed

import ingraft
import peft
from ingraft import peft as ours
from ingraft.bases import load_base

ARTICLES = Path(__file__).parents[2] / "examples" / "articles"


def trained(tiny: SimpleNamespace, folder: Path, *, stop: int = 8, resume: bool = False) -> Any:
    set_seed(3)
    model = ours.get_peft_model(tiny.make("llama"), ours.LoraConfig(r=4, lora_dropout=0.2, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(2, 64, (16, 6), generator=generator)]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=stop,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return model


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
def test_trainer_resumes_to_the_same_bits_and_its_checkpoints_are_adapters(
    tmp_path: Path, tiny: SimpleNamespace
) -> None:
    whole = ingraft.parameters(trained(tiny, tmp_path / "whole"), "default")
    trained(tiny, tmp_path / "parts", stop=4)
    resumed = ingraft.parameters(trained(tiny, tmp_path / "parts", resume=True), "default")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    batch = tiny.example("llama")
    mine = ours.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "whole" / "checkpoint-8")
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "whole" / "checkpoint-8").eval()
    assert all(torch.equal(whole[key], value) for key, value in ingraft.parameters(mine, "default").items())
    assert torch.allclose(tiny.output(mine, batch), tiny.output(theirs, batch), atol=1e-5)


CONFIGS: dict[str, Any] = {
    "lora": lambda library: library.LoraConfig(r=4, task_type="CAUSAL_LM"),
    "prompt": lambda library: library.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda library: library.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_generation_is_the_incumbents(method: str, how: dict[str, Any], tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = ours.get_peft_model(tiny.make("llama"), CONFIGS[method](ours))
    tiny.perturb(ingraft.parameters(model, "default").values())
    model.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path).eval()
    ids = torch.randint(2, 64, (2, 5), generator=torch.Generator().manual_seed(4))
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
    }
    made = model.generate(**batch, **how)
    # Their soft prompts break with a static cache; the greedy answer is the same with any.
    reference = theirs.generate(**batch, **{key: value for key, value in how.items() if key == "num_beams"})
    assert torch.equal(made[:, -6:], reference[:, -6:])


def test_nothing_here_needs_peft() -> None:
    script = (
        "import importlib.util as u, sys\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name.split('.')[0] == 'peft' else find(name, *a)\n"
        "sys.modules['peft'] = None\n"
        f"sys.path.insert(0, {str(ARTICLES)!r})\n"
        "import save_load_merge_generate as script\n"
        "assert script.main()['film in a pipeline'] == 'the film is very good'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    """The real base and a sentence for it."""
    base = load_base("smollm2", dtype="float32")
    text = "The capital of France is Paris, and the review of the film said that it was"
    yield base.model.eval(), base.tokenizer(text, return_tensors="pt").input_ids


REAL: dict[str, Any] = {
    "lora": lambda library: library.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "ia3": lambda library: library.IA3Config(task_type="CAUSAL_LM"),
    "prompt": lambda library: library.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
    "prefix": lambda library: library.PrefixTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"),
    "p-tuning": lambda library: library.PromptEncoderConfig(
        num_virtual_tokens=8, encoder_hidden_size=64, task_type="CAUSAL_LM"
    ),
    "llama-adapter": lambda library: library.AdaptionPromptConfig(
        adapter_len=8, adapter_layers=20, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("method", REAL)
@torch.no_grad()
def test_smollm2_agrees_both_ways(method: str, smollm2: Any, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model, ids = smollm2
    base = model(ids).logits
    try:
        ours.get_peft_model(model, REAL[method](ours))
        tiny.perturb(p.mul_(0.2) for p in ingraft.parameters(model, "default").values())
        model.save_pretrained(tmp_path / "ours")
        mine = model(ids).logits
        ingraft.detach(model)
        theirs = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "ours").eval()
        assert (mine[:, -ids.shape[1] :] - base).abs().max() > 0.1
        assert (mine - theirs(ids).logits).abs().max() < 1e-4
        theirs.save_pretrained(str(tmp_path / "theirs"), save_embedding_layers=False)  # else it asks the hub
        ingraft.load(model, tmp_path / "theirs")
        assert (model(ids).logits - theirs(ids).logits[:, -ids.shape[1] :]).abs().max() < 1e-4
    finally:
        if hasattr(model, "ingraft_control"):
            ingraft.detach(model)
