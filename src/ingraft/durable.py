"""The one way in which Ingraft writes and reads data that must survive: complete or absent, and known to be intact.

A save that a crash, a full disk or Ctrl-C can cut in half is worse than none, because the half looks like a whole. So every file or
folder is made under a temporary name beside its final one, flushed to the disk, and renamed; a folder receives its manifest
(`ingraft.json`: size and sha256 of every file) last, so that a folder without one, or with another's, is recognisably not a save.

Replacing a folder takes two renames (old aside, new in). Between them neither has the final name, but both are whole: `recover`, which
every save and `verify` start with, puts the old one back. Temporary names carry host and process id, so that the leftovers of a dead
process are told from the work of a live one.

Every operation on the disk announces itself to a hook first (`set_fault`), so tests can fail, shorten or kill each of them in turn.
Standard library only: the writer of an error report must not depend on what failed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

from ingraft import _disk
from ingraft._disk import Fault as Fault
from ingraft._disk import set_fault as set_fault
from ingraft.errors import IngraftError

MANIFEST = "ingraft.json"
SCHEMA = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, what: str = "adapter name") -> str:
    """Return `name` if it is safe as a file name on every system, and never a path.

    Raises:
        IngraftError: anything but 1-64 letters, digits, `.`, `_`, `-`, the first a letter or a digit.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise IngraftError(
            f"{what} {str(name)[:80]!r}: use 1 to 64 letters, digits, '.', '_' and '-', starting with a letter or a digit."
        )
    return name


@contextlib.contextmanager
def folder(
    path: str | os.PathLike[str], overwrite: bool = False, facts: Mapping[str, Any] | None = None
) -> Iterator[Path]:
    """Make a folder as one step: `with folder("adapter") as tmp:` gives a temporary folder to fill.

    When the block ends, every file is flushed, the manifest is written and the folder gets its name. If the block raises, or anything
    fails, the temporary is removed and what was at `path` is untouched.

    Args:
        path: the final folder. Missing parents are made.
        overwrite: replace a folder that is there. Without it a folder that holds anything is refused.
        facts: JSON data to keep in the manifest. Read when the block ends, so the block may still fill it.

    Raises:
        IngraftError: the folder exists, or the disk refused (full: with needed and free bytes).
    """
    path = Path(path)
    with _reported(path):
        recover(path)
        if not overwrite and _occupied(path):
            raise IngraftError(
                f"{path} already exists; choose another folder, or say explicitly that it may be overwritten."
            )
        _disk.make_parents(path.parent)
        staging = _disk.temporary(path, "tmp")
        _disk.LIVE.add(staging.name)
        try:
            _disk.announce("mkdir", staging)
            staging.mkdir()
            yield staging
            _seal(staging, facts or {}, [p for p in _files(staging) if p.name != MANIFEST or p.parent != staging])
            _put_in_place(staging, path)
        except BaseException:
            _disk.discard(staging)
            raise
        finally:
            _disk.LIVE.discard(staging.name)


@contextlib.contextmanager
def completion(
    path: str | os.PathLike[str], facts: Mapping[str, Any] | None = None, only: Collection[str] | None = None
) -> Iterator[Path]:
    """Finish a folder that was built up over a long time, such as a run folder with its log and checkpoints.

    The block fills a temporary folder; at its end the files move into `path` and the manifest, which makes the folder complete, follows
    as the last step. It covers the files that were moved and the plain files that lay in `path` already, not its subfolders.

    Args:
        path: the folder; made if it is not there.
        facts: JSON data to keep in the manifest.
        only: names of the files to cover, where the others belong to somebody else and may change.

    Raises:
        IngraftError: the folder is complete already, or the disk refused.
    """
    path = Path(path)
    if (path / MANIFEST).exists():
        raise IngraftError(f"{path} is complete already ({MANIFEST} is there); it is not written again.")
    with _reported(path):
        staging = _disk.temporary(path / MANIFEST, "tmp")
        _disk.LIVE.add(staging.name)
        try:
            _disk.announce("mkdir", staging)
            staging.mkdir()
            yield staging
            for item in sorted(staging.iterdir()):
                _disk.sync(item)
                _disk.rename(item, path / item.name)
            files = [p for p in sorted(path.iterdir()) if p.is_file() and not p.name.startswith(".")]
            _seal(path, facts or {}, [p for p in files if only is None or p.name in only])
        finally:
            _disk.discard(staging)
            _disk.LIVE.discard(staging.name)


