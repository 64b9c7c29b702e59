"""Runs that learn from answers which the policy itself samples: PPO with a reward model, GRPO with rewards that can be checked."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.cli.main import main
from ingraft.errors import IngraftError
from ingraft.evaluate.judges import REWARD, VALUE, judging, load_judge
from ingraft.evaluate.rewards import same
from ingraft.recipe import load_recipe
from ingraft.train import loop
from ingraft.train.run import train

from .conftest import WORDS, Make
from .test_resume import Killed, lasting

SAMPLING = ("sampling_seconds",)


@pytest.fixture(scope="session")
def asking(home: Path) -> Path:
    """Prompts, half of them with an answer; pairs in which an answer with "good" is the better one; and `sharp`, a base that can be sure of a word."""
    shutil.copytree(home / "llama", home / "sharp")
    model = _bare({"model": str(home / "llama")})
    with torch.no_grad():
        model.get_parameter("lm_head.weight").mul_(10)
    model.save_pretrained(home / "sharp")
    rng = random.Random(2)
    asked, pairs = [], []
    for number in range(36):
        prompt = " ".join(rng.choice(WORDS[9:]) for _ in range(rng.randint(2, 6)))
        asked.append({"prompt": prompt, **({"completion": "it was good"} if number % 2 else {})})
        good, bad = ([*(rng.choice(WORDS[9:]) for _ in range(3)), word] for word in ("good", "bad"))
        rng.shuffle(good)
        pairs.append({"prompt": prompt, "chosen": " ".join(good), "rejected": " ".join(bad)})
    for name, rows in (("asked", asked), ("asked_pairs", pairs)):
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return home


@pytest.fixture(scope="session")
def judge(asking: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward run's folder."""
    values = {
        "model": str(asking / "sharp"),
        "task": "reward",
        "data": {"train": str(asking / "asked_pairs.jsonl"), "eval": 8},
        "max_steps": 30,
        "learning_rate": 1e-2,
        "eval_steps": 0,
        "save_steps": 0,
        "dtype": "float32",
        "output_dir": str(tmp_path_factory.mktemp("judge") / "reward"),
    }
    run = train(values, quiet=True)
    assert run.metrics["after"]["accuracy"] > 0.8
    return str(run.folder)


@pytest.fixture
def sampling(recipe: Make, asking: Path, judge: str) -> Callable[..., dict[str, Any]]:
    """A recipe of the task; GRPO earns by a pattern, PPO by the reward model."""

    def make(task: str, **changes: Any) -> dict[str, Any]:
        rl: dict[str, Any] = {"max_new_tokens": 8, "num_epochs": 2, "num_mini_batches": 2} | changes.pop("rl", {})
        base: dict[str, Any] = {
            "task": task,
            "model": str(asking / "sharp"),
            "data_train": str(asking / "asked.jsonl"),
            "data_eval": 8,
        }
        if task == "ppo":
            base["reward_adapter"] = judge
        elif "reward_function" not in changes:
            rl = {"reward_pattern": r"\b(good)\b"} | rl
        return recipe(**{**base, "rl": rl, **changes})

    return make


