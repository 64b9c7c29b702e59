"""AdaLoRA's training: held to Hugging Face PEFT step by step, its budget met exactly, its book-keeping resumed, its files read both ways."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import ingraft
import peft
from ingraft import adapt
from ingraft.adapt.control import require_control
from ingraft.adapt.files import CONFIG, WEIGHTS
from ingraft.adapt.hooks import parts_of
from ingraft.methods.allocation import allocate
from ingraft.methods.registry import make_config
from ingraft.testing import SUBJECTS
from ingraft.testing.cases import close, randomise, run

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 12
IGNORED = "ignore:The following rank_pattern keys"  # PEFT, of every AdaLoRA it reads, its own too
SCHEDULE: dict[str, Any] = {"init_r": 6, "target_r": 3, "lora_alpha": 24, "tinit": 1, "tfinal": 4, "deltaT": 2}
SCHEDULE |= {"total_step": STEPS, "orth_reg_weight": 0.3}


def batch_of(tiny: SimpleNamespace, step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(2, 64, (2, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def ours_trained(tiny: SimpleNamespace, model: Any, first: int = 0, optimiser: Any = None) -> Any:
    """Steps of a plain loop; the penalty comes with the model's loss, the allocation behind the step."""
    optimiser = optimiser or torch.optim.AdamW(list(ingraft.parameters(model, "default").values()), lr=1e-2)
    model.train()
    for step in range(first, STEPS):
        model(**batch_of(tiny, step)).loss.backward()
        optimiser.step()
        ingraft.after_step(model, step + 1)
        optimiser.zero_grad()
    return model.eval()


def kept_ranks(model: nn.Module) -> dict[str, int]:
    own = ingraft.parameters(model, "default")
    return {key.removesuffix(".lora_E"): int((p != 0).sum()) for key, p in own.items() if key.endswith("lora_E")}


