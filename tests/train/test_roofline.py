"""The work of a step is counted exactly, derived exactly where it is not counted, and neither it nor a profile changes a number."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingraft import LoraConfig, adapt
from ingraft.cli.main import main
from ingraft.evaluate.head import CausalHead
from ingraft.methods import registry
from ingraft.train import profile as profile_module
from ingraft.train import roofline
from ingraft.train.journal import entries
from ingraft.train.roofline import Ledger, Meter, Products, gemm_rate
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
METHODS = ["lora", "dora", "ia3", "pfeiffer", "prefix", "prompt", "loha", "hra", "full"]


def batch(rows: int, length: int, learned: int) -> dict[str, Tensor]:
    ids = torch.randint(2, 64, (rows, length), generator=torch.Generator().manual_seed(rows + length))
    labels = torch.full_like(ids, -100)
    labels.view(-1)[torch.arange(1, rows * length)[torch.arange(1, rows * length) % length != 0][:learned]] = 5
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


def counted(run: Callable[[], Tensor]) -> int:
    with Products() as products:
        run().backward()
    return products.work


def counts(ledger: Ledger, terms: tuple[int, ...], work: int) -> bool:
    """Whether a micro-batch had to be counted; where not, what is derived must be its work."""
    known = ledger.known(terms)
    if known is None:
        ledger.learn(terms, work)
    else:
        assert known == work
    return known is None


def test_a_llama_with_lora_by_hand(tiny: SimpleNamespace) -> None:
    """Forward, gradients of inputs but not below the first block, LoRA, head over learned tokens, attention."""
    model, rank = tiny.make("llama"), 2
    width, inner, kv, heads, vocabulary, layers = 32, 48, 16, 4, 64, 2
    adapt.attach(model, LoraConfig(r=rank), seed=0)
    head = CausalHead(model)
    rows, length, learned = 2, 7, 5
    n = rows * length
    outside = [
        (width, width),
        (kv, width),
        (kv, width),
    ]  # q, k, v: what they get needs a gradient from the second block on
    within = [(width, width), (inner, width), (inner, width), (width, inner)]
    work = 0
    for block in range(layers):
        for shapes, needs in ((outside, block > 0), (within, True)):
            for out, into in shapes:
                work += 2 * n * out * into * (2 if needs else 1)
                work += 2 * n * rank * (2 * (into + out) + out + (into if needs else 0))
        work += 2 * rows * heads * length * length * (width // heads) * (2 + 5)
    work += 2 * 2 * learned * width * vocabulary
    work += 2 * rows * width * vocabulary  # the model's own head, which is shown one position a row
    assert counted(lambda: head.loss(batch(rows, length, learned))) == work


@pytest.mark.parametrize("method", METHODS)
def test_what_is_derived_is_what_would_be_counted(tiny: SimpleNamespace, method: str) -> None:
    """After at most five micro-batches none needs counting, whatever the method."""
    model = tiny.make("llama")
    adapt.attach(model, registry.make_config(method, {}), seed=0)
    head, ledger, times = CausalHead(model), Ledger(), 0
    source = random.Random(0)
    for _ in range(12):
        rows, length = source.randint(1, 4), source.randint(2, 12)
        learned = source.randint(1, rows * (length - 1))
        given = batch(rows, length, learned)
        terms = (1, rows, rows * length, rows * length**2, learned)
        work = counted(lambda given=given: head.loss(given))
        times += counts(ledger, terms, work)
    assert times <= 5


@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "reft"])
def test_packed_work_is_derived_too(tiny: SimpleNamespace, method: str) -> None:
    """Rows laid end to end make work by their real tokens and by the lengths that attention calls have."""
    model = tiny.make("llama")
    options = {"num_virtual_tokens": 8} if method == "prompt" else {}
    adapt.attach(model, registry.make_config(method, options), seed=0)
    head, ledger, times = CausalHead(model), Ledger(), 0
    source = random.Random(0)
    for _ in range(24):
        lengths = [source.randint(2, 12) for _ in range(source.randint(1, 4))]
        given = batch(len(lengths), max(lengths), 3 if sum(lengths) > 8 else 1)
        for row, length in enumerate(lengths):
            given["attention_mask"][row, length:] = 0
            given["labels"][row, length:] = -100
        learned = int((given["labels"][:, 1:] != -100).sum())
        if not learned:
            continue
        terms = roofline._terms(given, learned, 8 if method == "prompt" else 0)
        with adapt.packing(model):
            work = counted(lambda given=given: head.loss(given))
        times += counts(ledger, terms, work)
    assert times <= 7


def test_the_formulas_are_torchs_own() -> None:
    """What accumulates, and what torch's counter leaves out, counts like what it knows."""
    a, b, y = torch.randn(3, 4), torch.randn(4, 5), torch.randn(3, 5)
    with Products() as products:
        y.addmm_(a, b)
        torch.mm(a, b, out=y)
        torch.mv(a, b[:, 0])
    assert products.work == 2 * (2 * 3 * 4 * 5) + 2 * 3 * 4


