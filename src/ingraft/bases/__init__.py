"""Bases: from a name to a model, dense or packed, that is ready to be adapted."""

from ingraft.bases.catalogue import BASES, BaseRecord, installed
from ingraft.bases.dtypes import as_dtype, default_device, fast_dtype
from ingraft.bases.heads import HEADS, Head
from ingraft.bases.loading import QUANTIZATIONS, Base, check_base, load_base, load_reader, load_tokenizer
from ingraft.bases.places import places, reserve

__all__ = [
    "BASES",
    "HEADS",
    "QUANTIZATIONS",
    "Base",
    "BaseRecord",
    "Head",
    "as_dtype",
    "check_base",
    "default_device",
    "fast_dtype",
    "installed",
    "load_base",
    "load_reader",
    "load_tokenizer",
    "places",
    "reserve",
]
