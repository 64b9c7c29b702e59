"""A save is the old content or the new, whatever fails, and wherever the process dies."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ingraft import durable
from ingraft.errors import IngraftError

OLD = {"a.bin": b"old a", "sub/b.bin": b"old b"}
NEW = {"a.bin": b"new a" * 1000, "c.bin": b"new c"}


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    yield
    durable.set_fault(None)


def put(path: Path, content: dict[str, bytes], overwrite: bool = True) -> None:
    with durable.folder(path, overwrite=overwrite, facts={"which": "old" if content is OLD else "new"}) as tmp:
        for name, data in content.items():
            (tmp / name).parent.mkdir(exist_ok=True)
            (tmp / name).write_bytes(data)


def content_of(path: Path) -> dict[str, bytes]:
    durable.verify(path)
    files = (p for p in sorted(path.rglob("*")) if p.is_file() and p.name != durable.MANIFEST)
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in files}


def count_operations(work: Callable[[], None]) -> list[tuple[str, str]]:
    seen: list[tuple[str, str]] = []
    durable.set_fault(lambda n, kind, path: seen.append((kind, path.name)))
    work()
    durable.set_fault(None)
    return seen


def visible(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_folder_is_written_and_verified(tmp_path: Path) -> None:
    put(tmp_path / "x", OLD)
    manifest = durable.verify(tmp_path / "x")
    assert manifest["facts"] == {"which": "old"}
    assert set(manifest["files"]) == set(OLD)
    assert content_of(tmp_path / "x") == OLD
    assert visible(tmp_path) == ["x"]


def test_an_existing_folder_is_refused_unless_told(tmp_path: Path) -> None:
    put(tmp_path / "x", OLD)
    with pytest.raises(IngraftError, match="already exists"):
        put(tmp_path / "x", NEW, overwrite=False)
    assert content_of(tmp_path / "x") == OLD
    (tmp_path / "empty").mkdir()
    put(tmp_path / "empty", NEW, overwrite=False)
    assert content_of(tmp_path / "empty") == NEW


def test_an_exception_inside_leaves_nothing(tmp_path: Path) -> None:
    put(tmp_path / "x", OLD)
    with pytest.raises(KeyboardInterrupt), durable.folder(tmp_path / "x", overwrite=True) as tmp:
        (tmp / "a.bin").write_bytes(b"half")
        raise KeyboardInterrupt
    assert content_of(tmp_path / "x") == OLD
    assert visible(tmp_path) == ["x"]


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "replacing"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES], ids=["full", "io", "access"])
@pytest.mark.parametrize("persistent", [False, True], ids=["once", "from-then-on"])
def test_a_fault_at_every_operation(tmp_path: Path, existing: bool, code: int, persistent: bool) -> None:
    def attempt(where: Path) -> None:
        put(where, NEW)

    def prepare(where: Path) -> None:
        if existing:
            put(where, OLD)

    prepare(tmp_path / "count" / "x")
    operations = count_operations(lambda: attempt(tmp_path / "count" / "x"))
    assert len(operations) > 8
    for at in range(len(operations)):
        where = tmp_path / str(at) / "x"
        prepare(where)
        where.parent.mkdir(exist_ok=True)

        def hook(n: int, kind: str, path: Path, at: int = at) -> None:
            # A full or broken disk still lets files go; were it not so, no program could tidy up.
            if (n == at or (persistent and n > at)) and kind not in ("unlink", "rmtree"):
                raise OSError(code, os.strerror(code), str(path))

        durable.set_fault(hook)
        failed = False
        try:
            attempt(where)
        except IngraftError as error:
            failed = True
            assert str(where) in str(error)
            if code == errno.ENOSPC:
                assert "bytes were to be written" in str(error)
        durable.set_fault(None)
        if not failed:
            assert content_of(where) == NEW, operations[at]
        elif existing:
            assert content_of(where) in (OLD, NEW), operations[at]
        elif where.exists():
            assert content_of(where) == NEW, operations[at]
        assert visible(where.parent) in ([], ["x"]), operations[at]
        put(where, NEW)
        assert content_of(where) == NEW


def test_a_disk_that_fills_within_a_write(tmp_path: Path) -> None:
    put(tmp_path / "x", OLD)
    durable.set_fault(lambda n, kind, path: 3 if kind == "write" else None)
    with pytest.raises(IngraftError, match="disk is full"):
        put(tmp_path / "x", NEW)
    durable.set_fault(None)
    assert content_of(tmp_path / "x") == OLD
    assert visible(tmp_path) == ["x"]


KILL = """
import os, sys
from pathlib import Path
from ingraft import durable
at = int(sys.argv[2])
def hook(n, kind, path):
    if n == at:
        if kind == "write":
            path.write_bytes(b"{")
        os._exit(137)