def write_file(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write one file as one step: afterwards it has the old content or the new, never a part.

    Raises:
        IngraftError: the disk refused (full: with needed and free bytes).
    """
    path = Path(path)
    content = data.encode() if isinstance(data, str) else data
    with _reported(path, len(content)):
        _disk.make_parents(path.parent)
        staging = _disk.temporary(path, "tmp")
        _disk.LIVE.add(staging.name)
        try:
            _disk.write_new(staging, content)
            _disk.rename(staging, path)
        except BaseException:
            _disk.discard(staging)
            raise
        finally:
            _disk.LIVE.discard(staging.name)
        _disk.sync_folder(path.parent)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """`write_file` of a value as JSON: sorted keys, no NaN, the same bytes every time."""
    write_file(path, to_json(value))


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Add a line to a log and hand it to the system. A line that a crash cut short is ended first, so that it stays alone.

    Raises:
        IngraftError: the disk refused.
    """
    path = Path(path)
    content = line.rstrip("\n").encode() + b"\n"
    with _reported(path, len(content)):
        _disk.announce("open", path)
        with path.open("a+b", buffering=0) as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                content = b"\n" + content
            _disk.write_all(file.fileno(), path, content)


def remove(path: str | os.PathLike[str]) -> None:
    """Remove a folder or file; a folder loses its manifest first, so that an interrupted removal leaves nothing that looks whole.

    Raises:
        IngraftError: the disk refused.
    """
    path = Path(path)
    with _reported(path):
        if path.is_dir() and not path.is_symlink():
            _disk.remove(path / MANIFEST)
        _disk.remove(path)


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read every file of a folder again and compare it with the manifest. Returns the manifest; the caller's data is its `facts`.

    Raises:
        IngraftError: no manifest, a wrong one, or files that differ: each named with both digests.
    """
    path = Path(path)
    recover(path)
    manifest = read_manifest(path)
    problems: list[str] = []
    for name, entry in cast(dict[str, dict[str, Any]], manifest["files"]).items():
        try:
            size, digest = _digest(path / name)
        except FileNotFoundError:
            problems.append(f"{path / name}: the file is missing; {MANIFEST} lists it with sha256 {entry['sha256']}.")
            continue
        except OSError as error:
            problems.append(f"{path / name}: cannot be read: {error.strerror or error}.")
            continue
        if (size, digest) != (entry["size"], entry["sha256"]):
            wanted = f"{entry['size']} bytes, sha256 {entry['sha256']}"
            problems.append(
                f"{path / name}: damaged: {MANIFEST} says {wanted}; the file has {size} bytes, sha256 {digest}."
            )
    if problems:
        raise IngraftError(*problems)
    return manifest


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest of a folder, itself checked, without reading the other files.

    Raises:
        IngraftError: there is none (the save was not finished, or another program wrote the folder), or it is damaged.
    """
    path = Path(path) / MANIFEST
    if not path.is_file():
        raise IngraftError(f"{path.parent}: holds no {MANIFEST}, so it is not a complete Ingraft folder.")
    content = read_bytes(path, limit=1 << 26)
    manifest = parse_json(content, path)
    if not isinstance(manifest, dict) or set(cast(dict[str, Any], manifest)) != {"schema", "files", "facts", "digest"}:
        raise IngraftError(f"{path}: not a manifest of ours; expected the keys digest, facts, files and schema.")
    manifest = cast(dict[str, Any], manifest)
    if manifest["schema"] != SCHEMA:
        raise IngraftError(f"{path}: has schema {manifest['schema']!r}, this version of Ingraft reads {SCHEMA}.")
    if not _as_sealed(content, manifest["digest"]) and (found := _own_digest(manifest)) != manifest["digest"]:
        raise IngraftError(f"{path}: damaged: it states the digest {manifest['digest']}, its content has {found}.")
    files = manifest["files"]
    if not isinstance(files, dict) or not all(_entry_ok(k, v) for k, v in cast(dict[str, Any], files).items()):
        raise IngraftError(f"{path}: its list of files is not well-formed.")
    return manifest


def read_bytes(path: str | os.PathLike[str], limit: int = 1 << 36) -> bytes:
    """The content of a plain file, refused before reading if it is larger than `limit` bytes.

    Raises:
        IngraftError: missing, not a plain file, too large, unreadable.
    """
    path = Path(path)
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise IngraftError(f"{path}: not a plain file.")
        if facts.st_size > limit:
            raise IngraftError(f"{path}: {facts.st_size:,} bytes, more than the {limit:,} that such a file may have.")
        return path.read_bytes()
    except OSError as error:
        raise IngraftError(f"{path}: cannot be read: {error.strerror or error}.") from error


def read_json(path: str | os.PathLike[str], limit: int = 1 << 24) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Raises:
        IngraftError: as `read_bytes`, or not strict JSON: a key twice, NaN, nested too deeply.
    """

    return parse_json(read_bytes(path, limit), path)


def parse_json(content: bytes, path: str | os.PathLike[str]) -> Any:
    """The value in the content of a JSON file.

    Args:
        path: the file, for messages.

    Raises:
        IngraftError: as `read_json`.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) != len(pairs):
            raise ValueError("a key is given twice")
        return value

    def refuse(text: str) -> Any:
        raise ValueError(f"{text} is not JSON")

    try:
        return json.loads(content, object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise IngraftError(f"{path}: not valid JSON: {error}.") from error


def to_json(value: Any) -> bytes:
    """JSON with sorted keys and a newline at the end: equal values give equal bytes. NaN is refused by a ValueError."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


def require_space(path: str | os.PathLike[str], needed: int) -> None:
    """Refuse work whose result would not fit the disk that holds `path`.

    Raises:
        IngraftError: fewer than `needed` bytes are free.
    """
    if (free := _free(Path(path))) < needed:
        raise IngraftError(
            f"{path}: about {needed:,} bytes are needed on this disk and {free:,} are free; make room or choose another."
        )


def recover(path: str | os.PathLike[str]) -> None:
    """Undo what a process that died while saving to `path` left behind: put a replaced folder back, remove temporaries."""
    path = Path(path)
    for item, kind in _disk.leftovers(path):
        with contextlib.suppress(OSError):
            if kind == "old" and not path.exists():
                _disk.rename(item, path)
            else:
                _disk.discard(item)


@contextlib.contextmanager
def _reported(path: Path, needed: int = 0) -> Iterator[None]:
    """Turn what the system refuses into a sentence for the user, about the path that they know rather than a temporary."""
    try:
        yield
    except OSError as error:
        if any(parent.name in _disk.LIVE for parent in path.parents):
            raise  # the save of that folder reports it
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise IngraftError(f"{path}: cannot be written: {error.strerror or error}.") from error
        needed = max(needed, int(getattr(error, "needed", 0)))
        text = f"{path}: the disk is full: {needed:,} bytes were to be written, {_free(path):,} are free."
        raise IngraftError(text + " Nothing that was there before has been changed; make room and repeat.") from error


def _free(path: Path) -> int:
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def _occupied(path: Path) -> bool:
    return path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir()))


def _files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())


def _seal(root: Path, facts: Mapping[str, Any], files: list[Path]) -> None:
    """Flush the files, then write the manifest that vouches for them."""
    entries: dict[str, Any] = {}
    for file in files:
        _disk.sync(file)
        size, digest = _digest(file)
        entries[file.relative_to(root).as_posix()] = {"size": size, "sha256": digest}
    for inner in sorted({p for file in files for p in file.relative_to(root).parents} - {Path()}):
        _disk.sync_folder(root / inner)
    manifest: dict[str, Any] = {"schema": SCHEMA, "files": entries, "facts": dict(facts)}
    manifest["digest"] = _own_digest(manifest)
    write_json(root / MANIFEST, manifest)


def _put_in_place(staging: Path, path: Path) -> None:
    aside = _disk.temporary(path, "old")
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        _disk.announce("rmdir", path)
        path.rmdir()
    replaced = path.exists() or path.is_symlink()
    _disk.LIVE.add(aside.name)
    try:
        if replaced:
            _disk.rename(path, aside)
        try:
            _disk.rename(staging, path)
        except BaseException:
            if replaced:
                aside.replace(path)
            raise
        _disk.sync_folder(path.parent)
        if replaced:
            _disk.discard(aside)
    finally:
        _disk.LIVE.discard(aside.name)


def _digest(path: Path) -> tuple[int, str]:
    """Size and sha256 of a plain file; a link is not followed."""

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | getattr(os, "O_NOFOLLOW", 0))

    if not stat.S_ISREG(path.lstat().st_mode):
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    with open(path, "rb", buffering=0, opener=opener) as file:  # Path.open takes no opener
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _own_digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(to_json({k: v for k, v in manifest.items() if k != "digest"})).hexdigest()


def _as_sealed(content: bytes, digest: object) -> bool:
    """Whether a manifest is, to the byte, what was sealed with this digest; comparing bytes is quicker than writing the value again."""
    if not isinstance(digest, str):
        return False
    begin, line, rest = content.partition(f'  "digest": "{digest}",\n'.encode())
    return bool(line) and hashlib.sha256(begin + rest).hexdigest() == digest


def _entry_ok(name: str, entry: Any) -> bool:
    parts = PurePosixPath(name).parts
    inside = bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name and ":" not in parts[0]
    if not inside or not isinstance(entry, dict):
        return False
    values = cast(dict[str, Any], entry)
    return set(values) == {"size", "sha256"} and isinstance(values["size"], int) and isinstance(values["sha256"], str)
