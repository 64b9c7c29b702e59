"""Laws of leaving: bad input exits with 2 and says everything, Ctrl-C with 130, SIGTERM with 143, and none of them shows a traceback."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from ingraft.cli.main import main

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compare"], ["unknown command 'compare'"]),
        (["trian"], ["did you mean 'train'"]),
        (["train"], ["model: is needed", "data.train: is needed"]),
        (["train", "--modl", "x", "--sed=1"], ["'--model'", "'--seed'"]),
        (["train", "--config", "none.yaml"], ["none.yaml: cannot read"]),
        (
            ["train", "--model", "m", "--data", "d", "--seed", "x", "--task", "diffusion"],
            ["seed: should be", "task: 'diffusion' comes"],
        ),
        (["train", "--model", "m", "--data", "d", "--method", "lorra"], ["did you mean 'lora'"]),
        (
            ["train", "--model", "./none", "--data", "no.jsonl", "--init-adapter", "nowhere", "--seed", "x"],
            ["seed: should be", "./none: there is no such", "no.jsonl does not exist", "there is no nowhere"],
        ),
        (["train", "--model", "./none", "--data", "no.jsonl", "--sed=1"], ["'--seed'", "./none", "no.jsonl"]),
        (["merge"], ["--adapter DIR is needed", "--output-dir DIR is needed"]),
        (["inspect"], ["name an adapter folder"]),
        (["inspect", "--adapter", "none"], ["there is no such folder"]),
        (["methods", "lorra"], ["did you mean 'lora'"]),
        (["eval", "--adapter", "none"], ["there is no such folder"]),
        (["chat", "--adapter", "none"], ["there is no such folder"]),
        (["predict", "--adapter", "none"], ["there is no such folder"]),
        (["data", "--data", "none.jsonl"], ["none.jsonl"]),
    ],
)
def test_bad_input_exits_with_2(
    words: list[str],
    expected: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The code is 2, every problem is named on standard error, there is no traceback and nothing was written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # `main` sets it, for the life of its process
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert "Traceback" not in said.err
    for text in expected:
        assert text in said.err
    assert list(tmp_path.iterdir()) == []


def test_bad_input_ends_a_process_with_2(ingraft: Run, tmp_path: Path) -> None:
    """So it is for the shell, too."""
    done = ingraft("train", "--config", "none.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.yaml: cannot read" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_debug_shows_the_traceback(ingraft: Run) -> None:
    """--debug adds the traceback and changes neither the message nor the code."""
    done = ingraft("train", "--config", "none.yaml", "--debug")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "none.yaml: cannot read" in done.stderr


def test_remote_code_is_never_trusted_by_a_file(ingraft: Run, tmp_path: Path) -> None:
    """A recipe that asks to trust remote code is refused."""
    file = tmp_path / "r.yaml"
    file.write_text("model: m\ndata: d\ntrust_remote_code: true\n")
    done = ingraft("train", "--config", str(file))
    assert done.returncode == 2
    assert "only the command line" in done.stderr


def start(*words: str, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Python in a process of its own."""
    return subprocess.Popen(
        [sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd
    )


WAITING = """
import sys, time
import ingraft.cli.verbs as verbs
def run(context):
    print("ready", flush=True)
    {body}
verbs.cli.invoke = run
from ingraft.cli.main import main
sys.exit(main([]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize(
    "body",
    [
        "time.sleep(60)",
        "\n    try: time.sleep(60)\n    except BaseException as e: raise ImportError('a library hid the interrupt') from e",
        "\n    while True: pass",
    ],
)
def test_a_signal_ends_without_a_traceback(number: int, code: int, body: str) -> None:
    """Ctrl-C and SIGTERM give their codes wherever they land, also where a library turns the exception into another."""
    with start("-c", WAITING.format(body=body)) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05)
        child.send_signal(number)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == code
    assert "Traceback" not in errors


def when_listening(child: subprocess.Popen[str]) -> None:
    """Wait until `main` has its handlers; Python itself has none for SIGTERM."""
    status = Path(f"/proc/{child.pid}/status")
    if not status.exists():  # no Linux
        time.sleep(0.5)
        return
    for _ in range(3000):
        caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt"))
        if int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.0, 0.4, 0.9])
def test_a_signal_while_importing(number: int, code: int, delay: float, tmp_path: Path) -> None:
    """Torch and transformers are being imported: the same codes, at whatever moment, without an abort in compiled code."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"instruction": "a", "output": "b"}) + "\n")
    words = ["train", "--model", str(tmp_path / "none"), "--data", str(tmp_path / "rows.jsonl")]
    with start("-m", "ingraft.cli.main", *words, cwd=tmp_path) as child:
        when_listening(child)
        time.sleep(delay)
        child.send_signal(number)
        _, errors = child.communicate(timeout=60)
    # A quick machine has found the missing model by then and says 2, or is ending already.
    assert child.returncode in (code, 2, -number), errors
    assert "Traceback" not in errors


# What torch's own C++ does as it loads: it calls Python, and an exception from there is more than it can pass on.
LOADING = """
import sys, time, types
from importlib import abc, machinery
class Loader(abc.Loader, abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        return machinery.ModuleSpec(name, self) if name == "compiled_part" else None
    def exec_module(self, module):
        print("ready", flush=True)
        try:
            time.sleep(60)
        except BaseException:
            import os
            os.abort()
sys.meta_path.insert(0, Loader())
import ingraft.cli.verbs as verbs
def run(context):
    import compiled_part
verbs.cli.invoke = run
from ingraft.cli.main import main
sys.exit(main([]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_is_raised_into_an_import(number: int, code: int) -> None:
    """A part that is being loaded never sees the exception, so it cannot abort over it."""
    with start("-c", LOADING) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.05)
        child.send_signal(number)
        _, errors = child.communicate(timeout=30)
    assert child.returncode == code, errors
    assert errors in ("ingraft: interrupted.\n", "ingraft: stopped by SIGTERM.\n")


def test_a_reader_that_leaves_is_no_error() -> None:
    """`ingraft models | head -1` is quiet."""
    with start("-m", "ingraft.cli.main", "models") as child:
        assert child.stdout is not None
        child.stdout.close()
        assert child.stderr is not None
        errors = child.stderr.read()
    assert errors == ""
    assert child.returncode == 0


def test_a_defect_of_ours_is_called_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """An unexpected exception is code 1, says so, and shows its traceback only with --debug."""
    import ingraft.cli.verbs as verbs

    def broken(_: object) -> None:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(verbs.cli, "invoke", broken)
    assert main([]) == 1
    text = capsys.readouterr().err
    assert "a defect of ours: ZeroDivisionError: oops" in text
    assert "Traceback" not in text
    assert main(["--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_handlers_are_put_back() -> None:
    """Calling `main` from Python leaves the process's signal handlers as they were."""
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("words", [["methods", "lora"], ["models"]])
def test_json_is_one_document(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """With --json standard output is one JSON document and nothing else."""
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
