"""Runs that learn from preferences: one base in memory, a reference that stays what it was, and the same bits after any interruption."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

import ingraft
import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.bases import load_base
from ingraft.cli.main import main
from ingraft.data import load
from ingraft.data.preferences import Compared
from ingraft.errors import IngraftError
from ingraft.evaluate.roles import REFERENCE, as_reference
from ingraft.methods.lora import LoraConfig
from ingraft.recipe import Losses, PreferenceRecipe
from ingraft.train import loop
from ingraft.train.objectives import objective_for
from ingraft.train.objectives.policy_gradient import value_loss
from ingraft.train.run import train

from .conftest import WORDS, Make
from .test_resume import Killed, lasting


@pytest.fixture(scope="session")
def pairs(home: Path) -> Path:
    """Whatever is asked, an answer with "good" is better than one with "bad"; also as rankings and as judged answers."""
    rng = random.Random(1)

    def answer(word: str) -> str:
        return " ".join([*(rng.choice(WORDS[9:]) for _ in range(rng.randint(1, 4))), word, "film"])

    rows: dict[str, list[dict[str, Any]]] = {"pairs": [], "ranked": [], "judged": []}
    for number in range(44):
        prompt = " ".join(rng.choice(WORDS[9:]) for _ in range(rng.randint(2, 6)))
        good, bad = answer("good"), answer("bad")
        rows["pairs"].append({"prompt": prompt, "chosen": good, "rejected": bad})
        ranked = [bad, good, answer("very"), good + " good"][: 2 + number % 3]
        rows["ranked"].append({"prompt": prompt, "responses": ranked, "ranking": [4, 1, 3, 1][: len(ranked)]})
        rows["judged"].append({"prompt": prompt, "completion": good if number % 2 else bad, "label": number % 2 == 1})
    for name, found in rows.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return home


@pytest.fixture
def preferred(recipe: Make, pairs: Path) -> Callable[..., dict[str, Any]]:
    """A recipe over these rows."""

    def make(task: str, **changes: Any) -> dict[str, Any]:
        file = "judged" if task == "kto" else "pairs"
        base: dict[str, Any] = {"task": task, "data_train": str(pairs / f"{file}.jsonl"), "learning_rate": 3e-2}
        return recipe(**{**base, **changes})

    return make


@pytest.fixture(scope="session")
def supervised(home: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter that is far from the base."""
    folder = tmp_path_factory.mktemp("supervised") / "sft"
    values = {
        "model": str(home / "llama"),
        "data": {"train": str(home / "rows.jsonl"), "eval": 0},
        "max_steps": 8,
        "learning_rate": 5e-2,
        "dtype": "float32",
        "output_dir": str(folder),
        "save_steps": 0,
    }
    train(values, quiet=True)
    return str(folder)


@pytest.mark.parametrize("task", ["dpo", pytest.param("ipo", marks=pytest.mark.study), "kto", "reward"])
def test_what_was_preferred_is_learned(preferred: Make, task: str) -> None:
    """On rows that were held out; and what the log, the report and the folder tell."""
    run = train(preferred(task, max_steps=20, learning_rate=3e-3, eval_steps=0, save_steps=0), quiet=True)
    before, after = run.metrics["before"], run.metrics["after"]
    assert after["loss"] < before["loss"]
    log = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
    step = [line for line in log if "step_seconds" in line][-1]
    if task == "reward":
        assert after["accuracy"] >= 0.9 and after["accuracy_low"] < after["accuracy"] <= after["accuracy_high"]
        assert after["margin"] > before["margin"] and after["brier"] < before["brier"]
        assert {"chosen", "rejected", "accuracy", "margin"} <= set(step)
        assert "1. +" in run.samples[0]["after"] or "1. -" in run.samples[0]["after"]
    else:
        assert before["rewards/margins"] == pytest.approx(0, abs=1e-4), "a policy begins as its reference"
        assert after["rewards/margins"] > 0.1 and after["rewards/accuracies"] >= 0.8
        assert {"rewards/chosen", "rewards/rejected", "kl"} <= set(step)
        assert run.samples[0]["prompt"] and run.samples[0]["after"] != run.samples[0]["before"]
    assert step["roofline"] > 0
    assert "nothing was logged" not in (run.folder / "report.html").read_text()


