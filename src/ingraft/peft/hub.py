"""Where an adapter lies: a folder on this machine, or one fetched from the hub for a script that names it so.

This is the only place in reach of `ingraft.peft` that opens a socket, and only when asked for something that is no folder here.
"""

from __future__ import annotations

import os
from pathlib import Path

from ingraft.errors import IngraftError

FILES = ("adapter_config.json", "adapter_model.safetensors", "ingraft.json")


def folder_of(
    name: str | os.PathLike[str],
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder that holds an adapter's files.

    Args:
        name: a folder, or the hub's id.
        subfolder: below it.
        revision, token, cache_dir, local_files_only: for the hub, as in `huggingface_hub.snapshot_download`.

    Raises:
        IngraftError: neither a folder with an adapter nor something the hub has.
    """
    folder = Path(name) / (subfolder or "")
    if (folder / FILES[0]).is_file():
        return folder
    if Path(name).exists():
        raise IngraftError(f"{folder}: holds no {FILES[0]}, so it is not an adapter.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = [f"{subfolder}/{file}" if subfolder else file for file in FILES]
    try:
        root = snapshot_download(
            str(name),
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=wanted,
        )
    except (HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError, OSError) as error:
        raise IngraftError(f"{name}: no such folder, and the hub does not give it: {error}") from error
    return Path(root) / (subfolder or "")
