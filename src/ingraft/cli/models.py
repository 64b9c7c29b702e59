"""`ingraft models`: the bases that need no hub."""

from __future__ import annotations

import dataclasses
from typing import Any

from ingraft.cli.options import verb
from ingraft.cli.output import Output


@verb(recipe=False)
def command(as_json: bool) -> None:
    """List the bases at hand without a hub.

    Any hub id, folder or .gguf file works as --model as well.
    """
    from ingraft.bases import catalogue

    output = Output(as_json=as_json)
    found: list[dict[str, Any]] = [dataclasses.asdict(entry) for entry in catalogue()]
    output.result(found)
    output.table(list(found[0]), [list(entry.values()) for entry in found])
    output.say("", "--model also takes a hub id, a folder with a model, or a .gguf file.")
