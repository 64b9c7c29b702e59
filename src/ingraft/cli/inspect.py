"""`ingraft inspect`: what an adapter folder is, read without loading a model, and without torch."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ingraft.cli.options import verb
from ingraft.cli.output import Output

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "adapter_model.safetensors"
_SHOWN = ("target_modules", "modules_to_save", "task_type")


@verb(recipe=False)
@click.option("--adapter", metavar="DIR", help="an adapter or run folder")
@click.option("--sites", is_flag=True, help="list every site with its tensors")
@click.argument("folder", required=False)
def command(adapter: str | None, folder: str | None, sites: bool, as_json: bool) -> None:
    """Say what an adapter folder is: method, sites, parameters, base, metrics.

    FOLDER may stand for --adapter. Every file is compared with its digest.
    """
    from ingraft.cli.sources import adapter_folder

    output = Output(as_json=as_json)
    if (adapter or folder) is None:
        raise click.UsageError("name an adapter folder: `ingraft inspect --adapter DIR`.")
    found = describe(adapter_folder(str(adapter or folder)))
    output.result(found)
    if as_json:
        return
    tensors: dict[str, dict[str, Any]] = found["tensors"]
    output.facts(
        {
            "folder": found["folder"],
            "method": found["method"],
            "base": found["base"],
            "sites": len(found["sites"]),
            "parameters": found["parameters"],
            "tensors": f"{len(tensors)} in {', '.join(sorted({t['dtype'] for t in tensors.values()}))}",
            "size": f"{found['bytes'] / 1e6:.2f} MB",
            "files": found["files"],
        }
    )
    for title, values in (("settings", found["settings"]), ("facts", found["facts"]), ("metrics", found["metrics"])):
        if values:
            output.say("", f"{title}:")
            output.facts({f"  {name}": value for name, value in _flat(values)})
    if sites:
        output.say("")
        output.table(["tensor", "shape", "dtype"], [[n, str(t["shape"]), t["dtype"]] for n, t in tensors.items()])


def describe(folder: Path) -> dict[str, Any]:
    """The facts about an adapter folder as JSON-ready values.

    Raises:
        IngraftError: not an adapter, a file that cannot be read, or one that differs from its digest.
    """
    from ingraft import durable

    config: dict[str, Any] = durable.read_json(folder / "adapter_config.json")
    sealed = (folder / durable.MANIFEST).is_file()
    facts: Mapping[str, Any] = durable.verify(folder)["facts"] if sealed else {}
    metrics_file = folder / "metrics.json"
    tensors = read_header(folder / WEIGHTS)
    return {
        "folder": str(folder),
        "method": facts.get("method") or str(config.get("peft_type", "unknown")).lower(),
        "base": config.get("base_model_name_or_path"),
        "sites": sorted({_site(name) for name in tensors}),
        "parameters": sum(math.prod(entry["shape"]) for entry in tensors.values()),
        "tensors": tensors,
        "bytes": (folder / WEIGHTS).stat().st_size,
        "files": "all equal to their digests" if sealed else "without digests (not written by Ingraft)",
        "settings": {
            k: v for k, v in config.items() if k in _SHOWN or (isinstance(v, int | float) and not isinstance(v, bool))
        },
        "facts": facts,
        "metrics": durable.read_json(metrics_file) if metrics_file.is_file() else {},
    }


def read_header(file: Path) -> dict[str, dict[str, Any]]:
    """Name -> shape and dtype of every tensor; the tensors themselves stay on the disk.

    Raises:
        IngraftError: missing, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    from ingraft.errors import IngraftError

    if not file.is_file():
        raise IngraftError(
            f"{file}: there is no such file; adapters in other containers (.bin) are not read, because they can run code."
        )
    try:
        with safe_open(file, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118 - not a mapping
            return {
                name: {"shape": list(part.get_shape()), "dtype": str(part.get_dtype())} for name, part in slices.items()
            }
    except SafetensorError as error:
        raise IngraftError(f"{file}: not a readable safetensors file: {error}.") from error


def _site(tensor: str) -> str:
    """The module a tensor belongs to: its name without PEFT's prefix and without the last parts that name the tensor."""
    name = tensor.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_[A-Za-z_]+|ia3_l|[a-z_]+)(\.weight|\.bias)?$", "", name)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    out: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            out += _flat(value, f"{prefix}{name}.")
        else:
            out.append((prefix + name, value))
    return out
