"""A GGUF that is cut, incomplete, mislabelled or damaged leads to a sentence that says so, in every way of holding its weights."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader

from ingraft import bases, durable
from ingraft.bases import dense_gguf, gguf_file
from ingraft.cli.main import main
from ingraft.errors import IngraftError
from tiny_gguf import write_gguf

WAYS = ("none", "nf4", "int8", "keep")
DENSE = WAYS[:3]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "x.gguf", ["Q8_0", "Q4_1"])


def edited(file: Path, old: bytes, new: bytes) -> Path:
    content = file.read_bytes()
    assert content.count(old) == 1 and len(old) == len(new)
    file.write_bytes(content.replace(old, new))
    return file


def blocks(file: Path, count: int) -> Path:
    key = b"llama.block_count" + struct.pack("<I", gguf.GGUFValueType.UINT32)
    return edited(file, key + struct.pack("<I", 2), key + struct.pack("<I", count))


def nothing_kept(cache: Path) -> bool:
    return not [path for path in cache.rglob("*") if path.is_file()]


# -------------------------------------------------------------------------------------------------------- lacking and mislabelled


@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_is_not_there_is_named(whole: Path, cache: Path, way: str) -> None:
    """No weight is drawn at random in place of one that the file lacks: refused by the module's name, and no conversion is kept."""
    edited(whole, b"blk.1.ffn_up.weight", b"blk.1.ffn_xx.weight")
    with pytest.raises(
        IngraftError, match=r"lacks weights that a LlamaForCausalLM needs: model\.layers\.1\.mlp\.up_proj\.weight"
    ):
        bases.load_base(str(whole), dtype="float32", quantization=way)
    assert way == "keep" or nothing_kept(cache)


@pytest.mark.parametrize("way", DENSE)
def test_a_block_too_many_is_refused(whole: Path, cache: Path, way: str) -> None:
    """A header that claims three blocks over the tensors of two is refused with the third's names, a few of them and a count."""
    blocks(whole, 3)
    with pytest.raises(IngraftError, match=r"lacks .*model\.layers\.2\.\S+ and 4 more") as caught:
        bases.load_base(str(whole), dtype="float32", task="sft", quantization=way)
    assert "Fetch it again" in str(caught.value)
    assert nothing_kept(cache)


@pytest.mark.parametrize("way", WAYS)
def test_a_block_too_few_is_refused(whole: Path, cache: Path, way: str) -> None:
    """A header that claims one block over the tensors of two would give a model of half the layers, and no word of it."""
    blocks(whole, 1)
    with pytest.raises(IngraftError, match="the header tells of 1 layers and there are tensors of 2"):
        bases.load_base(str(whole), dtype="float32", quantization=way)
    assert nothing_kept(cache)


def test_nothing_is_kept_where_no_cache_can_be_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a cache the refusal is the same."""
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("INGRAFT_CACHE", str(tmp_path / "file"))
    blocks(whole, 3)
    with pytest.raises(IngraftError, match="lacks weights"):
        bases.load_base(str(whole), dtype="float32")


@pytest.mark.parametrize("architecture", ["gemma2", "qwen3"])
@pytest.mark.parametrize("way", WAYS)
def test_the_tensors_of_another_architecture_are_refused(tmp_path: Path, architecture: str, way: str) -> None:
    """Llama's tensors under another architecture's name: refused with what that one needs, whether absent or of another size."""
    file = write_gguf(tmp_path / "x.gguf", ["Q8_0"], architecture=architecture)
    with pytest.raises(IngraftError, match=r"lacks .*model\.layers\.0\."):
        bases.load_base(str(file), dtype="float32", quantization=way)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_a_head_may_be_tied_or_its_own(tmp_path: Path, way: str, tied: bool) -> None:
    """A file without an output head is whole: the embedding serves."""
    file = write_gguf(tmp_path / "x.gguf", ["Q8_0"], tied=tied)
    model = bases.load_base(str(file), dtype="float32", task="sft", quantization=way).model
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("way", DENSE)
def test_a_classifiers_head_may_be_fresh(whole: Path, way: str) -> None:
    """A head that the task asks for is in no GGUF: it begins at random and is named as fresh."""
    base = bases.load_base(str(whole), dtype="float32", task="classify", num_labels=3, quantization=way)
    assert base.fresh == ("score",)


def test_a_conversion_made_before_this_was_looked_at_is_not_used(whole: Path, cache: Path) -> None:
    """The folders of former conversions may hold random weights under a valid manifest; they have another number."""
    folder = dense_gguf.dense_folder(whole)
    assert int(folder.name.split("-")[1]) >= 2
    assert durable.verify(folder)["facts"]["conversion"] >= 2


# ----------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("tensor", ["blk.1.ffn_down.weight", "output_norm.weight", "token_embd.weight"])
@pytest.mark.parametrize("way", WAYS)
def test_values_that_are_no_numbers_are_damage(whole: Path, cache: Path, way: str, tensor: str) -> None:
    """One scale or value that is NaN or infinite: refused by the tensor's name, and nothing is kept."""
    found = next(one for one in GGUFReader(str(whole)).tensors if one.name == tensor)
    content = bytearray(whole.read_bytes())
    last = found.data_offset + found.n_bytes - GGML_QUANT_SIZES[found.tensor_type][1]  # of the last block
    bad = np.float32(np.inf) if found.tensor_type.name == "F32" else np.float16(np.nan)
    content[last : last + bad.nbytes] = bad.tobytes()
    whole.write_bytes(content)
    with pytest.raises(IngraftError, match=rf"damaged: .*{tensor}"):
        bases.load_base(str(whole), dtype="float32", quantization=way)
    assert nothing_kept(cache)


