"""Where the name of a base leads: a catalogue entry, a folder, a `.gguf` file or a hub id. What cannot be found is refused at once, by name."""

from __future__ import annotations

import functools
import os
import socket
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ingraft.bases import dense_gguf
from ingraft.bases.catalogue import BASES, BaseRecord, catalogue_path
from ingraft.bases.hush import quiet
from ingraft.errors import IngraftError, nearest


def find(name: str) -> tuple[str, dict[str, Any]]:
    """Where a name leads: a folder or hub id for `from_pretrained`, and what it must be told."""
    if not name.strip():
        raise IngraftError("The model has no name; `ingraft models` lists the bases at hand.")
    if record := BASES.get(name.lower()):
        return str(_catalogue_folder(record)), {}
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise IngraftError(_not_a_base(path))
        return str(path), {}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise IngraftError(
                f"{path}: a single file can be a base only as .gguf; give the folder that holds config.json."
            )
        return str(_dense(path)), {}
    if name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise IngraftError(f"{name}: there is no such file or folder{nearest(path.name, siblings)}.")
    return name, _hub_options(name)


def gguf_of(name: str) -> Path | None:
    """The GGUF file that a name means, or None."""
    if record := BASES.get(name.lower()):
        path = catalogue_path(record)
        return path if path.is_file() else None
    path = Path(name).expanduser()
    return path if path.is_file() and path.suffix.lower() == ".gguf" else None


def _catalogue_folder(record: BaseRecord) -> Path:
    path = catalogue_path(record)
    return _dense(path) if path.is_file() else path


def _dense(gguf: Path) -> Path:
    with quiet():
        return dense_gguf.dense_folder(gguf)


def _not_a_base(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path}: is an adapter, not a base; name its base as the model and give this folder as --adapter."
    return f"{path}: holds no config.json, so it is not a model folder."


def _hub_options(name: str) -> dict[str, Any]:
    """Refuse at once what would otherwise wait half a minute for a hub that cannot know it or cannot be reached."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    close = get_close_matches(name.lower(), BASES, n=2, cutoff=0.7)
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise IngraftError(
            f"{name!r}: is no name of a base{nearest(name, BASES)}; `ingraft models` lists those at hand."
        ) from error
    if cached:
        return {} if _reachable(constants.ENDPOINT) else {"local_files_only": True}
    if close and "/" not in name:
        raise IngraftError(
            f"{name}: there is no such base{nearest(name.lower(), BASES)}; `ingraft models` lists those at hand."
        )
    if constants.is_offline_mode() or not _reachable(constants.ENDPOINT):
        text = f"{name}: is no catalogue name, no folder here, and the hub at {constants.ENDPOINT} cannot be reached"
        raise IngraftError(
            f"{text}{nearest(name.split('/')[-1].lower(), BASES)}; `ingraft models` lists the bases at hand."
        )
    return {}


@functools.cache
def _reachable(endpoint: str) -> bool:
    """Whether the hub's host name resolves. Behind a proxy that is the proxy's business, so the answer is yes."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True
