"""Single files, logs, reading with limits, and the detection of every flipped bit."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from ingraft import durable
from ingraft.errors import IngraftError


@pytest.fixture(autouse=True)
def no_fault() -> Iterator[None]:
    yield
    durable.set_fault(None)


def test_write_file_is_old_or_new_at_every_operation(tmp_path: Path) -> None:
    file = tmp_path / "f"
    durable.write_file(file, b"old")
    seen: list[str] = []
    durable.set_fault(lambda n, kind, path: seen.append(kind))
    durable.write_file(file, b"new")
    assert seen == ["open", "write", "fsync", "rename", "fsync"]
    for at in range(len(seen)):
        durable.set_fault(None)
        durable.write_file(file, b"old")

        def hook(n: int, kind: str, path: Path, at: int = at) -> None:
            if n == at:
                raise OSError(errno.EIO, "broken", str(path))

        durable.set_fault(hook)
        with pytest.raises(IngraftError, match="cannot be written"):
            durable.write_file(file, b"new")
        assert file.read_bytes() == (b"new" if at == 4 else b"old")
        assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_a_full_device_is_named_with_bytes(tmp_path: Path) -> None:
    durable.set_fault(lambda n, kind, path: 1 if kind == "write" else None)
    with pytest.raises(IngraftError, match=r"f: the disk is full: 7 bytes .* free"):
        durable.write_file(tmp_path / "f", b"content")


def test_append_line_ends_a_line_cut_short(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    durable.append_line(log, "one")
    with log.open("ab") as file:
        file.write(b"hal")
    durable.append_line(log, "two")
    durable.append_line(log, "three\n")
    assert log.read_text().splitlines() == ["one", "hal", "two", "three"]


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    with durable.folder(tmp_path / "x", facts={"step": 3}) as tmp:
        durable.write_file(tmp / "weights", bytes(range(256)) * 4)
    rng = random.Random(0)
    for file in ("weights", durable.MANIFEST):
        whole = (tmp_path / "x" / file).read_bytes()
        for _ in range(500):
            broken = bytearray(whole)
            broken[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
            (tmp_path / "x" / file).write_bytes(broken)
            with pytest.raises(IngraftError, match=file):
                durable.verify(tmp_path / "x")
        (tmp_path / "x" / file).write_bytes(whole)
    durable.verify(tmp_path / "x")


def test_damage_is_reported_with_both_digests_and_all_at_once(tmp_path: Path) -> None:
    with durable.folder(tmp_path / "x") as tmp:
        durable.write_file(tmp / "a", b"a")
        durable.write_file(tmp / "b", b"b")
    (tmp_path / "x" / "a").write_bytes(b"A")
    (tmp_path / "x" / "b").unlink()
    with pytest.raises(IngraftError) as caught:
        durable.verify(tmp_path / "x")
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].count("sha256 ") == 2
    assert "missing" in caught.value.problems[1]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../x", "C:x", "a\\b", ""])
def test_a_manifest_cannot_point_outside(tmp_path: Path, name: str) -> None:
    manifest = {"schema": 1, "files": {name: {"size": 0, "sha256": "0"}}, "facts": {}}
    manifest["digest"] = durable._own_digest(manifest)  # pyright: ignore[reportPrivateUsage]
    (tmp_path / durable.MANIFEST).write_bytes(durable.to_json(manifest))
    with pytest.raises(IngraftError, match="not well-formed"):
        durable.verify(tmp_path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"a")
    with durable.folder(tmp_path / "x") as tmp:
        durable.write_file(tmp / "a", b"a")
    (tmp_path / "x" / "a").unlink()
    (tmp_path / "x" / "a").symlink_to(tmp_path / "secret")
    with pytest.raises(IngraftError, match="not a plain file"):
        durable.verify(tmp_path / "x")


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IngraftError, match=r"holds no ingraft\.json"):
        durable.verify(tmp_path)


@pytest.mark.parametrize(
    "text", ['{"a": 1, "a": 2}', '{"a": NaN}', "[" * 200_000, "{", "\xff".encode("latin-1").decode("latin-1") + "{"]
)
def test_bad_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "f.json").write_text(text, encoding="latin-1")
    with pytest.raises(IngraftError, match="not valid JSON"):
        durable.read_json(tmp_path / "f.json")


def test_reading_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 100)
    assert len(durable.read_bytes(tmp_path / "f", limit=100)) == 100
    with pytest.raises(IngraftError, match="100 bytes, more than the 99"):
        durable.read_bytes(tmp_path / "f", limit=99)
    with pytest.raises(IngraftError, match="not a plain file"):
        durable.read_bytes(tmp_path)
    with pytest.raises(IngraftError, match="cannot be read"):
        durable.read_bytes(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(IngraftError, match="not a plain file"):
        durable.read_bytes(tmp_path / "pipe")


@pytest.mark.parametrize("name", ["a", "A.b-c_1", "0", "x" * 64])
def test_good_names(name: str) -> None:
    assert durable.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "/x", "a/b", "a\\b", "C:x", "a\0", "x" * 65, "a\n", "ａ", "-a", ".a"]
)
def test_bad_names(name: str) -> None:
    with pytest.raises(IngraftError, match="adapter name"):
        durable.check_name(name)


def test_equal_values_give_equal_bytes() -> None:
    assert durable.to_json({"b": 1, "a": 2}) == durable.to_json({"a": 2, "b": 1})
    with pytest.raises(ValueError, match="JSON compliant"):
        durable.to_json(float("nan"))


def test_space_is_checked_ahead(tmp_path: Path) -> None:
    durable.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(IngraftError, match="are free"):
        durable.require_space(tmp_path, 1 << 60)


def test_remove_takes_the_manifest_first(tmp_path: Path) -> None:
    with durable.folder(tmp_path / "x") as tmp:
        durable.write_file(tmp / "a", b"a")
    seen: list[str] = []
    durable.set_fault(lambda n, kind, path: seen.append(path.name))
    durable.remove(tmp_path / "x")
    durable.remove(tmp_path / "x")
    assert seen == [durable.MANIFEST, "x"]
    assert not (tmp_path / "x").exists()