def test_a_ranking_trains_as_its_pairs_do(preferred: Make, pairs: Path) -> None:
    """Rows of two to four answers in one batch, whatever goes through at once; the log's means are over the steps since its last line."""
    found, logs = [], []
    for size in (4, 2):
        made = preferred(
            "reward", data_train=str(pairs / "ranked.jsonl"), per_device_train_batch_size=size, max_steps=4, logging_steps=4 // size,
            gradient_accumulation_steps=4 // size, overwrite=None, method_config={},
            output_dir=f"{preferred('reward')['output_dir']}-{size}",
        )  # fmt: skip
        made.pop("overwrite")
        run = train(made, quiet=True)
        found.append(run.metrics["after"])
        lines = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        logs.append([line["margin"] for line in lines if "margin" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-3, abs=1e-4)
    assert [(a + b) / 2 for a, b in zip(logs[0][::2], logs[0][1::2], strict=True)] == pytest.approx(
        logs[1], rel=1e-3, abs=1e-4
    )


@pytest.mark.parametrize("task", ["dpo", pytest.param("kto", marks=pytest.mark.study)])
def test_regression_26_the_reference_is_what_training_started_from(
    preferred: Make, supervised: str, task: str, tmp_path: Path
) -> None:
    """With a supervised adapter as the start, "adapters off" is another model: margins would not begin at 0. The reference is a frozen copy of the
    start, kept in the run's folder; it says the same before and after, bit for bit, and one base serves both."""
    made = preferred(task, init_adapter=supervised, method_config={}, max_steps=6, load_best_model_at_end=False)
    run = train(made, quiet=True)
    assert run.metrics["before"]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(run.metrics["after"]["rewards/margins"]) > 1e-2
    model, control = run.model, require_control(run.model)
    assert list(control.adapters) == ["default", REFERENCE] and control.call.active == ("default",)

    kept = AutoModelForCausalLM.from_pretrained(made["model"])
    ingraft.load(kept, run.folder / REFERENCE)
    start = AutoModelForCausalLM.from_pretrained(made["model"])
    ingraft.load(start, supervised)
    ids = torch.arange(4, 16)[None]
    with torch.no_grad():
        with as_reference(model):
            reference = model(ids).logits
        wanted, stored, policy = start(ids).logits, kept(ids).logits, model(ids).logits
        with adapt.disabled(model):
            off = model(ids).logits
    assert torch.equal(reference, wanted) and torch.equal(stored, wanted)
    assert (policy - wanted).abs().max() > 1e-3 and (off - wanted).abs().max() > 1e-2
    assert not any(p.requires_grad for name, p in model.named_parameters() if f"adapter:{REFERENCE}" in name)

    plain = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in start.parameters()}
    base = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in adapt.base_parameters(model).values()}
    assert len(base) == len(adapt.base_parameters(start)) and sum(base.values()) <= sum(plain.values())
    every = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    assert sum(every.values()) - sum(base.values()) == 2 * (sum(plain.values()) - sum(base.values()))


def test_a_reference_of_its_own(preferred: Make, supervised: str) -> None:
    """Named in the recipe: a fresh policy is then compared with it, and where it starts from another one too."""
    run = train(preferred("dpo", reference_adapter=supervised, max_steps=2, eval_steps=0, save_steps=0), quiet=True)
    assert run.metrics["before"]["rewards/margins"] == pytest.approx(0, abs=1e-4), "before is the reference itself"
    assert (run.folder / REFERENCE / "adapter_model.safetensors").is_file()
    with pytest.raises(IngraftError, match=r"reference_adapter: only dpo, ipo, kto"):
        train(preferred("reward", reference_adapter=supervised), quiet=True)
    with pytest.raises(IngraftError, match=r"reference_adapter: there is no /nowhere"):
        train(preferred("dpo", reference_adapter="/nowhere", output_dir=f"{run.folder}-2"), quiet=True)


