"""Bases with packed weights: the same base, only held otherwise."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from ingraft import adapt, bases
from ingraft.adapt.building import facts_of
from ingraft.adapt.files.fingerprint import fingerprint
from ingraft.errors import IngraftError
from ingraft.methods.lora import LoraConfig
from ingraft.quant.formats import FILE_FORMATS, QUANTISERS
from ingraft.quant.layers import Packed, QuantizedEmbedding, QuantizedLinear, embedding_class
from tiny_gguf import UNREADABLE, write_gguf

X = torch.tensor([[1, 3, 4, 5, 2]])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))


def _with_tokenizer(folder: Path) -> Path:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        attention_bias=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    return _with_tokenizer(tmp_path / "llama")


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_base_is_quantised_while_it_is_loaded(llama: Path, name: str, dtype: str) -> None:
    """Every linear layer of the blocks is packed as its own weight packs, biases and everything else are as they were, and no mark of a
    quantised model is left that others would act on."""
    dense = bases.load_base(str(llama), dtype=dtype, task="sft").model
    model = bases.load_base(str(llama), dtype=dtype, task="sft", quantization=name).model
    packed = {path for path, module in model.named_modules() if isinstance(module, Packed)}
    assert len(packed) == 14 and all(path.startswith("model.layers.") for path in packed)
    for path in packed:
        layer, original = model.get_submodule(path), dense.get_submodule(path)
        assert torch.equal(layer.weight, QUANTISERS[name].quantise(original.weight))
        assert original.bias is None or torch.equal(layer.bias, original.bias)
    for path, parameter in dense.named_parameters():
        if path.rpartition(".")[0] not in packed:
            assert torch.equal(model.get_parameter(path), parameter)
    adapt.make_dense(dense)
    assert model.dtype is dense.dtype and not getattr(model, "is_quantized", False)
    assert not hasattr(model.config, "quantization_config") and not hasattr(model, "hf_quantizer")
    assert model(X).logits.dtype is dense.dtype and torch.isfinite(model(X).logits).all()


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells which files are mapped")
def test_the_file_of_a_packed_base_is_let_go(llama: Path) -> None:
    """In the dtype of the file, biases, norms and embeddings would be views of the mapped file, whose pages count as this process's memory."""
    base = bases.load_base(str(llama), dtype="float32", task="sft", quantization="nf4")
    assert str(llama) not in Path("/proc/self/maps").read_text()
    assert base.model.lm_head.weight.shape == (8, 64)


