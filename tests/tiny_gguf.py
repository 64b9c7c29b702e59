"""A Llama of a few thousand weights in a GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter

UNREADABLE = ("IQ4_NL", "MXFP4")
"""Types that packed layers do not know."""


def write_gguf(path: Path, kinds: list[str], architecture: str = "llama", tied: bool = True) -> Path:
    """A Llama in a GGUF file whose matrices take these types in turn."""
    out = GGUFWriter(str(path), architecture)
    width, hidden, heads, layers = 64, 96, 4, 2
    out.add_block_count(layers)
    out.add_context_length(64)
    out.add_embedding_length(width)
    out.add_feed_forward_length(hidden)
    out.add_head_count(heads)
    out.add_head_count_kv(2)
    out.add_layer_norm_rms_eps(1e-6)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(8)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("default")
    out.add_token_list(["<unk>", "<s>", "</s>", "a", "b", "c", "d", "ab"])
    out.add_token_types([2, 3, 3, 1, 1, 1, 1, 1])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    numbers, turn = np.random.default_rng(0), iter(kinds * 100)

    def put(name: str, *shape: int) -> None:
        values = numbers.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            out.add_tensor(name, values)
            return
        kind = GGMLQuantizationType[next(turn)]
        if kind.name in UNREADABLE:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            raw = np.zeros((shape[0], shape[1] // 32 * size), dtype=np.uint8)
        else:
            raw = gguf.quants.quantize(values / shape[1] ** 0.5, kind)
        out.add_tensor(name, raw, raw_dtype=kind)

    put("token_embd.weight", 8, width)
    put("output_norm.weight", width)
    if not tied:
        put("output.weight", 8, width)
    for n in range(layers):
        for name, rows in (("attn_q", width), ("attn_k", width // 2), ("attn_v", width // 2), ("attn_output", width)):
            put(f"blk.{n}.{name}.weight", rows, width)
        put(f"blk.{n}.ffn_gate.weight", hidden, width)
        put(f"blk.{n}.ffn_up.weight", hidden, width)
        put(f"blk.{n}.ffn_down.weight", width, hidden)
        put(f"blk.{n}.attn_norm.weight", width)
        put(f"blk.{n}.ffn_norm.weight", width)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
