"""A run from recipe to folder: what is in it, what it refuses, and that equal work gives equal results."""

from __future__ import annotations

import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ingraft import adapt, durable
from ingraft.adapt.files import load as load_adapter
from ingraft.bases import load_base
from ingraft.data import load
from ingraft.errors import IngraftError
from ingraft.evaluate import evaluate
from ingraft.train import run as run_module
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]

STEP_KEYS = {
    *("step", "epoch", "loss", "learning_rate", "grad_norm", "step_seconds", "tokens_per_second"),
    *("learned_tokens_per_second", "peak_memory", "roofline"),
}


def test_a_run_folder_holds_what_is_promised(recipe: Make) -> None:
    run = train(recipe(), quiet=True)
    names = {path.name for path in run.folder.iterdir()}
    files = {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ingraft.json",
        "recipe.yaml",
        "log.jsonl",
        "metrics.json",
        "report.html",
    }
    assert names == files | {"checkpoint-8", "checkpoint-12"}
    manifest = durable.verify(run.folder)
    assert set(manifest["files"]) == files - {"ingraft.json"}
    facts = manifest["facts"]
    assert facts["method"] == "lora"
    assert facts["run"]["seed"] == 42
    assert facts["run"]["metrics"] == run.metrics
    assert {"torch", "transformers", "python"} <= set(facts["run"]["versions"])
    assert json.loads((run.folder / "metrics.json").read_text()) == run.metrics
    assert run.metrics["after"]["loss"] < run.metrics["before"]["loss"]
    log = entries(run.folder / "log.jsonl")
    steps = [line for line in log if "loss" in line]
    assert [line["step"] for line in steps] == [2, 4, 6, 8, 10, 12]
    assert all(set(line) == STEP_KEYS for line in steps)
    assert [line["step"] for line in log if "eval_loss" in line] == [0, 4, 8, 12]
    assert steps[-1]["epoch"] == 1.0
    assert len(run.samples) == 3
    assert set(run.samples[0]) == {"prompt", "expected", "before", "after"}
    for sample in run.samples:
        assert sample["prompt"].split()[-2:] == [sample["expected"], "film"], "the question as a person wrote it"


def test_the_folder_loads_again_with_the_same_loss(recipe: Make) -> None:
    run = train(recipe(dtype="bfloat16"), quiet=True)
    wanted = recipe(dtype="bfloat16")
    base = load_base(wanted["model"], "bfloat16", task="sft")
    load_adapter(base.model, run.folder)
    data = load(wanted["data"]["train"], base.tokenizer, eval=12, max_length=512, seed=42)
    found = evaluate(base.model, base.tokenizer, data)
    assert found["loss"] == run.metrics["after"]["loss"]


def test_the_recipe_that_is_left_repeats_the_run(recipe: Make, tmp_path: Path) -> None:
    first = train(recipe(), quiet=True)
    text = (first.folder / "recipe.yaml").read_text().replace(str(first.folder), str(tmp_path / "again"))
    (tmp_path / "again.yaml").write_text(text)
    second = train(tmp_path / "again.yaml", quiet=True)
    assert weights(first.folder) == weights(second.folder)


