"""`ingraft models`: the bases that need no hub."""

from __future__ import annotations

from typing import Any

from ingraft.cli.options import verb
from ingraft.cli.output import Output


@verb(recipe=False)
def command(as_json: bool) -> None:
    """List the bases at hand without a hub.

    Any hub id, folder or .gguf file works as --model as well.
    """
    from ingraft.bases import BASES, installed

    output = Output(as_json=as_json)
    found: list[dict[str, Any]] = [
        {
            "name": record.name,
            "title": record.title,
            "kind": record.kind,
            "installed": installed(record),
            "parameters": record.parameters,
            "bytes": record.size,
            "languages": record.languages,
            "licence": record.licence,
            "note": record.note,
            "install": record.install,
        }
        for record in BASES.values()
    ]
    output.result(found)
    columns = ["name", "title", "installed", "kind", "parameters", "languages", "licence", "note"]
    output.table(columns, [[entry[column] for column in columns] for entry in found])
    missing = [entry for entry in found if not entry["installed"]]
    if missing:
        output.say("", "to get one:", *(f"  {entry['install']}" for entry in missing))
    output.say("", "--model also takes a hub id, a folder with a model, or a .gguf file.")
