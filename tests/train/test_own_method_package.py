"""A package outside the repository brings a method: by its entry point alone it is in lists, recipes and files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_method"
Make = Callable[..., dict[str, Any]]


def test_an_installed_package_adds_a_method(recipe: Make, tmp_path: Path) -> None:
    site = tmp_path / "site"
    about = site / "ingraft_gain-1.dist-info"
    about.mkdir(parents=True)
    shutil.copy(EXAMPLE / "ingraft_gain.py", site)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: ingraft-gain\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[ingraft.methods]\ngain = ingraft_gain:RECORD\n")

    def ingraft(*words: str, installed: bool = True) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([*([str(site)] if installed else []), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "ingraft.cli.main", *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
        )

    listed = ingraft("methods", "--json")
    assert "gain" in [one["name"] for one in json.loads(listed.stdout)], listed.stdout + listed.stderr
    values = recipe(method="gain", method_config={}, max_steps=4, output_dir=str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    done = ingraft("train", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    scored = ingraft("eval", "--adapter", str(tmp_path / "run"), "--json")
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert json.loads(scored.stdout)["eval"]["loss"] == metrics["after"]["loss"] < metrics["before"]["loss"]
    without = ingraft("eval", "--adapter", str(tmp_path / "run"), installed=False)
    assert without.returncode == 2 and "gain" in without.stderr
