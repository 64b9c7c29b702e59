"""Writes docs/methods.md, the catalogue of methods, from the registry and the methods' own files: nothing in it is typed twice."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path

from ingraft.adapt.capabilities import OWN_CODE, Capabilities, capabilities
from ingraft.methods import registry
from ingraft.shapes import NEEDED, SHAPES, counts

PAGE = Path(__file__).parent / "methods.md"
HEAD = """# Methods

*Written by `make docs` from the registry and the heads of the method files, and by trying each method; change those. Parameters are those trained with default
options on two well-known shapes; where those are refused, the options that are needed stand beside the number. Layers: the place in a transformer where a method
acts, and the kinds of layer that take it with default options, tried at a width of 256 (`experts`: stacked matrices named in `target_parameters`). Quantised bases: `yes`, or only
those whose weights were packed while loading, `nf4, int8`, and not a GGUF's own blocks, which hold the embedding too and have no original. Rows: how a batch
runs whose rows belong to different adapters - in one base call for all (`one`), where it says so at some kinds of layer only, or a base call for each adapter
(`each`). A change of weights always takes one for each where the layer's code is its own: in `multihead-attention`, `experts`, scaled embeddings.*

"""


def page() -> str:
    """The whole page."""
    columns = [
        "name",
        "family",
        "what is trained",
        "equation",
        *SHAPES,
        "layers",
        "merges",
        "quantised bases",
        "rows",
        "paper",
    ]
    rows = [columns, ["---"] * len(columns), *(_row(record) for record in registry.records().values())]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    sections = [section(record) for record in registry.records().values()]
    return HEAD + "\n".join(table) + "\n\n" + "\n".join(sections)


def _row(record: registry.MethodRecord) -> list[str]:
    """One line of the table."""
    can = capabilities(record.name)
    needed = " ".join(f"`{key}={value}`" for key, value in NEEDED.get(record.name, {}).items())
    counted = [
        "" if count is None else f"{count:,}" + (f" (with {needed}; refused without)" if needed else "")
        for count in counts(record.name).values()
    ]
    return [
        f"[`{record.name}`](#{record.name})",
        record.family,
        record.summary,
        _cell(record.equation),
        *counted,
        ", ".join(can.layers),
        "yes" if can.mergeable else "no",
        "yes" if can.kept else "nf4, int8" if can.quantised else "no",
        _rows(can),
        record.paper,
    ]


def _rows(can: Capabilities) -> str:
    """How a mixed batch runs; that own code needs a call for each, the page's head says once."""
    if not can.one_call:
        return "each"
    elsewhere = [kind for kind in can.layers if kind not in (*can.one_call, *OWN_CODE)]
    return "one" if not elsewhere else f"one at {', '.join(can.one_call)}"


def section(record: registry.MethodRecord) -> str:
    """One method: what its file says at its head, its options with their defaults, a command."""
    config = registry.load(record.name).config
    module = sys.modules[record.target.partition(":")[0]]
    meanings = _attributes([cls for cls in config.__mro__ if dataclasses.is_dataclass(cls)])
    lines = [f"## {record.name}", "", "```text", inspect.cleandoc(module.__doc__ or ""), "```", ""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(config):
        default = "" if field.default is dataclasses.MISSING else f"`{field.default!r}`"
        lines.append(f"| `{field.name}` | {default} | {_cell(meanings.get(field.name, ''))} |")
    lines += ["", "```bash", f"ingraft train --model smollm2 --data rows.jsonl --method {record.name}", "```", ""]
    return "\n".join(lines)


def _attributes(classes: list[type]) -> dict[str, str]:
    """The `Attributes:` of the classes' docstrings, name -> meaning."""
    out: dict[str, str] = {}
    for cls in reversed(classes):
        name = ""
        for line in inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")[2].splitlines():
            if found := re.match(r"    (\w[\w, ]*): (.*)", line):
                name = found[1]
                out.update(dict.fromkeys(re.split(r", *", name), found[2]))
            elif line.startswith("        ") and name:
                for part in re.split(r", *", name):
                    out[part] += " " + line.strip()
            else:
                name = ""
    return out


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