def test_ten_steps_are_theirs(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Same start, same data: after every step the same tensors, in the end the same directions left."""
    torch.manual_seed(2)
    theirs = peft.get_peft_model(
        tiny.make("llama"), peft.AdaLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **SCHEDULE)
    )
    tiny.perturb(p for p in theirs.parameters() if p.requires_grad)
    start = {
        key.removeprefix("base_model.model.").removesuffix(".default"): p.detach().clone()
        for key, p in theirs.named_parameters()
        if p.requires_grad
    }
    ours = tiny.make("llama")
    ingraft.attach(ours, make_config("adalora", {"target_modules": TARGETS, **SCHEDULE}), seed=1)
    own = ingraft.parameters(ours, "default")
    with torch.no_grad():
        for key, p in own.items():
            p.copy_(start[key])
    mine = torch.optim.AdamW(list(own.values()), lr=1e-2)
    optimiser = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    ours.train()
    theirs.train()
    for step in range(STEPS):
        batch = batch_of(tiny, step)
        loss, expected = ours(**batch).loss, theirs(**batch).loss
        assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-4), step
        loss.backward()
        expected.backward()
        mine.step()
        optimiser.step()
        ingraft.after_step(ours, step + 1)
        theirs.base_model.update_and_allocate(step + 1)
        mine.zero_grad()
        optimiser.zero_grad()
        for key, p in theirs.named_parameters():
            if p.requires_grad:
                other = own[key.removeprefix("base_model.model.").removesuffix(".default")]
                assert float((p - other).detach().abs().max()) < 2e-4, (step, key)
    assert any(not part.kept.all() for part in ours.modules() if hasattr(part, "kept"))


@pytest.mark.filterwarnings(IGNORED)
def test_the_budget_is_met_exactly_and_ranks_differ(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """Dropped directions cost nothing in a file, ours or PEFT's to read; the loaded adapter answers alike and is of that size."""
    model = tiny.make("llama")
    ingraft.attach(model, make_config("adalora", {"target_modules": TARGETS, **SCHEDULE}), seed=1)
    ours_trained(tiny, model)
    ranks = kept_ranks(model)
    assert sum(ranks.values()) == SCHEDULE["target_r"] * len(ranks)
    assert len(set(ranks.values())) > 1

    batch = tiny.example("llama")
    expected = tiny.output(model, batch)
    ingraft.save(model, tmp_path / "a")
    stored = load_file(tmp_path / "a" / WEIGHTS)
    assert sum(t.shape[0] for key, t in stored.items() if key.endswith("lora_E")) == sum(ranks.values())
    masks = json.loads((tmp_path / "a" / CONFIG).read_text())["rank_pattern"]
    assert {key.removesuffix(".lora_E"): sum(mask) for key, mask in masks.items()} == {
        path: r for path, r in ranks.items() if r != SCHEDULE["init_r"]
    }
    again = tiny.make("llama")
    ingraft.load(again, tmp_path / "a", trainable=True)
    assert float((tiny.output(again, batch) - expected).abs().max()) < 1e-6
    numbers = sum(p.numel() for p in ingraft.parameters(again, "default").values())
    assert numbers == sum(t.numel() for t in stored.values())
    assert adapt.expected_count(tiny.make("llama"), again.ingraft_control.adapters["default"].config) == numbers
    theirs = peft.PeftModel.from_pretrained(tiny.make("llama"), tmp_path / "a").eval()
    assert float((tiny.output(theirs, batch) - expected).abs().max()) < 1e-5


@pytest.mark.filterwarnings("ignore:.*have invalid shape", IGNORED)
def test_their_trained_file_loads_here(tmp_path: Path, tiny: SimpleNamespace) -> None:
    torch.manual_seed(2)
    theirs = peft.get_peft_model(
        tiny.make("llama"), peft.AdaLoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM", **SCHEDULE)
    )
    optimiser = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        theirs(**batch_of(tiny, step)).loss.backward()
        optimiser.step()
        theirs.base_model.update_and_allocate(step + 1)
        optimiser.zero_grad()
    theirs.eval().save_pretrained(str(tmp_path / "a"))
    here = tiny.make("llama")
    ingraft.load(here, tmp_path / "a")
    assert ingraft.status(here).adapters[0].method == "adalora"
    batch = tiny.example("llama")
    assert float((tiny.output(here, batch) - tiny.output(theirs, batch)).abs().max()) < 1e-5
    assert sum(kept_ranks(here).values()) == SCHEDULE["target_r"] * 6
    ingraft.save(here, tmp_path / "b", dtype=torch.float32)
    one, other = (load_file(tmp_path / name / WEIGHTS) for name in ("a", "b"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_mask_that_is_none_is_refused(tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("adalora", {"target_modules": TARGETS, **SCHEDULE}), seed=1)
    ingraft.save(model, tmp_path / "a")
    (tmp_path / "a" / "ingraft.json").unlink()
    config = json.loads((tmp_path / "a" / CONFIG).read_text())
    for wrong in ({"x.lora_E": [1, 2]}, {"x": [True]}, [True], {"x.lora_E": 3}):
        (tmp_path / "a" / CONFIG).write_text(json.dumps(config | {"rank_pattern": wrong}))
        with pytest.raises(ingraft.IngraftError, match="rank_pattern"):
            ingraft.load(tiny.make("llama"), tmp_path / "a")


def test_it_must_know_how_long_training_is(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    ingraft.attach(model, make_config("adalora", {"target_modules": TARGETS}), seed=1)
    with pytest.raises(ingraft.IngraftError, match="set total_step"):
        ingraft.after_step(model, 1)
    ingraft.after_step(model, 1, 10)


def test_a_trainer_allocates_by_the_callback(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """transformers' Trainer with `AdapterCallback` ends at the budget too, knowing the steps itself, and resumes to the same bits."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    rows = [{key: value[0] for key, value in batch_of(tiny, step).items()} for step in range(8)]

    def run(folder: Path, resume: Path | None) -> Any:
        model = tiny.make("llama")
        schedule = SCHEDULE | {"total_step": None, "tfinal": 1, "tinit": 0, "deltaT": 1}
        ingraft.attach(model, make_config("adalora", {"target_modules": TARGETS, **schedule}), seed=1)
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=6,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            save_steps=3,
            learning_rate=1e-2,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=[ingraft.AdapterCallback()])  # type: ignore[arg-type]
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return model

    whole = run(tmp_path / "whole", None)
    ranks = kept_ranks(whole)
    assert sum(ranks.values()) == SCHEDULE["target_r"] * len(ranks)
    resumed = run(tmp_path / "again", tmp_path / "whole" / "checkpoint-3")
    for key, p in ingraft.parameters(whole, "default").items():
        assert torch.equal(ingraft.parameters(resumed, "default")[key], p), key


def test_the_penalty_is_counted_once_a_step(tiny: SimpleNamespace) -> None:
    """Of a Trainer's step in several batches each carries its share of the penalty."""
    model = tiny.make("llama")
    ingraft.attach(model, make_config("adalora", {"target_modules": TARGETS, **SCHEDULE}), seed=1)
    batch = batch_of(tiny, 0)
    extra = float(adapt.penalty(model).detach())  # type: ignore[union-attr]
    plain = float(model(**batch).loss.detach())
    model.train()
    assert float(model(**batch).loss.detach()) == pytest.approx(plain + extra, rel=1e-5)
    shares = 0.0
    for row in range(2):
        part = {key: value[row : row + 1] for key, value in batch.items()}
        model.eval()
        alone = float(model(**part, num_items_in_batch=14).loss.detach())
        model.train()
        shares += float(model(**part, num_items_in_batch=14).loss.detach()) - alone
    assert shares == pytest.approx(extra, rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "attention"])
@pytest.mark.parametrize("method", ["adalora", "pissa"])
def test_what_is_written_as_another_adapter_is_so_for_stacked_matrices_too(
    method: str, name: str, tmp_path: Path
) -> None:
    """A mixture's experts and an attention's projections: directions that were dropped are not in the file, a start is taken off."""
    subject = SUBJECTS[name]
    options = {"init_r": 4, "target_r": 2} if method == "adalora" else {"r": 3}
    where = {"target_modules": list(subject.targets or ()), "target_parameters": list(subject.parameters) or None}
    model, batch = subject.make_redrawn(), subject.batch(2)
    adapt.attach(model, make_config(method, {**options, **where}), "a", seed=1)
    randomise(model, "a")
    if method == "adalora":
        parts = parts_of(model, require_control(model).require("a"))
        for part in parts.values():
            part.importance_lora_E.normal_().abs_()  # type: ignore[operator, union-attr]
            part.fluctuation_lora_E.fill_(1.0)  # type: ignore[operator, union-attr]
        with torch.no_grad():
            allocate(parts, 2 * len(parts))  # type: ignore[arg-type]
    expected = run(model, batch)
    adapt.save(model, tmp_path / "a", "a", dtype=torch.float32)
    other = subject.make_redrawn()
    adapt.load(other, tmp_path / "a")
    close(run(other, batch), expected, "loaded and saved")
    if method == "adalora":
        ranks = {p.shape[0] for key, p in adapt.parameters(other, "a").items() if key.endswith("lora_E")}
        assert sum(p.shape[0] for k, p in adapt.parameters(other, "a").items() if k.endswith("lora_E")) == 2 * len(
            parts
        )
        assert len(ranks) > 1
