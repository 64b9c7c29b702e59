"""Frozen weights kept in packed blocks.

`blocks.py` says what a format is, one small file each describes the formats, `layers.py` are the layers that compute with them. How a model
comes to have such layers: `load.py` (quantised on the way in) and `keep.py` (a GGUF's own blocks).
"""
