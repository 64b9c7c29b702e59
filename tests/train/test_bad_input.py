"""What people get wrong in their data: each ends with exit code 2 and a message that names file and line, before a step was made and with nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from ingraft.cli.main import main
from ingraft.errors import IngraftError
from ingraft.train import loop
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
Rows = Sequence[Mapping[str, Any]]

WORDS = ["a", "film", "was", "the", "plot", "it", "i", "very"]
GOOD = [{"text": f"{WORDS[n // 2]} film was {word}", "label": word} for n, word in enumerate(("good", "bad") * 8)]


def chat(*texts: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]}


CASES: dict[str, tuple[Rows, list[str], list[str]]] = {
    "mixed forms": (
        [*GOOD, {"instruction": "a", "output": "good"}],
        [],
        ["rows.jsonl:17: fields 'text' and 'label' are missing", "it is of form instruction", "a file of their own"],
    ),
    "missing labels": (
        [*GOOD, {"text": "a film"}, {"text": "a film", "label": None}, {"text": "a film", "label": ""}],
        ["--task", "classify"],
        ["3 of 19 rows", "rows.jsonl:17: field 'label' is missing", "rows.jsonl:18", "rows.jsonl:19"],
    ),
    "empty texts": ([*GOOD, {"text": " ", "label": "good"}], [], ["rows.jsonl:17: field 'text' is empty"]),
    "too long": (
        [*GOOD, {"text": "a " * 90, "label": "good"}],
        ["--data.truncation", "refuse"],
        ["1 of", "longer than max_length 64", "rows.jsonl:17"],
    ),
    "an answer that is nothing": (
        [chat("a", "good"), chat("it", "")],
        [],
        ["rows.jsonl:2: turn 2", "teach to say nothing"],
    ),
    "nothing is learned": (
        [{"instruction": "a " * 80, "output": "good"}] * 4,
        ["--data.truncation", "keep_start", "--data.eval", "0"],
        ["none of the 4 rows has a learned token within max_length 64"],
    ),
    "one label": (
        [{"text": f"{word} film", "label": "good"} for word in WORDS],
        ["--task", "classify"],
        ["all rows have the one label 'good'"],
    ),
    "unknown words": (
        [{"text": f"какой фильм {n} это", "label": "да"} for n in range(9)],
        [],
        ["of the tokens are unknown to the tokenizer", "limit 5%", "Use a base that does"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_rows_are_told_of(
    case: str, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, words, expected = CASES[case]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loop, "step", lambda *args: pytest.fail("a step was made"))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
    code = main(["train", "--model", str(home / "llama"), "--data", "rows.jsonl", "--output-dir", "run", *words])
    said = capsys.readouterr().err
    assert code == 2, said
    for text in expected:
        assert text in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_a_label_that_training_does_not_have(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, GOOD)))
    (tmp_path / "held.jsonl").write_text("\n".join(map(json.dumps, [GOOD[0], {"text": "the plot", "label": "gud"}])))
    words = ["--data", "rows.jsonl", "--data.eval", "held.jsonl", "--task", "classify"]
    assert main(["train", "--model", str(home / "llama"), "--output-dir", "run", *words]) == 2
    said = capsys.readouterr().err
    assert "held.jsonl:2: label 'gud' is unknown" in said and "bad, good" in said


def test_bytes_that_are_no_text(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(json.dumps(GOOD[0]).encode() + b'\n{"text": "caf\xe9", "label": "good"}\n')
    assert main(["train", "--model", str(home / "llama"), "--data", "rows.jsonl", "--output-dir", "run"]) == 2
    said = capsys.readouterr().err
    assert "rows.jsonl:2: byte 0xe9 at column 14 is not UTF-8" in said


def test_a_file_that_changes_while_a_run_reads_it_changes_nothing_and_a_later_start_is_refused(
    recipe: Make, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are read once. Whoever goes on with a run over other rows is told so."""
    whole = (
        train(recipe(output_dir=str(tmp_path / "whole")), quiet=True).folder / "adapter_model.safetensors"
    ).read_bytes()
    file = tmp_path / "rows.jsonl"
    before = (home / "rows.jsonl").read_text()
    file.write_text(before)
    step = loop.step

    def changing(session: Any, progress: Any, clock: Any, rows: Any) -> Any:
        if progress.step == 5:
            file.write_text("\n".join(map(json.dumps, GOOD * 2)))
        if progress.step == 9 and stops:
            raise KeyboardInterrupt
        return step(session, progress, clock, rows)

    stops = False
    with monkeypatch.context() as patch:
        patch.setattr(loop, "step", changing)
        run = train(recipe(data_train=str(file)), quiet=True)
        assert (run.folder / "adapter_model.safetensors").read_bytes() == whole
        file.write_text(before)
        stops = True
        with pytest.raises(KeyboardInterrupt):
            train(recipe(data_train=str(file), output_dir=str(tmp_path / "again")), quiet=True)
    with pytest.raises(IngraftError, match=r"training rows \(was"):
        train(
            recipe(data_train=str(file), output_dir=str(tmp_path / "again")), resume_from_checkpoint="last", quiet=True
        )


def test_a_tokenizer_without_padding_or_template_will_do(home: Path, tmp_path: Path, recipe: Make) -> None:
    """Padding is masked, whatever it is called; prompts are read as they stand, and the report says so."""
    base = tmp_path / "bare"
    shutil.copytree(home / "llama", base)
    (base / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.pad_token = None
    tokenizer.chat_template = None
    tokenizer.save_pretrained(base)
    file = tmp_path / "turns.jsonl"
    prompts = ("the film was ", "it was a very ")
    file.write_text("\n".join(json.dumps({"prompt": prompts[n % 2], "completion": "good"}) for n in range(12)))
    values = recipe(model=str(base), data_train=str(file), data_eval=0, max_steps=2)
    run = train(values, quiet=True)
    assert run.steps == 2
    said = (run.folder / "report.html").read_text()
    assert "prompts and completions are read as they stand" in said