def test_a_meter_counts_each_adapter_by_itself(tiny: SimpleNamespace) -> None:
    model, seen = tiny.make("llama"), list[int]()
    adapt.attach(model, LoraConfig(r=2), name="a", seed=0)
    adapt.attach(model, LoraConfig(r=4), name="b", seed=0)
    adapt.trainable(model, "a", "b")
    head, meter = CausalHead(model), Meter(rate=10.0)
    given = batch(2, 6, 4)
    for name in ("a", "b", "a"):
        adapt.activate(model, name)
        with meter.micro_batch(name, given, 4):
            head.loss(given).backward()
        seen.append(meter.taken())
    assert seen[0] == seen[2] < seen[1]
    assert meter.taken() == 0
    assert meter.ratio(3.0, 15) == 2.0
    assert meter.ratio(3.0, 0) is None


def test_the_rate_needs_no_layer_and_no_time(monkeypatch: pytest.MonkeyPatch, tiny: SimpleNamespace) -> None:
    monkeypatch.setattr(roofline, "SECONDS", 0.0)
    for model in (tiny.make("llama"), tiny.make("gpt2").bfloat16(), nn.Sequential(nn.LayerNorm(4))):
        assert gemm_rate(model) > 0


def test_lines_of_the_log_carry_the_ratio(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds times rate over work, of the steps since the last line."""
    monkeypatch.setattr("ingraft.train.roofline.gemm_rate", lambda model: 1e9)
    taken: list[int] = []
    plain = Meter.taken
    monkeypatch.setattr(Meter, "taken", lambda self: (taken.append(plain(self)), taken[-1])[1])
    run = train(recipe(max_steps=4, gradient_accumulation_steps=2), quiet=True)
    lines = [line for line in entries(run.folder / "log.jsonl") if "loss" in line]
    assert len(lines) == 2
    for line, work in zip(lines, (taken[0] + taken[1], taken[2] + taken[3]), strict=True):
        assert line["roofline"] == pytest.approx(2 * line["step_seconds"] * 1e9 / work)


def test_a_profile_says_where_a_step_goes_and_changes_nothing(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = train(recipe(output_dir=str(tmp_path / "plain"), max_steps=3), quiet=True)
    run = train(recipe(max_steps=3), profile=True, quiet=True)
    assert plain.profile is None
    weights = "adapter_model.safetensors"
    assert (plain.folder / weights).read_bytes() == (run.folder / weights).read_bytes()
    found = json.loads((run.folder / "profile.json").read_text())
    assert found == run.profile
    assert found["step"] == 3, "the eighth, or the last"
    assert found["rows"] == 4
    assert set(found["phases"]) == set(profile_module.PHASES)
    assert all(0 < seconds < found["seconds"] for seconds in found["phases"].values())
    assert sum(found["phases"].values()) <= found["seconds"]
    assert 0 < found["products"] < 1
    assert 0 < found["attention"] < 1
    shares = [one["share"] for one in found["operations"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 1.0 + 1e-9
    assert {"aten::mm", "aten::addmm"} & {one["name"] for one in found["operations"]}
    assert found["roofline"] > 0


def test_profile_on_the_command_line(recipe: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(max_steps=2, data_eval=0)))
    assert main(["train", "--config", str(tmp_path / "recipe.yaml"), "--profile"]) == 0
    text = capsys.readouterr().out
    for word in ("profile of step 2", "forward", "backward", "optimiser", "matrix products", "attention", "self ms"):
        assert word in text
