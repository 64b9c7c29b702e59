"""`cache_frozen: true`: the same run, its frozen lower blocks run once a row."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ingraft import adapt
from ingraft.adapt.below import below
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.evaluate.modes import unnoticed
from ingraft.methods import registry
from ingraft.recipe import as_recipe
from ingraft.train import frozen, loop
from ingraft.train.frozen import groups
from ingraft.train.journal import entries
from ingraft.train.run import train
from ingraft.train.schedule import plan
from ingraft.train.stop import Stop

Make = Callable[..., dict[str, Any]]
LAYERS, EPOCH = 4, 8
MORE = ("cached_rows", "blocks_spared", "cache_bytes")
TIMES = ("step_seconds", "tokens_per_second", "learned_tokens_per_second", "peak_memory", "roofline")
WITHIN = {"rtol": 1e-5, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring the machine's rate takes longer than a run here."""
    monkeypatch.setattr("ingraft.train.roofline.gemm_rate", lambda model: 1e9)


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def lines(folder: Path, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in (*TIMES, *without)} for line in entries(folder / "log.jsonl")]


def attention_of(block: nn.Module) -> nn.Module:
    """A child that runs whenever the block does."""
    return next(child for name, child in block.named_children() if "att" in name)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Counter[int]]]:
    """How often each block runs in each training step, whatever stands in for it; evaluations are not counted."""
    found: list[Counter[int]] = []
    plain = loop.step

    def step(session: Any, *rest: Any) -> Any:
        from ingraft.train.recompute import blocks_of

        found.append(counts := Counter())
        handles = [
            attention_of(block).register_forward_hook(lambda *_, n=n: counts.update([n]))
            for n, block in enumerate(blocks_of(session.model))
        ]
        try:
            return plain(session, *rest)
        finally:
            for handle in handles:
                handle.remove()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", step)
        yield found


# ---------------------------------------------------------------------------------------------------------------- the same run


