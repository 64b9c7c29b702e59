"""Rows and questions longer than a base with learned positions can read, whose tokenizer declares no limit: cut, answered or refused, never a crash."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from ingraft.cli.main import main

PLACES = 24
WORDS = ["<unk>", "</s>", "user", "assistant", "good", "bad", "film"]
TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gpt2/` and `bert/` with 24 places and a tokenizer without a limit; `rows.jsonl`, up to 40 words long, and a run on the short ones."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    home = tmp_path_factory.mktemp("long")
    torch.manual_seed(0)
    GPT2LMHeadModel(
        GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=PLACES, bos_token_id=1, eos_token_id=1)
    ).save_pretrained(home / "gpt2")
    BertForMaskedLM(
        BertConfig(
            vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=PLACES, pad_token_id=1,
        )
    ).save_pretrained(home / "bert")  # fmt: skip
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    made.chat_template = TEMPLATE
    for name in ("gpt2", "bert"):
        made.save_pretrained(home / name)
    rows = [{"text": f"{'film ' * (n * 2)}{word}", "label": word} for n in range(1, 21) for word in ("good", "bad")]
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "short.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:12]))
    assert main(["train", *train(home, "gpt2", "sft"), "--output-dir", str(home / "talk")]) == 0
    return home


def train(home: Path, base: str, task: str) -> list[str]:
    options = ["--model", str(home / base), "--task", task, "--data", str(home / "rows.jsonl"), "--data.eval", "8"]
    return [*options, "--max-steps", "1", "--dtype", "float32", "--per-device-train-batch-size", "4"]


def test_training_cuts_rows_to_the_places(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *train(home, "bert", "classify"), "--output-dir", str(tmp_path / "run")]) == 0
    assert f"max_length lowered from 512 to {PLACES}" in capsys.readouterr().err


def test_data_shows_rows_that_are_used(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row of which nothing is left within the places is named as dropped and not shown; where all are, raising a length is no advice."""
    rows = [json.dumps({"instruction": "film " * n, "output": "good"}) for n in (30, 2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    words = ["data", "--model", str(home / "gpt2"), "--data.eval", "0", "--data", str(tmp_path / "rows.jsonl")]
    assert main(words) == 0
    assert "dropped" not in capsys.readouterr().out, "the prompt loses its middle before an answer goes"
    words += ["--data.truncation", "keep_start"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert f"dropped, nothing to learn within max_length: 1 rows ({tmp_path / 'rows.jsonl'}:1)" in said
    assert f"{tmp_path / 'rows.jsonl'}:2  (2 learned)" in said
    (tmp_path / "rows.jsonl").write_text(rows[0])
    assert main(words) == 2
    assert "Shorten the prompts" in capsys.readouterr().err


def test_eval_and_merge_cut_rows_to_the_places(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--adapter", str(home / "talk"), "--data", str(home / "rows.jsonl")]
    assert main(["eval", *words, "--data.max-length", "100"]) == 0
    assert f"max_length lowered from 100 to {PLACES}" in capsys.readouterr().out
    assert main(["merge", *words, "--output-dir", str(tmp_path / "merged")]) == 0


def test_predict_answers_within_the_places_and_refuses_what_has_none(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.jsonl"
    words = ["predict", "--adapter", str(home / "talk"), "--output", str(target)]
    assert main([*words, "--data", str(home / "short.jsonl")]) == 0
    assert "12 rows have room for fewer than 128 new tokens" in capsys.readouterr().out
    assert len(target.read_text().splitlines()) == 12
    assert main([*words, "--data", str(home / "rows.jsonl"), "--overwrite"]) == 2
    said = capsys.readouterr().err
    assert f"22 of 40 rows leave no room for an answer: the base has places for {PLACES} tokens" in said
    assert "rows.jsonl:19: its prompt takes 24 tokens" in said


def test_chat_answers_within_the_places_and_refuses_what_has_none(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["chat", "--adapter", str(home / "talk")]
    assert main([*words, "--prompt", "film " * 18]) == 0
    capsys.readouterr()
    assert main([*words, "--prompt", "film " * 21]) == 2
    assert f"the question takes 24 tokens and the base has places for {PLACES}" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO("film\n" * 4 + "film " * 30 + "\nfilm\n"))
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "its oldest turn was dropped" in said
    assert "the question takes 33 tokens" in said