def weights(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def test_regression_23_runs_with_one_seed_are_equal(recipe: Make, tmp_path: Path) -> None:
    """To the bit, whatever torch's generator has been used for before; another seed gives another adapter."""
    found: list[bytes] = []
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        torch.manual_seed(len(found))
        run = train(recipe(output_dir=str(tmp_path / name), seed=seed, max_steps=3), quiet=True)
        found.append((run.folder / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


def test_accumulation_is_the_same_step(recipe: Make, tmp_path: Path) -> None:
    """8 x 1, 4 x 2 and 3 x 3 rows give the same adapter up to rounding, dropout included."""

    def result(name: str, size: int, times: int) -> dict[str, Tensor]:
        made = recipe(
            per_device_train_batch_size=size,
            gradient_accumulation_steps=times,
            max_steps=6,
            # plain descent in effect, so that a rounding error stays one
            adam_epsilon=1.0,
            learning_rate=1.0,
            output_dir=str(tmp_path / name),
        )
        return load_file(train(made, quiet=True).folder / "adapter_model.safetensors")

    whole, half = result("8x1", 8, 1), result("4x2", 4, 2)
    assert max(t.abs().max().item() for t in whole.values()) > 1e-3
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name], tensor, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_is_the_same_step(recipe: Make, tmp_path: Path) -> None:
    plain = train(recipe(max_steps=4), quiet=True)
    spared = train(recipe(max_steps=4, gradient_checkpointing=True, output_dir=str(tmp_path / "spared")), quiet=True)
    for (name, a), b in zip(
        load_file(plain.folder / "adapter_model.safetensors").items(),
        load_file(spared.folder / "adapter_model.safetensors").values(),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_classifier_learns_with_its_head(recipe: Make, home: Path) -> None:
    made = recipe(
        model=str(home / "bert"), task="classify", max_steps=150, eval_steps=50, data_test=str(home / "rows.jsonl")
    )
    run = train(made, quiet=True)
    assert run.metrics["after"]["accuracy"] == 1.0
    assert run.metrics["after"]["accuracy"] > run.metrics["before"]["accuracy"]
    assert run.metrics["after"]["test_accuracy"] == 1.0
    facts = durable.read_manifest(run.folder)["facts"]
    assert facts["run"]["labels"] == ["bad", "good"]
    # The files of the base held neither head nor pooler, so both began at random and must be in the adapter.
    names = set(load_file(run.folder / "adapter_model.safetensors"))
    assert {"base_model.model.classifier.weight", "base_model.model.bert.pooler.dense.weight"} <= names
    assert run.samples[0]["after"].startswith(run.samples[0]["expected"])
    assert any("eval_accuracy" in line for line in entries(run.folder / "log.jsonl"))
    base = load_base(str(home / "bert"), "float32", task="classify", labels=["bad", "good"])
    load_adapter(base.model, run.folder)
    data = load(str(home / "rows.jsonl"), base.tokenizer, task="classify", eval=12, seed=42)
    found = evaluate(base.model, base.tokenizer, data)
    assert found["loss"] == run.metrics["after"]["loss"]


def test_plain_text_is_learned(recipe: Make, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the plot was good a film it was i\n" * 40)
    run = train(
        recipe(task="lm", data_train=str(tmp_path / "text.txt"), data_eval=2, data_max_length=16, max_steps=20),
        quiet=True,
    )
    assert run.metrics["after"]["loss"] < 0.9 * run.metrics["before"]["loss"]


def test_the_best_adapter_is_kept(recipe: Make) -> None:
    made = recipe(
        max_steps=24, learning_rate=3.0, lr_scheduler_type="constant", max_grad_norm=0, load_best_model_at_end=True
    )
    run = train(made, quiet=True)
    seen = {line["step"]: line["eval_loss"] for line in entries(run.folder / "log.jsonl") if "eval_loss" in line}
    best = min((step for step in seen if step), key=seen.__getitem__)
    assert run.metrics["after"]["loss"] == pytest.approx(seen[best], rel=1e-5)
    assert durable.read_manifest(run.folder)["facts"]["run"]["best_step"] == best


def test_early_stopping(recipe: Make) -> None:
    made = recipe(
        max_steps=200, learning_rate=3.0, lr_scheduler_type="constant", max_grad_norm=0, early_stopping_patience=2
    )
    run = train(made, quiet=True)
    assert run.steps < 200
    losses = [line["eval_loss"] for line in entries(run.folder / "log.jsonl") if "eval_loss" in line][1:]
    assert min(losses[-2:]) >= min(losses[:-2])


def test_an_existing_folder_is_not_touched(recipe: Make, tmp_path: Path) -> None:
    run = train(recipe(max_steps=4), quiet=True)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()}
    with pytest.raises(IngraftError, match="--overwrite-output-dir"):
        train(recipe(max_steps=4), quiet=True)
    with pytest.raises(IngraftError, match="is complete"):
        train(recipe(max_steps=4), resume_from_checkpoint="last", quiet=True)
    assert {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file()} == before
    again = train(recipe(max_steps=2, eval_steps=1), overwrite_output_dir=True, quiet=True)
    assert again.steps == 2
    assert not (again.folder / "checkpoint-4").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(IngraftError, match="not a run folder"):
        train(recipe(output_dir=str(tmp_path / "mine")), overwrite_output_dir=True, quiet=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(IngraftError, match="is a file"):
        train(recipe(output_dir=str(tmp_path / "file")), quiet=True)


def test_bad_input_writes_nothing(recipe: Make, tmp_path: Path) -> None:
    for changes, message in (
        ({"data_train": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"model": str(tmp_path / "no-model")}, "no such file or folder"),
        ({"method_config": {"target_modules": ["q_porj"]}}, "q_proj"),
        ({"metric_for_best_model": "acuracy", "output_dir": str(tmp_path / "metric")}, "did you mean 'accuracy'"),
    ):
        with pytest.raises(IngraftError, match=message):
            train(recipe(**changes), quiet=True)
        assert not (tmp_path / "run").exists()


def test_an_adapter_can_be_the_start(recipe: Make, tmp_path: Path) -> None:
    first = train(recipe(), quiet=True)
    second = train(recipe(init_adapter=str(first.folder), output_dir=str(tmp_path / "second"), max_steps=2), quiet=True)
    log = [line["eval_loss"] for line in entries(second.folder / "log.jsonl") if "eval_loss" in line]
    assert second.metrics["after"]["loss"] <= first.metrics["after"]["loss"] + 0.05 < log[0]


def test_steps_that_are_not_finite_are_left_out(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bad loss and a bad gradient change neither tensors nor moments, and are counted."""
    from ingraft.train import loop
    from ingraft.train.objectives.causal import CausalObjective

    plain, made = CausalObjective.loss, loop.step
    calls = {"n": 0}
    states: list[dict[str, Tensor]] = []

    def loss(self: CausalObjective, batch: dict[str, Tensor]) -> Tensor:
        calls["n"] += 1
        value = plain(self, batch)
        if calls["n"] == 7:
            return value * float("nan")
        if calls["n"] == 9:  # a finite loss with an infinite gradient
            return value + (value - value.detach()) * float("inf")
        return value

    def step(session: Any, *args: Any) -> Any:
        def snapshot() -> dict[str, Tensor]:
            found = session.learners[0].tensors()
            return {f"{f}/{n}": t.clone() for f in ("adapter", "optimizer") for n, t in found[f].items()}

        before = snapshot()
        result = made(session, *args)
        if result[0] is None:
            states.append(before)
            states.append(snapshot())
        return result

    monkeypatch.setattr(CausalObjective, "loss", loss)
    monkeypatch.setattr(loop, "step", step)
    run = train(recipe(), quiet=True)
    assert run.skipped == 2
    assert len(states) == 4
    for before, after in (states[:2], states[2:]):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert durable.read_manifest(run.folder)["facts"]["run"]["skipped_steps"] == 2
    assert [line for line in entries(run.folder / "log.jsonl") if "loss" in line][-1]["skipped_steps"] == 2


def test_five_bad_steps_in_a_row_end_the_run(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingraft.train.objectives.causal import CausalObjective

    plain = CausalObjective.loss
    monkeypatch.setattr(CausalObjective, "loss", lambda self, batch: plain(self, batch) * float("nan"))
    made = recipe()
    with pytest.raises(IngraftError, match=r"not finite in 5 steps in a row .* rows \d"):
        train(made, quiet=True)
    assert not (Path(made["output_dir"]) / durable.MANIFEST).exists()


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(recipe: Make) -> None:
    made = recipe(data_eval=0)
    folder = Path(made["output_dir"])

    def full(n: int, kind: str, path: Path) -> int | None:
        return 10 if kind == "write" and "checkpoint-8" in str(path) else None

    durable.set_fault(full)
    try:
        with pytest.raises(IngraftError, match="the disk is full"):
            train(made, quiet=True)
    finally:
        durable.set_fault(None)
    assert [path.name for path in folder.glob("*checkpoint*")] == ["checkpoint-4"]
    durable.verify(folder / "checkpoint-4")
    run = train(made, resume_from_checkpoint="last", quiet=True)
    assert run.steps == 12


def test_a_disk_that_cannot_hold_the_run_is_known_before(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module.checkpoint, "forecast", lambda *args: 1 << 60)
    monkeypatch.setattr(run_module, "fit", lambda *args: pytest.fail("trained"))
    with pytest.raises(IngraftError, match="bytes are needed"):
        train(recipe(), quiet=True)


def test_steps_without_anything_learned_are_counted(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from ingraft.train.objectives import Objective

    monkeypatch.setattr(Objective, "units", lambda self, example: example.row_id % 2)
    run = train(recipe(data_eval=0, per_device_train_batch_size=1, max_steps=20, eval_steps=0), quiet=True)
    assert 0 < run.masked < 20
    assert durable.read_manifest(run.folder)["facts"]["run"]["masked_steps"] == run.masked


def test_the_report_is_one_file(recipe: Make) -> None:
    run = train(recipe(), quiet=True)
    text = (run.folder / "report.html").read_text()
    tags: list[str] = []

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            tags.append(tag)
            assert not {"src", "href"} & {name for name, _ in attrs}, "nothing may be fetched"

    Tags().feed(text)
    assert tags.count("polyline") >= 4
    assert "script" not in tags
    assert "http" not in text
    assert "prefers-color-scheme: dark" in text
    assert run.samples[0]["prompt"] in text
    assert f"{run.metrics['after']['accuracy']:.4f}" in text


def test_the_base_is_left_as_it_was(recipe: Make) -> None:
    run = train(recipe(max_steps=2), quiet=True)
    fresh = load_base(recipe()["model"], "float32", task="sft").model
    adapt.detach(run.model)
    assert type(run.model) is type(fresh)
    for (name, a), b in zip(fresh.state_dict().items(), run.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert not any(module.training for module in run.model.modules())


def test_places_that_cannot_be_are_named_together(tmp_path: Path) -> None:
    """Base, data and output folder are checked before anything is loaded, and all that is wrong comes in one message."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("not to be lost")
    recipe = {
        "model": "smolm2",
        "data": {"train": str(tmp_path / "no.jsonl"), "eval": str(tmp_path / "neither.jsonl")},
        "output_dir": str(tmp_path / "out"),
    }
    with pytest.raises(IngraftError) as caught:
        train(recipe, quiet=True)
    text = str(caught.value)
    for part in ("smollm2", "no.jsonl", "neither.jsonl", "output_dir"):
        assert part in text
    assert (tmp_path / "out" / "mine.txt").exists()


def test_rows_are_answered_at_every_evaluation_where_that_is_asked_for(recipe: Make, tmp_path: Path) -> None:
    usual = train(recipe(output_dir=str(tmp_path / "usual")), quiet=True)
    assert not [line for line in entries(usual.folder / "log.jsonl") if "samples" in line]
    shown = train(recipe(eval_samples=4, output_dir=str(tmp_path / "shown")), quiet=True)
    lines = [line for line in entries(shown.folder / "log.jsonl") if "samples" in line]
    assert [line["step"] for line in lines] == [4, 8, 12]
    assert len(shown.samples) == 4
    for place, sample in enumerate(shown.samples):
        told = [line["samples"][place] for line in lines]
        assert all((one["prompt"], one["expected"]) == (sample["prompt"], sample["expected"]) for one in told)
        assert told[-1]["answer"] == sample["after"], "the last evaluation sees the adapter that is kept"
    report = (shown.folder / "report.html").read_text()
    assert report.count("<dt>step 4</dt>") == report.count("<dt>step 12</dt>") == 4
    weights = [(run.folder / "adapter_model.safetensors").read_bytes() for run in (usual, shown)]
    assert weights[0] == weights[1], "being looked at changed the run"
