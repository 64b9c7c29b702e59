"""The house stays as it was drawn: one short file a method, and a core that knows none of them by name."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest

import ingraft.adapt
from ingraft.methods import registry

ADAPT = sorted(Path(inspect.getsourcefile(ingraft.adapt) or "").parent.rglob("*.py"))
METHODS = Path(inspect.getsourcefile(registry) or "").parent
METHOD_FILES = {
    name: METHODS / f"{record.target.partition(':')[0].rpartition('.')[2]}.py"
    for name, record in registry.records().items()
    if record.target.startswith("ingraft.methods.")
}
"""The file of every method of this package."""
APART = {"contract", "config", "layout", "registry"}
"""What every method stands on; counted with neither the methods nor the helpers."""
HELPERS = sorted(set(METHODS.glob("*.py")) - set(METHOD_FILES.values()) - {METHODS / f"{name}.py" for name in APART})
"""Maths and file layouts that several methods share."""
SEAM = {"contract", "registry"}
"""What the core may import from `methods/`."""


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def test_method_files_average_at_most_110_lines() -> None:
    """The file that each record names, each counted once, over the number of methods."""
    sizes = {path.name: lines(path) for path in METHOD_FILES.values()}
    assert max(sizes.values()) <= 150, sizes
    mean = sum(sizes.values()) / len(METHOD_FILES)
    print(f"{len(METHOD_FILES)} methods in {len(sizes)} files: {mean:.1f} lines each, {max(sizes.values())} at most")
    assert mean <= 110, sizes


def test_what_methods_share_stays_small() -> None:
    """The helper files are counted by themselves: what a method saves by them is not hidden in the average."""
    sizes = {path.name: lines(path) for path in HELPERS}
    print(f"{len(sizes)} helper files: {sum(sizes.values())} lines, {max(sizes.values())} at most")
    assert sum(sizes.values()) <= 1150, sizes
    assert max(sizes.values()) <= 150, sizes


def test_every_file_is_counted_once() -> None:
    """Methods, helpers and what all stand on are all of the folder, and every method's file is there."""
    parts = [set(METHOD_FILES.values()), set(HELPERS), {METHODS / f"{name}.py" for name in APART}]
    assert set.union(*parts) == set(METHODS.glob("*.py"))
    assert sum(map(len, parts)) == len(set.union(*parts))


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