@pytest.mark.parametrize("base", ["llama4", "gpt2", "bert4"])
def test_losses_and_adapter_are_those_without_it(
    top: Make, tmp_path: Path, base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over three epochs, up to rounding; in the first one to the bit. From the second epoch on no lower block runs."""
    runs: list[Path] = []
    for cached in (False, True):
        with counted(monkeypatch) as ran:
            run = train(top(base, cache_frozen=cached, output_dir=str(tmp_path / str(cached))), quiet=True)
        runs.append(run.folder)
        every = dict.fromkeys(range(LAYERS), 1)
        assert [dict(step) for step in ran[:EPOCH]] == [every] * EPOCH
        assert [dict(step) for step in ran[EPOCH:]] == [{2: 1, 3: 1} if cached else every] * 2 * EPOCH
        assert not any("forward" in module.__dict__ for module in run.model.modules())
    plain, cached = (lines(folder, MORE) for folder in runs)
    epochs = [[line for line in log if line["step"] <= EPOCH and "loss" in line] for log in (plain, cached)]
    assert epochs[0] == epochs[1]
    for one, other in zip(plain, cached, strict=True):
        assert one.keys() == other.keys()
        apart = {k: (v, other[k]) for k, v in one.items() if not math.isclose(v, other[k], rel_tol=1e-5, abs_tol=1e-6)}
        assert not apart, (one["step"], apart)
    wanted, found = (adapter(folder) for folder in runs)
    assert wanted.keys() == found.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **WITHIN)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("prefix", {"num_virtual_tokens": 3, "layers_to_transform": [2, 3]}),  # moves the positions of all blocks
        ("llama-adapter", {"adapter_len": 3, "adapter_layers": 2}),
        ("freeze", {"num_layers_trainable": 2}),
        ("pfeiffer", {"layers_to_transform": [2, 3]}),
        ("reft", {"layers_to_transform": [2, 3]}),
    ],
)
def test_other_methods(top: Make, tmp_path: Path, method: str, options: dict[str, Any]) -> None:
    """Whatever it is that acts in the upper blocks only."""
    found = [
        adapter(
            train(
                top(
                    "llama4",
                    method=method,
                    method_config=options,
                    max_steps=EPOCH + 4,
                    eval_steps=0,
                    learning_rate=0.05,
                    cache_frozen=cached,
                    output_dir=str(tmp_path / str(cached)),
                ),
                quiet=True,
            ).folder
        )
        for cached in (False, True)
    ]
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **WITHIN)


@pytest.mark.parametrize("base", ["llama4", pytest.param("gpt2", marks=pytest.mark.study)])
def test_packed(top: Make, tmp_path: Path, base: str) -> None:
    """Rows laid end to end, in what is kept and where it is given."""
    found = [
        adapter(
            train(
                top(
                    base,
                    data_packing=packed,
                    cache_frozen=cached,
                    max_steps=EPOCH + 4,
                    eval_steps=0,
                    output_dir=str(tmp_path / f"{packed}-{cached}"),
                ),
                quiet=True,
            ).folder
        )
        for packed, cached in ((False, False), (True, True))
    ]
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **WITHIN)


def test_a_head_alone(top: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With nothing trained but what lies behind the blocks, none of them runs after the first epoch."""
    found: list[dict[str, Tensor]] = []
    for cached in (False, True):
        made = top(
            "bert4",
            method="full",
            method_config={"target_modules": ["classifier"], "modules_to_save": ["pooler"]},
            cache_frozen=cached,
            output_dir=str(tmp_path / str(cached)),
        )
        with counted(monkeypatch) as ran:
            found.append(adapter(train(made, quiet=True).folder))
        if cached:
            assert [sum(step.values()) for step in ran] == [LAYERS] * EPOCH + [0] * 2 * EPOCH
    assert {name.split(".")[-2] for name in found[0]} >= {"classifier", "dense"}, "the fresh pooler is trained too"
    for name in found[0]:
        torch.testing.assert_close(found[1][name], found[0][name], **WITHIN)


def test_recomputing_blocks_change_nothing(top: Make, tmp_path: Path) -> None:
    """To the bit, although those that stand aside are flagged to recompute themselves too."""
    files: list[bytes] = []
    for asked in (False, True):
        made = top("llama4", gradient_checkpointing=asked, max_steps=EPOCH + 4, output_dir=str(tmp_path / str(asked)))
        files.append((train(made, quiet=True).folder / "adapter_model.safetensors").read_bytes())
    assert len(set(files)) == 1


def test_steps_that_are_cut(top: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Accumulation, a step made again with fewer rows, and rows made by fewer than a batch: the same run."""
    made = top("llama4", cache_frozen=False, max_steps=20, save_steps=0, output_dir=str(tmp_path / "plain"))
    wanted = adapter(train(made, quiet=True).folder)
    plain, calls = loop.gradients, [0]

    def gradients(session: Any, learner: Any, rows: Any, units: int, number: int, size: int) -> Tensor:
        calls[0] += 1
        if number == 10 and size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(session, learner, rows, units, number, size)

    monkeypatch.setattr(loop, "gradients", gradients)
    monkeypatch.setattr(frozen, "TOKENS", 40)
    changes: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    made = top("llama4", max_steps=20, save_steps=0, output_dir=str(tmp_path / "cut"), **changes)
    found = adapter(train(made, quiet=True).folder)
    assert calls[0] == 21
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], **WITHIN)


def test_rows_are_made_together_whatever_the_run_does_later() -> None:
    """Every row in one group; groups are first-epoch micro-batches, none beyond `TOKENS` unless it is one row."""
    rows = [Example(row_id=n + 100, input_ids=[1] * (1 + 37 * n % 600)) for n in range(203)]
    rows.append(Example(row_id=7, input_ids=[1] * (frozen.TOKENS + 1)))
    made = as_recipe(
        {
            "model": "x",
            "data": {"train": "x"},
            "per_device_train_batch_size": 12,
            "gradient_accumulation_steps": 3,
            "num_train_epochs": 2,
        }
    )
    found = groups(rows, plan(made, len(rows)), made)
    assert sorted(row.row_id for group in found for row in group) == sorted(row.row_id for row in rows)
    assert all(len(group) <= 12 for group in found)
    assert all(len(group) == 1 or len(group) * max(map(len, group)) <= frozen.TOKENS for group in found)
    assert [len(group) for group in found if group[0].row_id == 7] == [1]
    assert found == groups(rows, plan(made, len(rows)), made)


# ---------------------------------------------------------------------------------------------------------------- going on


class Killed(BaseException):
    pass


def lasting(folder: Path) -> tuple[bytes, Any, list[dict[str, Any]]]:
    """What must not depend on interruptions."""
    metrics = json.loads((folder / "metrics.json").read_text())
    return (folder / "adapter_model.safetensors").read_bytes(), metrics, lines(folder, MORE)


def open_files(folder: Path) -> list[str]:
    """What this process holds open in a folder, with or without a name there."""
    found = [str(item.readlink()) for item in Path("/proc/self/fd").iterdir() if item.is_symlink()]
    return [name for name in found if name.startswith(f"{folder}/")]


@pytest.mark.parametrize(("packing", "kills"), [(False, (3, 21)), pytest.param(True, (11,), marks=pytest.mark.study)])
def test_a_killed_run_goes_on_with_the_same_bits(
    top: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: bool, kills: tuple[int, ...]
) -> None:
    """In any epoch, with nothing kept of what the first process had; and the file is gone with the process's work."""
    changes: dict[str, Any] = {"data_packing": packing, "save_steps": 5, "load_best_model_at_end": True}
    whole = lasting(train(top("llama4", output_dir=str(tmp_path / "whole"), **changes), quiet=True).folder)
    plain = loop.step
    for at in kills:
        folder, held = tmp_path / f"killed-{at}", list[str]()

        def dying(
            session: Any, progress: Any, *rest: Any, at: int = at, folder: Path = folder, held: list[str] = held
        ) -> Any:
            if progress.step == at:
                held += open_files(folder)
                raise Killed
            return plain(session, progress, *rest)

        monkeypatch.setattr(loop, "step", dying)
        with pytest.raises(Killed):
            train(top("llama4", output_dir=str(folder), **changes), quiet=True)
        monkeypatch.setattr(loop, "step", plain)
        if Path("/proc/self/fd").is_dir():
            assert [name for name in held if "deleted" in name], "a file without a name, so that no end leaves it"
            assert open_files(folder) == []
        names = {path.name for path in folder.iterdir()}
        assert {name for name in names if not name.startswith("checkpoint-")} <= {"log.jsonl", "recipe.yaml"}
        made = top("llama4", output_dir=str(folder), **changes)
        assert lasting(train(made, resume_from_checkpoint="last", quiet=True).folder) == whole, at


@pytest.mark.parametrize("polls", [19])
def test_a_signal(top: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, polls: int) -> None:
    """Ctrl-C leaves a checkpoint and no file; the run goes on to the same bits."""
    whole = lasting(train(top("llama4", output_dir=str(tmp_path / "whole")), quiet=True).folder)
    folder, seen, plain = tmp_path / "stopped", {"n": 0}, Stop.check

    def check(self: Stop) -> None:
        seen["n"] += 1
        if seen["n"] == polls:
            self.received = signal.SIGINT
        plain(self)

    monkeypatch.setattr(Stop, "check", check)
    with pytest.raises(KeyboardInterrupt):
        train(top("llama4", output_dir=str(folder)), quiet=True)
    monkeypatch.setattr(Stop, "check", plain)
    if Path("/proc/self/fd").is_dir():
        assert open_files(folder) == []
    run = train(top("llama4", output_dir=str(folder)), resume_from_checkpoint="last", quiet=True)
    assert lasting(run.folder) == whole


def test_a_run_with_it_is_not_the_run_without(top: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == EPOCH + 1:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    with pytest.raises(Killed):
        train(top("llama4"), quiet=True)
    with pytest.raises(IngraftError, match=r"cache_frozen \(was True, is False\)"):
        train(top("llama4", cache_frozen=False), resume_from_checkpoint="last", quiet=True)


# ---------------------------------------------------------------------------------------------------------------- what it says


def test_the_log_says_what_is_spared(top: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly: nothing in the first epoch, half of the blocks after it; a state of 32 numbers for each token of 30 rows."""
    run = train(top("llama4"))
    from ingraft.bases import load_tokenizer
    from ingraft.data import load

    made = as_recipe(top("llama4"))
    rows = load(made.data.train, load_tokenizer(made.model), task="sft", eval=30, seed=made.seed, max_length=512).train
    size = 4 * 32 * sum(map(len, rows))
    log = [line for line in lines(run.folder) if "loss" in line]
    assert [line["cached_rows"] for line in log[:EPOCH]] == [0] * EPOCH
    assert sorted(line["cached_rows"] for line in log[EPOCH:]) == [2] * 2 + [4] * (2 * EPOCH - 2)
    assert [line["blocks_spared"] for line in log] == [0.0] * EPOCH + [0.5] * 2 * EPOCH
    assert {line["cache_bytes"] for line in log} == {size}
    said = capsys.readouterr().err
    assert f"the lower 2 of 4 blocks run once for each of 30 rows; what they make takes {size / 1e6:,.1f} MB" in said
    assert "60 of 90 rows came from the cache; 33% of the blocks' forward passes were not made" in said


def test_the_work_of_a_step_is_what_was_done(top: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The roofline's derived work is the counted one, whichever blocks ran."""
    from ingraft.train.roofline import Ledger

    plain, found = loop.log_line, list[list[int]]()

    def noted(session: Any, progress: Any, clock: Any, norms: Any) -> Any:
        found[-1].append(clock.work)
        return plain(session, progress, clock, norms)

    monkeypatch.setattr(loop, "log_line", noted)
    for name in ("derived", "counted"):
        found.append([])
        train(top("llama4", max_steps=20, eval_steps=0, output_dir=str(tmp_path / name)), quiet=True)
        monkeypatch.setattr(Ledger, "known", lambda *_: None)
    assert found[0] == found[1]
    assert sum(found[0][EPOCH : 2 * EPOCH]) < 0.8 * sum(found[0][:EPOCH])


# ---------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("base", "changes", "words"),
    [
        ("llama4", {"method_config": {}}, r"lora acts in the first block \(model.layers.0\)"),
        ("llama4", {"method_config": {"layers_to_transform": [0, 3]}}, "acts in the first block"),
        ("llama4", {"method": "prompt", "method_config": {"num_virtual_tokens": 3}}, "prompt acts at model too"),
        ("llama4", {"method": "p-tuning", "method_config": {"num_virtual_tokens": 3}}, "p-tuning acts at model too"),
        ("llama4", {"method": "prefix", "method_config": {"num_virtual_tokens": 3}}, "acts in the first block"),
        (
            "llama4",
            {"method_config": {"layers_to_transform": [3], "modules_to_save": ["embed_tokens"]}},
            "lora acts at model.embed_tokens too, before",
        ),
        (
            "llama4",
            {"method_config": {"layers_to_transform": [3], "trainable_token_indices": [5]}},
            "lora acts at model.embed_tokens too, before",
        ),
        (
            "gpt2",
            {"method_config": {"layers_to_transform": [3], "modules_to_save": ["wpe"]}},
            "lora acts at transformer.wpe too",
        ),
        ("bert4", {"method": "bitfit", "method_config": {}}, "bitfit acts in the first block"),
        ("llama4", {"max_steps": EPOCH}, "8 steps are no more than the 8 of one pass"),
        ("llama4", {"max_steps": -1, "num_train_epochs": 1}, "no row comes twice in num_train_epochs 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    top: Make, base: str, changes: dict[str, Any], words: str
) -> None:
    made = top(base, **changes)
    with pytest.raises(IngraftError, match=words) as refused:
        train(made, quiet=True)
    assert all(text.startswith("cache_frozen:") for text in refused.value.problems)
    assert not Path(made["output_dir"]).exists()


def test_a_disk_that_is_too_small(top: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the run folder is made; and where another takes the room in between, before the first step."""
    monkeypatch.setattr(loop, "step", lambda *_: pytest.fail("trained"))
    made = top("llama4")
    with monkeypatch.context() as patch:
        patch.setattr("ingraft.durable._free", lambda path: 1000)
        with pytest.raises(
            IngraftError, match=r"cache_frozen: .* bytes are needed on this disk and 1,000 are free"
        ) as few:
            train(made, quiet=True)
        assert few.value.problems[0].endswith("Or leave it false.")
    assert not Path(made["output_dir"]).exists()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    with pytest.raises(IngraftError, match=r"cannot be taken in .*No space left on device"):
        train(made, quiet=True)
    assert not Path(made["output_dir"]).exists()


def test_both_needs_of_a_run_are_added(top: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the cache alone, or for the checkpoints alone, is not enough."""
    asked: list[int] = []
    monkeypatch.setattr("ingraft.durable.require_space", lambda path, needed: asked.append(needed))
    train(top("llama4", max_steps=EPOCH + 1), quiet=True)
    train(top("llama4", max_steps=EPOCH + 1, cache_frozen=False), quiet=True, overwrite_output_dir=True)
    cache, both, checkpoints = asked
    assert both == cache + checkpoints
    assert cache > 0


# ---------------------------------------------------------------------------------------------------------------- the file


ROWS = [
    Example(row_id=0, input_ids=[4, 5, 6, 7, 8, 9, 10, 11], labels=[-100] * 4 + [8, 9, 10, 11]),
    Example(row_id=1, input_ids=[5, 7, 9, 11], labels=[-100, -100, 9, 11]),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_come_back_as_they_were(bases: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    """In the base's dtype, to the bit, zero where no token is."""
    from transformers import LlamaForCausalLM

    from ingraft.train.objectives.causal import CausalObjective
    from ingraft.train.roofline import Meter

    model = LlamaForCausalLM.from_pretrained(bases / "llama4").eval().to(dtype)
    adapt.attach(model, registry.make_config("lora", {"layers_to_transform": [2, 3]}), seed=0)
    batch = {name: x for name, x in CausalObjective(model, 3).batch(ROWS).items() if name != "labels"}
    with unnoticed(model):
        found = below(model, batch)
        x_BTD = found.states(batch)
    cache = frozen.Frozen(found, CausalObjective(model, 3), [ROWS])
    assert cache.bytes == 32 * (8 + 4) * dtype.itemsize
    assert x_BTD.dtype == dtype
    seen: list[Tensor] = []
    handle = model.model.layers[2].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with cache.opened(tmp_path, lambda text: None):
        cache.require(ROWS, Meter(1.0))
        with cache.given(ROWS[::-1]):
            model(**CausalObjective(model, 3).batch(ROWS[::-1]))
        with cache.given(ROWS[1:]):
            model(**CausalObjective(model, 3).batch(ROWS[1:]))
    handle.remove()
    given = seen[-2]
    assert torch.equal(given[1], x_BTD[0])
    assert torch.equal(given[0, :4], x_BTD[1, :4])
    assert not given[0, 4:].any()
    assert torch.equal(seen[-1][0], x_BTD[1, :4])
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fails_is_told_in_words(bases: Path, tmp_path: Path) -> None:
    """Whether it takes nothing more, gives nothing back, or less than it was given."""
    from transformers import LlamaForCausalLM

    from ingraft.train.objectives.causal import CausalObjective
    from ingraft.train.roofline import Meter

    model = LlamaForCausalLM.from_pretrained(bases / "llama4").eval()
    adapt.attach(model, registry.make_config("lora", {"layers_to_transform": [2, 3]}), seed=0)
    objective = CausalObjective(model, 3)
    with unnoticed(model):
        found = below(model, {name: x for name, x in objective.batch(ROWS).items() if name != "labels"})

    def failing(*_: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")

    for fails, words in (
        ({"write": failing}, "cannot be written: Input/output error"),
        ({"readinto": failing}, "cannot be read again: Input/output error"),
        ({"readinto": lambda data: 0}, "cannot be read again: the file ends"),
    ):
        cache = frozen.Frozen(found, objective, [ROWS])
        with cache.opened(tmp_path, lambda text: None):
            file = cache._file
            whole: dict[str, Any] = {name: getattr(file, name) for name in ("seek", "write", "readinto")}
            cache._file = SimpleNamespace(**{**whole, **fails})  # type: ignore[assignment]
            with pytest.raises(IngraftError, match=words):
                cache.require(ROWS, Meter(1.0))
                with cache.given(ROWS):
                    pytest.fail("given")
