"""The house stays as it was drawn: one short file a method, and a core that knows none of them by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import ingraft.adapt
from ingraft.methods import registry

ADAPT = sorted(Path(inspect.getsourcefile(ingraft.adapt) or "").parent.rglob("*.py"))
METHOD_FILES = sorted({Path(inspect.getsourcefile(registry.load(name).part) or "") for name in registry.records()})
SEAM = {"contract", "registry"}
"""What the core may import from `methods/`."""


def test_method_files_average_at_most_110_lines() -> None:
    sizes = {path.name: len(path.read_text().splitlines()) for path in METHOD_FILES}
    assert max(sizes.values()) <= 150, sizes
    assert sum(sizes.values()) / len(registry.records()) <= 110, sizes


@pytest.mark.parametrize("path", ADAPT, ids=lambda path: path.name)
def test_the_core_names_no_method(path: Path) -> None:
    """Neither as an import nor as a text: what is particular to a method stands in its file."""
    tree = ast.parse(path.read_text())
    documentation = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    names = set(registry.records()) - {"prompt", "prefix", "full"}  # these three are ordinary words too
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ingraft.methods."):
            assert (node.module or "").removeprefix("ingraft.methods.") in SEAM, f"line {node.lineno}: {node.module}"
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in documentation:
            assert node.value not in names, f"line {node.lineno}: {node.value!r}"


@pytest.mark.parametrize(
    "path", sorted(Path(inspect.getsourcefile(ingraft.adapt) or "").parent.parent.rglob("*.py")), ids=lambda p: p.name
)
def test_no_file_is_over_500_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 500
