"""Formats of packed blocks: what comes out is what the definition says, to the bit, whoever packed it."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from ingraft.quant import blocks
from ingraft.quant.blocks import dequantise
from ingraft.quant.formats import FILE_FORMATS, FORMATS, QUANTISERS
from ingraft.quant.layers import QuantizedLinear
from ingraft.quant.nf4 import LEVELS

NF4, INT8 = QUANTISERS["nf4"], QUANTISERS["int8"]
SHAPES = ((48, 64), (24, 16), (5, 7), (300, 100), (40, 1024))


def raw_blocks(name: str, rows: int, width: int) -> np.ndarray:
    """A file's bytes of a matrix: packed by `gguf` where it can, drawn with sensible scales where it cannot."""
    form, numbers = FILE_FORMATS[name], np.random.default_rng(3)
    kind = GGMLQuantizationType[name]
    try:
        return gguf.quants.quantize(numbers.standard_normal((rows, width)).astype(np.float32), kind)
    except NotImplementedError:
        raw = numbers.integers(0, 256, (rows, width // form.block, form.bytes), dtype=np.uint8)
        for at in {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]:
            raw[..., at : at + 2] = numbers.random(raw.shape[:2]).astype(np.float16)[..., None].view(np.uint8)
        return raw.reshape(rows, -1)


@pytest.mark.parametrize("name", FILE_FORMATS)
def test_a_files_blocks_come_out_as_the_gguf_package_reads_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of a GGUF's block is the very float32 that the format's own package computes; whole, by rows, and in pieces."""
    raw = raw_blocks(name, 24, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(raw, GGMLQuantizationType[name]))
    form = FILE_FORMATS[name]
    packed = form.pack(torch.from_numpy(raw))
    assert tuple(packed.shape) == form.packed_shape((24, 512)) and packed.numel() == raw.size
    assert torch.equal(form.values(packed, (24, 512), 0, 24), expected)
    assert torch.equal(form.values(packed, (24, 512), 5, 9), expected[5:9])
    rows = torch.tensor([3, 0, 3, 20])
    assert torch.equal(form.values(packed[rows], (4, 512), 0, 4), expected[rows])
    monkeypatch.setattr(blocks, "PIECE", 2000)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(dequantise(form, packed, (24, 512), dtype), expected.to(dtype))


@pytest.mark.parametrize("name", QUANTISERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_quantised_comes_out_near_it_and_the_same_by_rows(
    name: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matrix comes back within the format's step; a range of rows, blocks straddling its ends or not, is that part of the whole."""
    form = QUANTISERS[name]
    W = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packed = form.quantise(W)
    assert packed.dtype == torch.uint8 and tuple(packed.shape) == form.packed_shape(shape)
    whole = dequantise(form, packed, shape, torch.float32)
    error = float((whole - W).norm() / W.norm())
    assert error < {"nf4": 0.11, "int8": 0.011}[name], error
    for start, stop in ((0, 2), (1, 4), (3, shape[0])):
        assert torch.equal(form.values(packed, shape, start, stop), whole[start:stop])
    monkeypatch.setattr(blocks, "PIECE", shape[1] * 3)
    assert torch.equal(dequantise(form, packed, shape, torch.bfloat16), whole.bfloat16())


@pytest.mark.parametrize("name", QUANTISERS)
def test_zeros_and_a_lone_number_survive(name: str) -> None:
    """A matrix of zeros packs to zeros, and nothing that is not a number appears."""
    form = QUANTISERS[name]
    zeros = torch.zeros(4, 64)
    assert torch.equal(dequantise(form, form.quantise(zeros), (4, 64), torch.float32), zeros)
    zeros[2, 5] = -3.0
    assert torch.isfinite(dequantise(form, form.quantise(zeros), (4, 64), torch.float32)).all()


@pytest.mark.parametrize("shape", [(48, 64), (30, 128), (300, 192)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nf4_is_bitsandbytes_nf4(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Codes and scales are those of bitsandbytes with double quantisation; only where a scale's own code lies within rounding of the middle
    between two may it be the other one, so that the values agree far better than the format resolves."""
    functional = pytest.importorskip("bitsandbytes.functional")
    W = (0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(2))).to(dtype)
    theirs, state = functional.quantize_4bit(W, quant_type="nf4", compress_statistics=True, blocksize=64)
    packed = NF4.quantise(W)
    assert torch.equal(packed[: theirs.numel()], theirs.view(-1))
    mine = dequantise(NF4, packed, shape, torch.float32)
    absmax = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    codes = torch.stack([theirs.view(-1) >> 4, theirs.view(-1) & 15], 1).view(-1).long()
    expected = (torch.tensor(LEVELS)[codes].view(-1, 64) * absmax[:, None]).view(shape)
    assert float((mine - expected).norm() / expected.norm()) < 1e-3
    assert float((mine != expected).float().mean()) < 0.05
    assert torch.equal(dequantise(NF4, packed, shape, dtype), mine.to(dtype))


def test_int8_is_row_wise_absmax() -> None:
    """int8's codes are those of LLM.int8() without outliers: each row's largest magnitude is 127 steps."""
    W = torch.randn(9, 33, generator=torch.Generator().manual_seed(2))
    got = dequantise(INT8, INT8.quantise(W), (9, 33), torch.float32)
    step = W.abs().amax(dim=1, keepdim=True) / 127
    assert torch.allclose(got, (W / step).round() * step, rtol=1e-6)


def test_sizes() -> None:
    """nf4 takes 4.127 bits a weight, int8 a little over 8, and a GGUF's blocks what they take in the file."""
    shape = (1536, 576)
    bits = {
        name: 8 * np.prod(form.packed_shape(shape)) / np.prod(shape)
        for name, form in FORMATS.items()
        if form.block < 256
    }
    assert bits["nf4"] == pytest.approx(4.127, abs=0.002)
    assert bits["int8"] == pytest.approx(8 + 32 / 576)
    assert (bits["Q4_0"], bits["Q4_1"], bits["Q8_0"]) == (4.5, 5.0, 8.5)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_a_layer_compiles_to_one_graph(name: str) -> None:
    """Before any eager call has made the tables, and after one."""
    torch.manual_seed(0)
    form, shape = FORMATS[name], (8, 256)
    packed = (
        QUANTISERS[name].quantise(torch.randn(shape))
        if name in QUANTISERS
        else FILE_FORMATS[name].pack(torch.from_numpy(raw_blocks(name, *shape)))
    )
    blocks._TABLES.clear()
    layer, x = QuantizedLinear(form, shape[1], shape[0], dtype=torch.float32, packed=packed), torch.randn(2, shape[1])
    for _ in range(2):
        torch._dynamo.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()
