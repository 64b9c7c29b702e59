"""How many tokens a base can read at once, as its config declares it.

A tokenizer often declares no limit, and then nothing stops a row that a table of learned positions has no entry for: the lookup fails in the
middle of a run. So `load_tokenizer` holds every tokenizer to its base, and whoever asks `tokenizer.model_max_length` gets a number that the
model can keep. Rotary positions would go on behind the declared number, into distances that the model never saw; they are held to it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from ingraft.bases.reading import Reader

ENDLESS = 1 << 30
"""For bases that declare no number: relative biases, recurrences."""

COUNTING_FROM_PADDING = frozenset(
    {
        "altclip_text_model",
        "bridgetower_text_model",
        "camembert",
        "clap_text_model",
        "data2vec-text",
        "ibert",
        "layoutlmv3",
        "lilt",
        "longformer",
        "luke",
        "markuplm",
        "mpnet",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
        "xlm-roberta-xl",
        "xmod",
    }
)
"""RoBERTa and its kin: their first token stands behind the padding's place, so the places up to there hold no token."""


def places(config: Any) -> int:
    """The most tokens, virtual ones counted, that a model of this config has places for; `ENDLESS` where it declares no number."""
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    found = getattr(text, "max_position_embeddings", None)
    if found is None and not hasattr(text, "relative_attention_num_buckets"):  # T5 declares n_positions and has none
        found = getattr(text, "n_positions", None)
    if not isinstance(found, int) or found < 1:  # XLNet says -1
        return ENDLESS
    if _counts_from_padding(text):
        padding = getattr(text, "pad_token_id", None)
        return found - (1 if padding is None else padding) - 1
    return found


def _counts_from_padding(config: Any) -> bool:
    kind = getattr(config, "model_type", "")
    if kind == "esm":  # newer members of the family are rotary
        return getattr(config, "position_embedding_type", "absolute") == "absolute"
    return kind in COUNTING_FROM_PADDING


def reserve(tokenizer: Reader, virtual: int) -> None:
    """Keep places free for the virtual tokens that an adapter adds to every row.

    Raises:
        IngraftError: nothing would be left for the row.
    """
    if not virtual or tokenizer.model_max_length >= ENDLESS:
        return
    if tokenizer.model_max_length - virtual < 2:
        raise IngraftError(
            f"{virtual} virtual tokens leave no room for a row: the base has places for {tokenizer.model_max_length} tokens. "
            "Use fewer, or a method without them."
        )
    tokenizer.model_max_length -= virtual
