"""Fewer rows at once where memory is short: the same bits as accumulation by hand, whatever made them fewer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from ingraft import LoraConfig, adapt, durable
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.train import machine, memory
from ingraft.train.objectives.causal import CausalObjective
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
WEIGHTS = "adapter_model.safetensors"


def by_hand(recipe: Make, folder: Path) -> bytes:
    """The adapter of four times two rows."""
    made = recipe(per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4, output_dir=str(folder))
    return (train(made, quiet=True).folder / WEIGHTS).read_bytes()


def test_a_step_that_runs_out_of_memory_is_made_again_with_half_the_rows(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = by_hand(recipe, tmp_path / "hand")
    plain, sizes = CausalObjective.loss, list[int]()

    def loss(self: CausalObjective, batch: dict[str, Tensor]) -> Tensor:
        sizes.append(len(batch["input_ids"]))
        if sizes[-1] > 4 or (sizes[-1] == 4 and sizes.count(4) == 2):  # the second time with gradients there already
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, batch)

    monkeypatch.setattr(CausalObjective, "loss", loss)
    run = train(recipe(per_device_train_batch_size=8, max_steps=4))
    assert (run.folder / WEIGHTS).read_bytes() == wanted
    assert sizes == [8, 4, 4] + [2] * 16
    text = capsys.readouterr().err
    assert "with 8 rows at a time and is made again with 4" in text
    assert "with 4 rows at a time and is made again with 2" in text
    state = durable.read_manifest(run.folder / "checkpoint-4")["facts"]["state"]
    assert state["micro_batch"] == 2, "a run that goes on begins with what fitted"


def test_what_cannot_be_smaller_says_what_to_do(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: CausalObjective, batch: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(CausalObjective, "loss", loss)
    with pytest.raises(IngraftError, match=r"with 1 rows .*before\. gradient_checkpointing: true"):
        train(recipe(), quiet=True)
    with pytest.raises(IngraftError, match=r"with 4 rows .*auto_find_batch_size: true takes fewer"):
        train(recipe(auto_find_batch_size=False), quiet=True)


def test_other_errors_are_what_they_are(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(self: CausalObjective, batch: dict[str, Tensor]) -> Tensor:
        raise RuntimeError("a shape is wrong")

    monkeypatch.setattr(CausalObjective, "loss", loss)
    with pytest.raises(RuntimeError, match="a shape is wrong"):
        train(recipe(), quiet=True)


def test_a_forecast_lowers_the_rows_before_the_first_step(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With room for two rows, and for no more."""
    wanted = by_hand(recipe, tmp_path / "hand")
    room: list[int] = []
    plain = memory.probe

    def probe(model: nn.Module, *rest: Any) -> memory.Kept:
        kept = plain(model, *rest)
        room[:] = [memory.forecast(model, kept, 2)]
        return kept

    class Free(int):
        """Decided when it is asked: the forecast for two rows."""

        def __ge__(self, other: int) -> bool:
            return room[0] >= other

        def __lt__(self, other: int) -> bool:
            return room[0] < other

    monkeypatch.setattr(memory, "probe", probe)
    monkeypatch.setattr(memory, "plenty", lambda *args: False)
    monkeypatch.setattr(memory, "free_memory", lambda device: Free(1))
    run = train(recipe(per_device_train_batch_size=8, max_steps=4))
    assert (run.folder / WEIGHTS).read_bytes() == wanted
    assert "2 at a time, and the effective batch as it was" in capsys.readouterr().err
    monkeypatch.setattr(memory, "probe", lambda *args: pytest.fail("counted although nobody asked"))
    other = recipe(auto_find_batch_size=False, max_steps=1, output_dir=str(tmp_path / "other"))
    assert load_file(train(other, quiet=True).folder / WEIGHTS)


def test_where_there_is_plenty_nothing_is_counted(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "probe", lambda *args: pytest.fail("counted"))
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    assert train(recipe(max_steps=1), quiet=True).steps == 1


def test_equal_shares() -> None:
    """The largest equal share that fits; one where none does."""
    for free, wanted in ((80, 8), (79, 4), (40, 4), (39, 3), (30, 3), (29, 2), (10, 1), (5, 1)):
        assert memory.rows_that_fit(8, lambda rows: 10 * rows, free) == wanted


def test_what_is_kept_is_counted_once_and_by_block() -> None:
    """Two linears read one tensor, which is kept once; weights are not counted; the block's own goes to the block."""
    outer, block = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))
    x = torch.randn(5, 8, requires_grad=True)
    kept = memory.measure(nn.ModuleList([outer, block]), [block], lambda: block(outer(x)).exp())
    assert kept.blocks == (4 * 5 * (8 + 16),), "its input, and the tanh that the next layer reads as well"
    assert kept.outside == 4 * 5 * (8 + 8), "x, and the exponential"
    assert kept.entry == 4 * 5 * 8
    assert kept.of(2) == 2 * (kept.outside + 5 * kept.blocks[0])
    assert kept.of(2, [0]) == 2 * (kept.outside + kept.entry + 6 * kept.blocks[0])


def test_rows_keep_in_proportion(tiny: SimpleNamespace) -> None:
    model = tiny.make("llama")
    adapt.attach(model, LoraConfig(r=2, lora_dropout=0.1), seed=0)
    objective = CausalObjective(model, 0)
    objective.begin()
    ids = list(range(2, 22))
    rows = [Example(row_id=i, input_ids=ids, labels=[-100] * 10 + ids[10:]) for i in range(3)]
    one = memory.probe(model, objective, (), rows[0]).outside
    batch = objective.batch(rows)
    adapt.dropout_step(model, 0, torch.arange(3))
    three = memory.measure(model, (), lambda: objective.loss(batch)).outside
    assert 0.9 * 3 * one <= three <= 3 * one


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    """Both versions of control groups, the nearest and every one above; cached pages are free; no limit is no limit."""
    left = machine._left_by_groups  # pyright: ignore[reportPrivateUsage]
    root, member = tmp_path / "cgroup", tmp_path / "self"
    inner = root / "a" / "b"
    inner.mkdir(parents=True)

    def write(place: Path, limit: str, used: int, stat: str = "") -> None:
        for name, text in (("memory.max", limit), ("memory.current", str(used)), ("memory.stat", stat)):
            (place / name).write_text(text + "\n")

    member.write_text("0::/a/b\n")
    assert left(member, root) is None
    write(inner, "max", 500)
    assert left(member, root) is None
    write(root / "a", "1000", 600, "anon 5\ninactive_file 100")
    assert left(member, root) == 500
    write(inner, "700", 500)
    assert left(member, root) == 200
    write(inner, "400", 500)
    assert left(member, root) == 0
    first = root / "memory"
    first.mkdir()
    member.write_text("5:cpu,cpuacct:/x\n4:memory:/somewhere/else\n")
    (first / "memory.limit_in_bytes").write_text("9223372036854771712")
    (first / "memory.usage_in_bytes").write_text("300")
    assert left(member, root) is None
    (first / "memory.limit_in_bytes").write_text("1300")
    (first / "memory.stat").write_text("total_inactive_file 50\n")
    assert left(member, root) == 1050
    assert left(tmp_path / "none", root) is None


def test_what_is_free_here_is_told() -> None:
    assert (machine.free_memory(torch.device("cpu")) or 1) > 0