@pytest.mark.parametrize("name", [*gguf_file.SCALES, "F32", "F16", "BF16", "IQ4_NL"])
def test_scales_tell_what_unpacking_would(name: str) -> None:
    """Looked at by its scales alone, a block of random bytes is sound exactly where unpacking it gives numbers only."""
    kind = GGMLQuantizationType[name]
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (400, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    with np.errstate(all="ignore"):
        if name in ("F32", "F16"):
            values = raw.view(np.dtype("<f4" if name == "F32" else "<f2"))
        else:
            values = gguf.quants.dequantize(raw, kind)
    expected = np.isfinite(values).all(-1)
    assert expected.any() and not expected.all()
    assert [gguf_file.is_finite(row.ravel(), kind) for row in raw] == expected.tolist()


# ----------------------------------------------------------------------------------------------------------------- cut short


CUTS = {"magic": 2, "version": 6, "counts": 20, "key": 40, "words": 500, "tensor table": -600, "padding": -10}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("way", WAYS)
def test_a_file_cut_inside_its_header(whole: Path, cache: Path, way: str, cut: str) -> None:
    """Wherever a header ends too soon the file is said not to be whole, and what to do."""
    place = CUTS[cut] if CUTS[cut] > 0 else GGUFReader(str(whole)).data_offset + CUTS[cut]
    whole.write_bytes(whole.read_bytes()[:place])
    with pytest.raises(IngraftError, match=r"x\.gguf: is not a whole GGUF file.*Fetch it again and compare its size"):
        bases.load_base(str(whole), quantization=way)
    assert nothing_kept(cache)


@pytest.mark.parametrize("cut", [1, 1000, 40_000])
@pytest.mark.parametrize("way", ["none", "keep"])
def test_a_file_cut_inside_its_tensors(whole: Path, cache: Path, way: str, cut: int) -> None:
    """A file shorter than its header says is refused with both sizes and the tensors it lost."""
    size = whole.stat().st_size
    whole.write_bytes(whole.read_bytes()[:-cut])
    with pytest.raises(IngraftError, match=rf"not a whole GGUF file: it has {size - cut:,} bytes.*Fetch it again"):
        bases.load_base(str(whole), quantization=way)
    assert nothing_kept(cache)


def test_every_cut_is_found(whole: Path) -> None:
    """No length short of the whole passes, and the whole does."""
    content = whole.read_bytes()
    dense_gguf.check_gguf(whole)
    for place in [*range(0, GGUFReader(str(whole)).data_offset, 7), *range(3000, len(content), 4999)]:
        whole.write_bytes(content[:place])
        with pytest.raises(IngraftError, match="not a whole GGUF"):
            dense_gguf.check_gguf(whole)


def test_headers_that_say_impossible_things(whole: Path, tmp_path: Path) -> None:
    """An unknown version, a kind of value nobody knows, a width that no block fits: refused as a header that is damaged."""
    content = whole.read_bytes()
    (tmp_path / "zeros.gguf").write_bytes(b"GGUF" + bytes(100))
    key = b"llama.block_count" + struct.pack("<I", 4)
    (tmp_path / "kind.gguf").write_bytes(content.replace(key, key[:-4] + struct.pack("<I", 77)))
    width = b"token_embd.weight" + struct.pack("<IQ", 2, 64)
    assert width in content
    (tmp_path / "width.gguf").write_bytes(content.replace(width, width[:-8] + struct.pack("<Q", 63)))
    (tmp_path / "many.gguf").write_bytes(content[:8] + struct.pack("<Q", 2**63 + 5) + content[16:])
    for name, words in {"zeros": "version 0", "kind": "damaged", "width": "token_embd.weight", "many": "GGUF"}.items():
        with pytest.raises(IngraftError, match=words) as caught:
            dense_gguf.check_gguf(tmp_path / f"{name}.gguf")
        assert "etch it again" in str(caught.value), name


def test_a_file_that_cannot_be_a_base_ends_the_command_with_two(
    whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad input is exit code 2, and no defect of ours."""
    whole.write_bytes(whole.read_bytes()[:300])
    assert main(["chat", "--model", str(whole), "--prompt", "a"]) == 2
    said = capsys.readouterr().err
    assert "not a whole GGUF file" in said and "defect" not in said


def test_whatever_the_reader_trips_over_is_a_sentence(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A slip of the library that reads the file is the file's fault to a user."""
    import transformers

    for slip in (RuntimeError("odd"), struct.error("odd"), TypeError("odd")):

        def fails(*_: object, slip: Exception = slip, **__: object) -> None:
            raise slip

        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", fails)
        with pytest.raises(IngraftError, match=r"cannot read this GGUF: .*odd"):
            dense_gguf.dense_folder(whole)
    assert not list(whole.parent.rglob("*.tmp"))
