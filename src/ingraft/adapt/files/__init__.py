"""Adapters on the disk: folders of our own and PEFT's, and the files of AdapterHub, kohya-ss, LyCORIS and diffusers."""

from ingraft.adapt.files.fingerprint import base_of
from ingraft.adapt.files.folders import CONFIG, WEIGHTS
from ingraft.adapt.files.loading import load
from ingraft.adapt.files.tensors import read_header
from ingraft.adapt.files.writing import save, save_members, save_resumable, serialised

__all__ = [
    "CONFIG",
    "WEIGHTS",
    "base_of",
    "load",
    "read_header",
    "save",
    "save_members",
    "save_resumable",
    "serialised",
]
