"""Stand-ins for what these scripts would download: small models with random weights, a tokenizer and a handful of sentences.

Every script runs in seconds and without a network. To use it in earnest, replace these calls by `from_pretrained` and your own data.
"""

from __future__ import annotations

import itertools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedTokenizerFast,
)

GOOD = ["good", "great", "lovely", "fine"]
BAD = ["bad", "poor", "awful", "dull"]
THINGS = ["film", "book", "meal", "hotel", "song", "game"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORDS = [*SPECIAL, *GOOD, *BAD, *THINGS, "the", "is", "very", "so", ".", "answer", ":", "positive", "negative"]


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, [CLS] and [SEP] around the text, as BERT has it."""
    vocabulary = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
    )


def reviews() -> list[tuple[str, int]]:
    """Sentences with 1 for praise and 0 for blame."""
    rows = itertools.product(THINGS, ["very", "so"], [*GOOD, *BAD])
    return [(f"the {thing} is {how} {word} .", int(word in GOOD)) for thing, how, word in rows]


def bert() -> BertForSequenceClassification:
    """A classifier of two classes."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.1,
    )
    return BertForSequenceClassification(config)


def gpt2() -> GPT2LMHeadModel:
    """A causal language model."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(WORDS),
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=64,
        bos_token_id=2,
        eos_token_id=3,
        pad_token_id=0,
        initializer_range=0.1,
    )
    return GPT2LMHeadModel(config)


def mt5() -> MT5ForConditionalGeneration:
    """An encoder-decoder."""
    torch.manual_seed(0)
    config = MT5Config(
        vocab_size=len(WORDS),
        d_model=64,
        d_ff=128,
        d_kv=16,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return MT5ForConditionalGeneration(config)