@pytest.mark.parametrize("name", QUANTISERS)
def test_it_stays_the_same_base(llama: Path, name: str, tmp_path: Path) -> None:
    """A quantised base has the fingerprint of the base it came from, so that its adapters fit that base in any precision; and the weight as it
    was can be read again."""
    dense = bases.load_base(str(llama), dtype="bfloat16", task="sft").model
    model = bases.load_base(str(llama), dtype="bfloat16", task="sft", quantization=name).model
    mine, theirs = fingerprint(model), fingerprint(dense)
    assert mine == theirs
    adapt.attach(model, LoraConfig(r=2, init_lora_weights=False), "a")
    adapt.merge(model)
    assert fingerprint(model) == theirs
    adapt.unmerge(model)
    adapt.save(model, tmp_path / "a", "a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adapt.load(dense, tmp_path / "a", "a")
    path = "model.layers.1.mlp.down_proj"
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(each(X).logits, model(X).logits)
        facts = facts_of(each, path, each.get_submodule(path), "weight")
        assert facts.original is not None and facts.W is not None and facts.shape == (64, 96)
        original = dense.get_submodule(path).weight
        assert torch.equal(facts.original().bfloat16(), original)
        assert not torch.equal(facts.W, original) and float((facts.W - original).norm() / original.norm()) < 0.2


def test_gpt2_is_quantised_as_it_multiplies(tmp_path: Path) -> None:
    """GPT-2 stores its matrices the other way round; packed, they compute what the dense ones do, and the fingerprint is unchanged."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=8, n_embd=64, n_layer=2, n_head=2, n_positions=32)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    folder = str(_with_tokenizer(tmp_path / "gpt2"))
    dense = bases.load_base(folder, dtype="float32", task="sft").model
    model = bases.load_base(folder, dtype="float32", task="sft", quantization="int8").model
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 8
    with torch.no_grad():
        expected = dense(X).logits
        assert float((model(X).logits - expected).norm() / expected.norm()) < 0.02
    assert fingerprint(model) == fingerprint(dense)
    path = "transformer.h.0.mlp.c_fc"
    facts = facts_of(model, path, model.get_submodule(path), "weight")
    assert facts.original is not None and torch.equal(facts.original().T, dense.get_submodule(path).weight)


def test_what_the_files_lack_stays_dense(tmp_path: Path) -> None:
    """A classifier's fresh head and a pooler that the base's files lack are drawn at random and trained: neither is packed."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=8, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    BertModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "bert")
    folder = str(_with_tokenizer(tmp_path / "bert"))
    base = bases.load_base(folder, dtype="float32", task="classify", num_labels=3, quantization="nf4")
    assert set(base.fresh) == {"bert.pooler.dense", "classifier"}
    assert all(type(base.model.get_submodule(path)) is torch.nn.Linear for path in base.fresh)
    assert sum(isinstance(module, QuantizedLinear) for module in base.model.modules()) == 12
    assert torch.isfinite(base.model(X).logits).all()


# ------------------------------------------------------------------------------------------------------------------------ a GGUF's own blocks


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gguf_keeps_its_blocks(tmp_path: Path, tied: bool, dtype: str) -> None:
    """Kept in its blocks a GGUF computes bit for bit what it computes unpacked, is the same base to an adapter, and takes the file's size."""
    file = write_gguf(tmp_path / "x.gguf", ["Q4_1", "Q8_0", "Q4_0", "F16", "BF16", "F32"], tied=tied)
    dense = bases.load_base(str(file), dtype=dtype, task="sft")
    kept = bases.load_base(str(file), dtype=dtype, task="sft", quantization="keep")
    model = kept.model
    assert torch.equal(model(X).logits, dense.model(X).logits)
    assert {module.form.name for module in model.modules() if isinstance(module, Packed)} == {"Q4_0", "Q4_1", "Q8_0"}
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert isinstance(model.lm_head, QuantizedLinear)
    mine, theirs = fingerprint(model), fingerprint(dense.model)
    assert {**mine, "name": None} == {**theirs, "name": None}
    assert kept.tokenizer("ab").input_ids == dense.tokenizer("ab").input_ids
    assert model.generation_config.eos_token_id == dense.model.generation_config.eos_token_id


def test_adapters_on_a_kept_embedding_and_a_kept_head(tmp_path: Path) -> None:
    """An embedding looked up row by row and a head multiplied piece by piece are hosts: active, merged and saved they agree with the dense
    twin; a tie is refused or undone as on a dense base."""
    file = write_gguf(tmp_path / "x.gguf", ["Q8_0"])
    model = bases.load_base(str(file), dtype="float32", quantization="keep").model
    dense = bases.load_base(str(file), dtype="float32").model
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=("embed_tokens", "lm_head", "q_proj"))
    for each in (model, dense):
        with pytest.warns(UserWarning, match="shares its weight"):
            adapt.attach(each, config, "a", seed=1)
    expected = dense(X).logits
    assert torch.allclose(model(X).logits, expected, atol=1e-5)
    loss = model(X).logits.square().mean()
    loss.backward()
    dense(X).logits.square().mean().backward()
    for mine, theirs in zip(adapt.parameters(model, "a").values(), adapt.parameters(dense, "a").values(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)
    with pytest.raises(IngraftError, match="untie=True"):
        adapt.merge(model)
    adapt.merge(model, untie=True)
    assert torch.allclose(model(X).logits, expected, atol=1e-4)
    adapt.unmerge(model)
    assert isinstance(model.model.embed_tokens, QuantizedEmbedding)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapt.merge(model, untie=True)
    adapt.detach(model, keep_merged=True)
    assert adapt.make_dense(model) == 12
    model.save_pretrained(tmp_path / "plain")
    plain = LlamaForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    assert torch.allclose(plain(X).logits, expected, atol=1e-4)


class Scaled(torch.nn.Embedding):
    """An embedding with a forward of its own, as Gemma's."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes, padding_idx=0)
        self.register_buffer("scale", torch.tensor(3.0), persistent=False)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.scale.to(self.weight.dtype)


def test_an_embedding_with_a_forward_of_its_own_keeps_it() -> None:
    """Packed, an embedding that scales what it looks up still does: bare, adapted, merged, copied and pickled."""
    form = FILE_FORMATS["Q8_0"]
    layer = Scaled(6, 32)
    raw = torch.from_numpy(gguf.quants.quantize(layer.weight.detach().numpy(), GGMLQuantizationType.Q8_0))
    packed = embedding_class(Scaled)(form, layer)
    packed.weight = torch.nn.Parameter(form.pack(raw), requires_grad=False)
    assert isinstance(packed, Scaled) and type(packed).__name__ == "Scaled"
    with torch.no_grad():
        layer.weight.copy_(packed.unpacked())
    ids = torch.tensor([[5, 0, 2], [2, 2, 1]])
    for each in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(each(ids), layer(ids))
    model, dense = torch.nn.Sequential(packed), torch.nn.Sequential(layer)
    for each in (model, dense):
        adapt.attach(each, LoraConfig(r=2, init_lora_weights=False, target_modules=("0",)), "a", seed=1)
    assert torch.allclose(model(ids), dense(ids)) and not torch.allclose(model(ids), packed.inner.forward(layer, ids))
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids), model(ids))
    active = model(ids)
    adapt.merge(model)
    assert torch.allclose(model(ids), active, atol=1e-5)
    adapt.unmerge(model)
    assert torch.equal(model(ids), active)


def test_what_cannot_be_kept_is_refused_with_what_can(tmp_path: Path, llama: Path) -> None:
    """A base that is no GGUF, an unknown architecture, types that cannot be read and a classifier: each refused by name, all in one message."""
    with pytest.raises(IngraftError, match="this base is no GGUF"):
        bases.load_base(str(llama), quantization="keep")
    odd = write_gguf(tmp_path / "odd.gguf", [*UNREADABLE, "Q8_0"], architecture="bloom")
    with pytest.raises(IngraftError) as caught:
        bases.check_base(str(odd), "keep", "classify")
    text = str(caught.value)
    for words in (
        "not 'bloom'",
        "llama, qwen2",
        *(f"type {kind}" for kind in UNREADABLE),
        "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K",
        "classify",
    ):
        assert words in text, words
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(IngraftError, match="version 0 of GGUF"):
        bases.load_base(str(tmp_path / "x.gguf"), quantization="keep")
    with pytest.raises(IngraftError, match="did you mean 'nf4'"):
        bases.load_base(str(llama), quantization="nf5")


def test_a_quantised_base_is_not_trained_in_full(llama: Path) -> None:
    """Packed blocks hold nothing to train: refused at attach, and the model is as it was."""
    from ingraft.methods.full import FullConfig

    model = bases.load_base(str(llama), dtype="float32", quantization="int8").model
    expected = model(X).logits
    with pytest.raises(IngraftError, match=r"and 13 more: kept in packed blocks"):
        adapt.attach(model, FullConfig())
    with pytest.raises(IngraftError, match=r"down_proj: kept in packed blocks"):
        adapt.attach(model, LoraConfig(target_modules=("q_proj",), modules_to_save=("layers.0.mlp.down_proj",)))
    assert torch.equal(model(X).logits, expected)


def test_a_packed_base_has_as_many_parameters_as_a_dense_one(llama: Path) -> None:
    """Bytes are not counted as numbers, before an adapter is attached and after."""
    dense, packed = (bases.load_base(str(llama), dtype="float32", quantization=how).model for how in ("none", "nf4"))
    count = sum(p.numel() for p in dense.parameters())
    assert adapt.base_size(dense) == adapt.base_size(packed) == count
    adapt.attach(packed, LoraConfig(r=2), seed=1)
    own = sum(p.numel() for p in adapt.parameters(packed, "default").values())
    assert adapt.base_size(packed) == count and adapt.status(packed).total == count + own