durable.set_fault(hook)
with durable.folder(sys.argv[1], overwrite=True, facts={"which": "new"}) as tmp:
    (tmp / "a.bin").write_bytes(b"new a" * 1000)
    (tmp / "c.bin").write_bytes(b"new c")
"""


@pytest.mark.parametrize("existing", [False, True], ids=["fresh", "replacing"])
def test_death_at_every_operation(tmp_path: Path, existing: bool) -> None:
    died, at = True, 0
    while died:
        where = tmp_path / str(at) / "x"
        if existing:
            put(where, OLD)
        died = subprocess.run([sys.executable, "-c", KILL, str(where), str(at)], check=False).returncode == 137
        durable.recover(where)
        if existing:
            assert content_of(where) in (OLD, NEW), at
        elif where.exists():
            assert content_of(where) == NEW, at
        assert not where.parent.exists() or visible(where.parent) in ([], ["x"]), at
        put(where, NEW)
        assert content_of(where) == NEW
        at += 1
    assert at > 8


def test_nothing_is_vouched_for_before_it_is_on_the_disk(tmp_path: Path) -> None:
    """At the rename that gives a folder its name, every file in it, the manifest included, has been flushed after its last write."""
    flushed: set[str] = set()
    checked: list[Path] = []

    def hook(n: int, kind: str, path: Path) -> None:
        if kind == "fsync":
            flushed.add(path.name)
        if kind == "rename" and path.name == durable.MANIFEST:
            assert {"a.bin", "c.bin"} <= flushed
            assert any(name.startswith(".ingraft.json.") for name in flushed), (
                "the manifest must be flushed before it gets its name"
            )
        if kind == "rename" and path == tmp_path / "x":
            staging = next(p for p in tmp_path.iterdir() if p.name.startswith(".x."))
            assert staging.name in flushed
            checked.append(path)

    durable.set_fault(hook)
    put(tmp_path / "x", NEW)
    assert checked


def test_leftovers_of_a_live_process_are_left_alone(tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with durable.folder(tmp_path / "x") as tmp:
            mine = tmp.name
            put(tmp_path / "y", NEW)
        theirs = tmp_path / mine.replace(f"-{os.getpid()}-", f"-{other.pid}-")
        theirs.mkdir()
        put(tmp_path / "x", NEW)
        assert theirs.exists()
    finally:
        other.kill()
        other.wait()
    put(tmp_path / "x", NEW)
    assert not theirs.exists()


@pytest.mark.parametrize("extra", [False, True])
def test_completion_finishes_a_folder(tmp_path: Path, extra: bool) -> None:
    run = tmp_path / "run"
    (run / "checkpoint-1").mkdir(parents=True)
    durable.append_line(run / "log.jsonl", "{}")

    def finish() -> None:
        with durable.completion(run, {"seed": 1}) as tmp:
            durable.write_file(tmp / "adapter.bin", b"weights")

    steps = 0
    while True:

        def hook(n: int, kind: str, path: Path, at: int = steps) -> None:
            if n == at and kind not in ("unlink", "rmtree"):
                raise OSError(errno.EIO, "broken", str(path))

        durable.set_fault(hook if extra else None)
        try:
            finish()
            break
        except IngraftError:
            durable.set_fault(None)
            if (run / durable.MANIFEST).exists():
                durable.verify(run)
                break
            assert not [p for p in run.iterdir() if p.name.endswith(".tmp")]
            steps += 1
    durable.set_fault(None)
    assert set(durable.verify(run)["files"]) == {"adapter.bin", "log.jsonl"}
    with pytest.raises(IngraftError, match="complete already"):
        finish()
