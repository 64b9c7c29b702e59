"""One call from paths to encoded data: the parts, the report, and the refusals that only the whole can know."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ingraft import data
from ingraft.data.report import quantiles
from ingraft.errors import IngraftError


def write(path: Path, *values: dict[str, Any]) -> str:
    path.write_text("\n".join(json.dumps(v, ensure_ascii=False) for v in values), encoding="utf-8")
    return str(path)


def test_parts_rows_and_report(tmp_path: Path, chatml: Any) -> None:
    values = [{"instruction": f"q{n}", "output": f"a{n}"} for n in range(40)]
    train = write(tmp_path / "train.jsonl", *values, values[0], {"instruction": "Q" * 300, "output": "A"})
    test = write(tmp_path / "test.jsonl", {"instruction": "q3", "output": "a"}, {"instruction": "other", "output": "a"})
    got = data.load(train, chatml, eval=0.25, test=test, max_length=100, seed=1, truncation="keep_start")
    assert (len(got.parts["train"].rows) + len(got.parts["eval"].rows), len(got.test)) == (42, 2)
    assert got.labels is None
    for name, examples in (("train", got.train), ("eval", got.eval), ("test", got.test)):
        for example in examples:
            asked = got.parts[name].rows[example.row_id].values["instruction"]
            assert f"user\n{asked[:60]}" in chatml.decode(example.input_ids)
    parts = {part.name: part for part in got.report.parts}
    assert sum(part.cut for part in parts.values()) == 1
    assert [place.rsplit(":", 1)[1] for part in parts.values() for place in part.dropped] == ["42"]
    assert sum(part.duplicates for part in parts.values()) == 1
    assert parts["train"].tokens == sum(map(len, got.train))
    assert got.report.shared == ("q3" in {row.values["instruction"] for row in got.parts["train"].rows})
    text = "\n".join(got.report.lines())
    for word in ("format: instruction", "train:", "eval:", "test:", "learned:", "dropped", "duplicates: 1"):
        assert word in text
    assert json.loads(json.dumps(got.report.as_dict()))["format"] == "instruction"


def test_loading_is_pure(tmp_path: Path, chatml: Any) -> None:
    train = write(tmp_path / "train.jsonl", *[{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(30)])
    one, other = (data.load(train, chatml, eval=5, seed=3) for _ in range(2))
    assert (one.train, one.eval, one.report) == (other.train, other.eval, other.report)


def test_classification_end_to_end(tmp_path: Path, bert_like: Any) -> None:
    tokenizer = bert_like("good", "bad", *[f"w{n}" for n in range(40)])
    values = [{"text": f"{'good' if n % 4 else 'bad'} w{n}", "label": int(n % 4 > 0)} for n in range(40)]
    train = write(tmp_path / "train.jsonl", *values)
    got = data.load(train, tokenizer, task="classify", eval=8)
    assert got.labels == ("0", "1")
    assert [part.labels for part in got.report.parts] == [{"1": 24, "0": 8}, {"1": 6, "0": 2}]
    assert "classes: 1 24 (75%), 0 8 (25%)" in "\n".join(got.report.lines())
    kept = data.load(train, tokenizer, task="classify", labels=("1", "0", "2"))
    assert kept.labels == ("1", "0", "2")
    assert kept.train[0].label == 1
    other = write(tmp_path / "eval.jsonl", {"text": "good", "label": 7})
    with pytest.raises(IngraftError, match=r"eval\.jsonl:1: label '7' is unknown"):
        data.load(train, tokenizer, task="classify", eval=other)
    with pytest.raises(IngraftError, match="nothing to tell apart"):
        data.load(other, tokenizer, task="classify")


def test_plain_text_end_to_end(tmp_path: Path, chatml: Any) -> None:
    file = tmp_path / "book.txt"
    file.write_text("\n".join(f"Line {n}." for n in range(50)))
    got = data.load(str(file), chatml, task="lm", eval=0.1, max_length=32)
    assert chatml.decode([t for e in got.eval for t in e.input_ids]).startswith("Line 45.\nLine 46.")
    assert got.report.format == "lines"


def test_rows_of_another_task_are_refused_with_the_right_one(tmp_path: Path, chatml: Any) -> None:
    text = write(tmp_path / "a.jsonl", {"text": "a"}, {"text": "b"})
    with pytest.raises(IngraftError, match=r"task sft needs rows with an answer.*these are text rows.*--task lm"):
        data.load(text, chatml)
    pairs = write(tmp_path / "b.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    with pytest.raises(IngraftError, match=r"these are preference rows.*--task reward` or `--task dpo"):
        data.load(pairs, chatml)
    with pytest.raises(IngraftError, match=r"task 'sfd' \(did you mean 'sft'\?\)"):
        data.load(text, chatml, task="sfd")
    with pytest.raises(IngraftError, match="at least 2"):
        data.load(text, chatml, task="lm", max_length=1)


def test_a_base_that_cannot_read_the_script_is_refused(tmp_path: Path, bert_like: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"text": "很好 good", "label": 1}, {"text": "不好", "label": 0})
    with pytest.raises(
        IngraftError,
        match=r"a\.jsonl: 67% of the tokens are unknown to the tokenizer.*multilingual",
    ):
        data.load(file, bert_like("good"), task="classify")


def test_notes_say_what_was_decided(tmp_path: Path, bare: Any, bert_like: Any) -> None:
    file = write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"})
    assert "read as they stand" in data.load(file, bare).report.notes[0]
    assert "default template" in data.load(file, bare, chat=True).report.notes[0]
    short = bert_like("a", "b")
    short.model_max_length = 4
    rows = write(tmp_path / "b.jsonl", {"text": "a a a a a", "label": 1}, {"text": "b", "label": 0})
    got = data.load(rows, short, task="classify")
    assert (got.report.max_length, max(map(len, got.train))) == (4, 4)
    assert "lowered from 512 to 4" in got.report.notes[0]


def test_preview_of_every_task(tmp_path: Path, chatml: Any, bert_like: Any) -> None:
    row = data.read_rows(write(tmp_path / "a.jsonl", {"text": "good", "label": "yes"}))[0]
    assert data.preview(row, bert_like("good"), task="classify")[-1] == (" → yes", True)
    assert not any(learned for _, learned in data.preview(row, bert_like("good"), task="classify")[:-1])
    line = data.read_rows(write(tmp_path / "b.jsonl", {"text": "good"}))[0]
    assert all(learned for _, learned in data.preview(line, chatml, task="lm"))
    pair = data.read_rows(write(tmp_path / "c.jsonl", {"prompt": "a", "chosen": "good", "rejected": "bad"}))[0]
    for task in ("dpo", "reward"):
        shown = data.preview(pair, chatml, task=task)
        assert "".join(text for text, _ in shown).endswith("good<|im_end|> → \n2. bad")
        assert any(learned for _, learned in shown[:-1]) is (task == "dpo")
    with pytest.raises(IngraftError, match="no preview"):
        data.preview(row, chatml, task="diffusion")


def test_quantiles() -> None:
    assert quantiles([]) == (0, 0, 0, 0)
    assert quantiles([5]) == (5, 5, 5, 5)
    assert quantiles(list(range(101))) == (0, 50, 95, 100)


def test_every_public_name_resolves_and_reading_loads_no_torch(tmp_path: Path) -> None:
    assert all(getattr(data, name) is not None for name in data.__all__)
    with pytest.raises(AttributeError):
        _ = data.nothing
    file = write(tmp_path / "a.jsonl", {"text": "a"})
    code = f"import sys; from ingraft import data; data.detect(data.read_rows({file!r})); print({{'torch', 'transformers'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