def _log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("task", ["ppo", "grpo"])
def test_the_reward_rises_on_prompts_that_were_held_out(sampling: Make, task: str) -> None:
    """Over one base in memory, which stays what it was; the log tells how far the policy has gone for it."""
    made = sampling(
        task,
        max_steps=30 if task == "ppo" else 20,
        rl={"kl_coef": 0.01, "num_mini_batches": 1},
        eval_steps=0,
        save_steps=0,
        per_device_train_batch_size=16 if task == "ppo" else 8,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        method_config={},
    )
    run = train(made, quiet=True)
    before, after = run.metrics["before"], run.metrics["after"]
    assert before["kl"] == pytest.approx(0, abs=1e-4), "a policy begins as its reference"
    assert after["reward"] > before["reward"] and after["reward_low"] < after["reward"] < after["reward_high"]
    earned = [line["reward"] for line in _log(run.folder) if "kl_coef" in line]
    first, last = sum(earned[:3]) / 3, sum(earned[-3:]) / 3
    assert last > first + (1.0 if task == "ppo" else 0.3), earned
    lines = [line for line in _log(run.folder) if "step_seconds" in line]
    told = {"reward", "reward_std", "kl", "kl_token", "kl_coef", "length", "ended", "clipped"}
    assert all(told <= set(line) for line in lines if "kl_coef" in line) and told <= set(lines[-1])
    assert ("value_loss" in lines[-1]) == (task == "ppo")
    assert "reward by step" in (run.folder / "report.html").read_text()
    control = require_control(run.model)
    assert set(control.adapters) == ({"default", REWARD, VALUE} if task == "ppo" else {"default"})
    assert len(list(adapt.base_parameters(run.model))) == len(list(_bare(made).parameters()))
    for ours, theirs in zip(adapt.base_parameters(run.model).values(), _bare(made).parameters(), strict=True):
        assert torch.equal(ours, theirs)


def _bare(made: dict[str, Any]) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(made["model"], dtype=torch.float32)


