"""`import ingraft` is cheap, and its names are there when asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ingraft
from ingraft.methods.registry import records


def test_importing_the_package_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys, ingraft\n"
        "dir(ingraft)\n"
        "assert not {'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules), sorted(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_every_method_s_config_is_a_public_name() -> None:
    for record in records().values():
        assert getattr(ingraft, record.config).method == record.name
        assert record.config in dir(ingraft)
    with pytest.raises(AttributeError, match="no attribute 'LoraConfg'"):
        _ = ingraft.LoraConfg  # type: ignore[attr-defined]
