"""What a base reads rows with: a tokenizer, or an image processor. The name of the two together; for annotations only."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ingraft.bases.images import ImageReader

    Reader = PreTrainedTokenizerBase | ImageReader