@pytest.mark.parametrize("task", ["ppo", "grpo"])
def test_the_first_step_of_a_rollout_is_where_it_was_sampled(
    sampling: Make, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So the ratio of new to old is 1 there, and the loss is what the definition makes of the advantages; a second implementation says the same numbers."""
    seen: list[Any] = []
    plain = loop.gradients

    def looking(session: Any, learner: Any, rows: Any, units: int, number: int, size: int) -> Any:
        total = plain(session, learner, rows, units, number, size)
        seen.append((learner.name, rows, units, float(total)))
        return total

    monkeypatch.setattr(loop, "gradients", looking)
    made = sampling(
        task, max_steps=1, rl={"num_epochs": 1, "num_mini_batches": 1, "kl_coef": 0.1}, method_config={}, data_eval=0
    )
    run = train(made, quiet=True)
    name, rows, units, total = seen[0]
    assert name == "default" and units == sum(row.learned for row in rows)
    wanted = 0.0
    for row in rows:
        places = [t for t in range(len(row) - 1) if row.labels[t + 1] != -100]
        for t in places:
            wanted -= row.told["advantages"][t]
            assert row.told["old"][t] == pytest.approx(row.told["reference"][t], abs=1e-4)
        assert not any(row.told["advantages"][t] for t in range(len(row)) if t not in places)
    assert total == pytest.approx(wanted, abs=1e-3 * units)
    if task == "ppo":
        _by_hand(run.model, rows, made)
        assert seen[1][0] == VALUE
        half = sum(
            0.5 * (row.told["values"][t] - row.told["returns"][t]) ** 2
            for row in rows
            for t in range(len(row) - 1)
            if row.labels[t + 1] != -100
        )
        assert seen[1][3] == pytest.approx(half, rel=1e-3)


def _by_hand(model: Any, rows: Any, made: dict[str, Any]) -> None:
    """Advantages as their definition has them: sums of discounted surprises, token by token, whitened over all."""
    judge = load_judge(model, Path(made["reward_adapter"]), "again")
    found: list[list[float]] = []
    for row in rows:
        with torch.no_grad(), judging(model, judge):
            states = model.model(input_ids=torch.tensor([row.input_ids])).last_hidden_state
            score = judge.numbers(states)[0, -1].item()
        places = [t for t in range(len(row) - 1) if row.labels[t + 1] != -100]
        values = [row.told["values"][t] for t in places]
        assert values[-1] != score or len(places) == 1, "the value is told before the last token is read"
        earned = [-0.1 * (row.told["old"][t] - row.told["reference"][t]) for t in places]
        earned[-1] += score
        surprises = [r + after - v for r, v, after in zip(earned, values, [*values[1:], 0.0], strict=True)]
        found.append([sum(0.95**k * s for k, s in enumerate(surprises[i:])) for i in range(len(surprises))])
        returns = [row.told["returns"][t] for t in places]
        assert returns == pytest.approx([a + v for a, v in zip(found[-1], values, strict=True)], abs=1e-3)
    every = [a for row in found for a in row]
    mean = sum(every) / len(every)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in every) / len(every))
    for row, advantages in zip(rows, found, strict=True):
        told = [row.told["advantages"][t] for t in range(len(row) - 1) if row.labels[t + 1] != -100]
        assert told == pytest.approx([(a - mean) / deviation for a in advantages], abs=2e-3)


@pytest.mark.parametrize("task", ["ppo", "grpo"])
@pytest.mark.parametrize("at", [5, *(pytest.param(at, marks=pytest.mark.study) for at in (2, 4, 7))])
def test_killed_in_the_middle_of_a_rollout(
    sampling: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str, at: int
) -> None:
    """The same bits, whether the checkpoint is from between two rollouts or from within one; rewards and the price of distance too."""

    def made(name: str) -> dict[str, Any]:
        rl = {"kl_target": 0.5, "kl_horizon": 8} if task == "ppo" else {}
        return sampling(
            task, output_dir=str(tmp_path / name), max_steps=8, save_steps=at, eval_steps=4, logging_steps=1, rl=rl
        )

    def kept(folder: Path) -> Any:
        weights, metrics, log = lasting(folder)
        return weights, metrics, [{k: v for k, v in line.items() if k not in SAMPLING} for line in log]

    whole = kept(train(made("whole"), quiet=True).folder)
    plain, calls = loop.step, [0]

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        calls[0] += 1
        if progress.step == at + 1:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    with pytest.raises(Killed):
        train(made("killed"), quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    assert kept(train(made("killed"), resume_from_checkpoint="last", quiet=True).folder) == whole


FUNCTIONS = """
def length(prompts, answers, expected, rows):
    return [len(answer) for answer in answers]

def wrong(prompts, answers, expected, rows):
    raise ValueError("no such unit")

def few(prompts, answers, expected, rows):
    return [1.0]

def words(prompts, answers, expected, rows):
    assert all(row["prompt"] == prompt for row, prompt in zip(rows, prompts))
    assert set(expected) <= {None, "it was good"}
    return ["many" for _ in answers]

text = 3
"""


def test_a_person_s_function(sampling: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets prompts, answers, what the rows expect, and their fields. What is wrong with it is said with its name and a row, and no run is left that looks whole. A file cannot have
    it called: a recipe often comes from somebody else."""
    file = tmp_path / "mine.py"
    file.write_text(FUNCTIONS)
    made = sampling("grpo", reward_function=f"{file}:length", max_steps=2, eval_steps=0, save_steps=0)
    run = train(made, quiet=True)
    assert run.metrics["after"]["reward"] > 0
    for name, words in (
        ("wrong", "raised ValueError: no such unit .*jsonl:"),
        ("few", "returned 1 numbers for"),
        ("words", "returned 'many' for .*asked.jsonl:"),
        ("missing", "has no function called missing"),
        ("text", "has no function called text"),
    ):
        with pytest.raises(IngraftError, match=words):
            train(made | {"reward_function": f"{file}:{name}", "output_dir": str(tmp_path / name)}, quiet=True)
        assert not (tmp_path / name / "ingraft.json").exists()
    recorded = run.folder / "recipe.yaml"
    with pytest.raises(IngraftError, match=r"a file may not decide whose code runs here.*--reward-function"):
        load_recipe(recorded)
    assert load_recipe(recorded, {"reward_function": f"{file}:length"}).reward_function == f"{file}:length"
    assert main(["eval", "--adapter", str(run.folder)]) == 2
    assert "not taken from a run's recipe" in capsys.readouterr().err
    assert main(["eval", "--adapter", str(run.folder), "--reward-function", f"{file}:length", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["eval"]["reward"] == run.metrics["after"]["reward"]
    file.write_text("1 / 0")
    with pytest.raises(IngraftError, match="raised ZeroDivisionError as it was read"):
        train(made | {"output_dir": str(tmp_path / "zero")}, quiet=True)


def test_long_answers_alone_earn_nothing(sampling: Make) -> None:
    """A pattern pays for what it finds and not for how much there is; the expected answer pays more."""
    from ingraft.data.examples import Example
    from ingraft.evaluate.rewards import Answered, PatternReward
    from ingraft.recipe import RlRecipe

    def answer(text: str, expected: str | None = "so #### 1,200") -> Answered:
        sequence = Example(input_ids=[1], row_id=0)
        return Answered(prompt="", text=text, expected=expected, row={}, place="", sequence=sequence, ended=True)

    reward = PatternReward(RlRecipe(reward_pattern=r"####\s*(\S+)"))
    texts = ["a long answer " * 50, "1200", "#### 1300", "#### 1200", "well #### 1200. " * 9]
    assert reward.of([answer(text) for text in texts], 8, None) == [0.0, 0.0, 0.5, 1.5, 1.5]
    assert reward.of([answer("#### 1200", None)], 8, None) == [0.5]
    assert same("1,200.", "$1200") and same("Yes ", "yes") and not same("12", "12.5") and not same("nan", "1")


def test_what_cannot_be_rewarded_is_refused_before_anything_is_written(
    sampling: Make, judge: str, recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(IngraftError) as caught:
        train(recipe(task="ppo", rl={"reward_pattern": "("}, reward_function="mine", data_packing=True))
    text = str(caught.value)
    assert all(key in text for key in ("rl.reward_pattern", "reward_function", "data.packing"))
    with pytest.raises(IngraftError, match="needs a reward"):
        train(recipe(task="grpo"))
    with pytest.raises(IngraftError, match="only ppo and grpo learn from rewards"):
        train(recipe(task="sft", reward_adapter=judge))
    with pytest.raises(IngraftError, match="compares answers"):
        train(sampling("grpo", rl={"num_generations": 1}))
    supervised = train(recipe(max_steps=2, save_steps=0, eval_steps=0), quiet=True).folder
    with pytest.raises(IngraftError, match="holds no reward model"):
        train(sampling("ppo", reward_adapter=str(supervised), output_dir=str(tmp_path / "ppo")))
    assert not (tmp_path / "ppo").exists()
    other = sampling("ppo", output_dir=str(tmp_path / "other"))
    model = _bare(other)
    with torch.no_grad():
        next(iter(model.parameters())).mul_(2)
    model.save_pretrained(tmp_path / "base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source := Path(other["model"]) / name).exists():
            (tmp_path / "base" / name).write_bytes(source.read_bytes())
    with pytest.raises(IngraftError, match="trained on another base"):
        train(other | {"model": str(tmp_path / "base")})


def test_the_verbs_know_such_policies(
    sampling: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], asking: Path
) -> None:
    """`eval` says what the run said, the reward model taken from its folder; `predict` answers; `data` shows what is asked."""
    run = train(sampling("ppo", max_steps=4, save_steps=0, eval_steps=0), quiet=True)
    assert main(["eval", "--adapter", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["eval"]
    assert {name: found[name] for name in run.metrics["after"]} == run.metrics["after"]
    asked, told = tmp_path / "asked.jsonl", tmp_path / "told.jsonl"
    asked.write_text('{"prompt": "the film"}\n')
    assert main(["predict", "--adapter", str(run.folder), "--data", str(asked), "--output", str(told)]) == 0
    assert "prediction" in json.loads(told.read_text())
    assert main(["data", "--model", str(asking / "sharp"), "--task", "ppo", "--data", str(asking / "asked.jsonl")]) == 0
