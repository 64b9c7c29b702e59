"""Running `ingraft` in a process of its own, where exit codes, signals and imports are what a user gets."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ingraft(tmp_path: Path) -> Run:
    """`ingraft("train", "--help")`, in an empty folder, without a terminal."""

    def run(*words: str, stdin: str = "", cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ingraft.cli.main", *words],
            input=stdin,
            capture_output=True,
            text=True,
            cwd=cwd,
            env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", **env},
            timeout=300,
        )

    return run