@pytest.mark.parametrize(
    ("task", "at"),
    [
        ("dpo", 11),
        ("reward", 6),
        pytest.param("kto", 9, marks=pytest.mark.study),
        pytest.param("dpo", 6, marks=pytest.mark.study),
        pytest.param("ipo", 2, marks=pytest.mark.study),
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(
    preferred: Make, supervised: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, at: int
) -> None:
    """Tensors, metrics and the log, with dropout, accumulation, a second epoch, and lines of the log that span a checkpoint."""

    def made(name: str) -> dict[str, Any]:
        start = {"init_adapter": supervised, "method_config": {}} if (task, at) == ("dpo", 11) else {}
        return preferred(
            task, output_dir=str(tmp_path / name), per_device_train_batch_size=2, gradient_accumulation_steps=2,
            save_steps=5, logging_steps=3, **start,
        )  # fmt: skip

    whole = lasting(train(made("whole"), quiet=True).folder)
    plain = loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == at:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    with pytest.raises(Killed):
        train(made("killed"), quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    assert lasting(train(made("killed"), resume_from_checkpoint="last", quiet=True).folder) == whole


@pytest.mark.parametrize("task", ["dpo", "kto"])
def test_what_is_known_of_the_reference_and_micro_batches(preferred: Make, task: str, pairs: Path) -> None:
    """What is worked out for a row is the base's own, also when the policy has moved; it is made once. Gradients are those of the whole batch, whatever
    goes through at once, and reach the policy alone."""
    run = train(preferred(task, max_steps=6, eval_steps=0, save_steps=0, method_config={}), quiet=True)
    model = run.model
    data = load(preferred(task)["data"]["train"], run.tokenizer, task=task)
    objective: Any = objective_for(task, model, 3, Losses(preference=PreferenceRecipe(beta=2.0)))
    rows = cast("list[Compared]", data.train[:6])
    objective.begin([rows[:4], rows[4:]])
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    objective.ready(rows[1:2], 2)
    found = objective.references(rows[:4], first=True)  # the whole group, at once
    made = len(calls)
    objective.ready(rows[:4], 2)
    assert len(calls) - made == (2 if task == "kto" else 0), "only KTO's own point of reference is looked for again"
    handle.remove()
    with torch.no_grad(), adapt.disabled(model):
        for row, number in zip(rows, found, strict=False):
            ids, labels = torch.tensor([row.own.input_ids]), row.own.labels or []
            logps = model(ids).logits[0, :-1].log_softmax(-1)
            wanted = sum(logps[t - 1, token] for t, token in enumerate(labels) if token != -100)
            assert number.item() == pytest.approx(float(wanted), abs=1e-4)
    adapt.trainable(model, "default")
    own = adapt.parameters(model, "default")
    gradients: list[dict[str, torch.Tensor]] = []
    for size in (4, 1):  # also where the loss looks at the whole batch (KTO's point of reference)
        model.zero_grad()
        objective.ready(rows[:4], size)
        for start in range(0, 4, size):
            objective.loss(objective.batch(rows[start : start + size])).backward()
        gradients.append({name: p.grad.clone() for name, p in own.items() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in adapt.base_parameters(model).values())
    assert any(p.grad is not None and p.grad.any() for p in own.values())


def test_regression_27_a_value_function_is_an_adapter_of_its_own(preferred: Make) -> None:
    """Started from the reward model it says the same, bit for bit; what it learns then moves neither the reward, nor the policy, nor the base that all
    three share."""
    run = train(preferred("reward", max_steps=4, eval_steps=0, save_steps=0), quiet=True)
    model = load_base(preferred("reward")["model"], "float32", task="reward").model
    base = {
        name: p.detach().clone()
        for name, p in adapt.base_parameters(ingraft.attach(model, LoraConfig(r=2), name="policy")).items()
    }
    ingraft.load(model, run.folder, name="reward")
    ingraft.load(model, run.folder, name="value", trainable=True)
    assert len({p.untyped_storage().data_ptr() for p in adapt.base_parameters(model).values()}) == len(base)
    ids, said = torch.arange(4, 16)[None], dict[str, torch.Tensor]()

    def numbers() -> dict[str, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        with torch.no_grad(), ingraft.rows(model, ["policy", "reward", "value", None]):
            found = dict(zip(("policy", "reward", "value", "base"), model(ids.expand(4, -1)).logits, strict=True))
        return found

    said = numbers()
    assert torch.equal(said["value"], said["reward"]) and not torch.equal(said["value"], said["base"])
    adapt.activate(model, "value")
    adapt.trainable(model, "value")
    values_BT = model(ids).logits
    value_loss(values_BT, values_BT.detach(), values_BT.detach() + 1.0).sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched and all("adapter:value" in name for name in touched) and any("score" in name for name in touched)
    with torch.no_grad():
        for p in adapt.parameters(model, "value").values():
            if p.grad is not None:
                p -= 0.1 * p.grad
    after = numbers()
    assert after["value"] > said["value"]
    for name in ("policy", "reward", "base"):
        assert torch.equal(after[name], said[name])
    assert all(torch.equal(p, base[name]) for name, p in adapt.base_parameters(model).items())


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """What a verb answers with --json."""

    def run(*words: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main([*map(str, words), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_the_verbs_know_policies_and_reward_models(
    preferred: Make, supervised: str, pairs: Path, tmp_path: Path, ask: Callable[..., dict[str, Any]]
) -> None:
    """`eval` says what the run said, the reference taken from its folder; `predict` answers, or judges answers; `data` shows both."""
    made = preferred(
        "dpo", init_adapter=supervised, method_config={}, max_steps=6, save_steps=0, preference={"beta": 0.3}
    )
    policy = train(made, quiet=True)
    found = ask("eval", "--adapter", policy.folder)["eval"]
    assert {name: found[name] for name in policy.metrics["after"]} == policy.metrics["after"]
    reward = train(preferred("reward", max_steps=6, save_steps=0, output_dir=str(tmp_path / "reward")), quiet=True)
    found = ask("eval", "--adapter", reward.folder)["eval"]
    assert found["accuracy_low"] <= found["accuracy"] <= found["accuracy_high"]
    assert {name: found[name] for name in reward.metrics["after"]} == reward.metrics["after"]

    rows = [json.loads(line) for line in (pairs / "pairs.jsonl").read_text().splitlines()[:3]]
    (tmp_path / "asked.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    answered = tmp_path / "answered.jsonl"
    ask("predict", "--adapter", policy.folder, "--data", tmp_path / "asked.jsonl", "--output", answered)
    assert all(json.loads(line)["prediction"] for line in answered.read_text().splitlines())
    for name, kept in (("pairs", ("chosen", "rejected")), ("one", ("chosen",))):
        lines = [row if name == "pairs" else {"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        ask(
            "predict",
            "--adapter",
            reward.folder,
            "--data",
            tmp_path / f"{name}.jsonl",
            "--output",
            tmp_path / f"{name}.out",
        )
        said = [json.loads(line)["reward"] for line in (tmp_path / f"{name}.out").read_text().splitlines()]
        assert [len(each) if isinstance(each, list) else 1 for each in said] == [len(kept)] * 3
    both = [json.loads(line)["reward"] for line in (tmp_path / "pairs.out").read_text().splitlines()]
    assert [each[0] for each in both] == pytest.approx(said, abs=1e-5)
