"""What `ingraft predict` takes as a row to answer, what it refuses, and what is left when it is stopped."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ingraft.cli.main import main

WORDS = ["<unk>", "</s>", "user", "assistant", "good", "bad", "film"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("predict")
    torch.manual_seed(0)
    size = {"vocab_size": 8, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(
        LlamaConfig(**size, num_attention_heads=2, max_position_embeddings=64, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(folder)
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)
    return folder


def predict(base: Path, tmp_path: Path, *rows: Any) -> int:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(base), "--data", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    return main(["predict", *words, "--max-new-tokens", "3", "--per-device-eval-batch-size", "2"])


def answered(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


SAME = [
    {"messages": [{"role": "user", "content": "good film"}]},
    {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": ""}]},
    {"messages": [{"role": "user", "content": "good film"}, {"role": "assistant", "content": None}]},
    {"messages": [{"role": "user", "content": "good film"}, {"role": "bot", "content": "bad"}]},
    {"conversations": [{"from": "human", "value": "good film"}]},
    {"conversations": [{"from": "human", "value": "good film"}, {"from": "gpt", "value": "bad"}]},
    {"instruction": "good film"},
    {"instruction": "good film", "output": " "},
    {"prompt": "good film", "completion": None},
]


def test_a_row_is_answered_whether_or_not_its_answer_is_there(base: Path, tmp_path: Path) -> None:
    """However the question is written, and whatever stands where its answer belongs, the model gets the same and the row stays as it was."""
    said: set[str] = set()
    for row in SAME:
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        assert predict(base, tmp_path, row) == 0, row
        (found,) = answered(tmp_path / "out.jsonl")
        said.add(found.pop("prediction"))
        assert found == row
    assert len(said) == 1


@pytest.mark.parametrize("turn", ["hi", None, 3, []])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_what_is_no_turn_is_named_by_file_and_line(
    field: str, turn: Any, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {field: [{"role": "user", "content": "film", "from": "user", "value": "film"}]}
    assert predict(base, tmp_path, good, {field: [turn]}) == 2
    assert f"rows.jsonl:2: turn 1 of '{field}' is " in capsys.readouterr().err


def test_a_field_of_the_answers_name_is_not_overwritten(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(base, tmp_path, {"instruction": "film"}, {"instruction": "film", "prediction": "mine"}) == 2
    assert "rows.jsonl:2: the rows have a field 'prediction' already (1 of 2)" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_was_answered_before_ctrl_c_is_kept_under_another_name(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output file does not appear; the answers made so far do, in the file's order; a second stop takes nothing from the first."""
    rows = [{"id": n, "instruction": "film " * n} for n in range(1, 6)]
    assert predict(base, tmp_path, *rows) == 0
    whole = answered(tmp_path / "out.jsonl")
    (tmp_path / "out.jsonl").unlink()
    proper, left = LlamaForCausalLM.generate, [0]

    def stopping(self: Any, *args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGINT)
        return proper(self, *args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "generate", stopping)
    for batch, name, kept in ((3, "out.jsonl.partial", whole[1:]), (2, "out.jsonl.partial-2", whole[3:])):
        left[0] = batch
        assert predict(base, tmp_path, *rows) == 130
        assert answered(tmp_path / name) == kept, "batches go from the longest row to the shortest"
        said = capsys.readouterr().err
        assert f"interrupted. {len(kept)} of 5 rows were answered; they are in {tmp_path / name}." in said
        assert not (tmp_path / "out.jsonl").exists()
    assert answered(tmp_path / "out.jsonl.partial") == whole[1:]
    left[0] = 1
    assert predict(base, tmp_path, *rows) == 130
    assert "No row was answered yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["data", "--rows", "-3"], ["predict", "--max-new-tokens", "0"], ["chat", "--max-new-tokens", "-1"]]
)
def test_counts_that_cannot_be_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert words[1] in capsys.readouterr().err
