"""The formats by name."""

from __future__ import annotations

from ingraft.quant.blocks import FileFormat, Format, Quantiser
from ingraft.quant.int8 import Int8
from ingraft.quant.nf4 import NF4
from ingraft.quant.q4 import Q4_0, Q4_1
from ingraft.quant.q4_k import Q4_K
from ingraft.quant.q5 import Q5_0, Q5_1, Q5_K
from ingraft.quant.q6_k import Q6_K
from ingraft.quant.q8_0 import Q8_0

QUANTISERS: dict[str, Quantiser] = {form.name: form for form in (NF4(), Int8())}
"""What a base can be brought into while it is loaded."""

FILE_FORMATS: dict[str, FileFormat] = {
    form.name: form for form in (Q4_0(), Q4_1(), Q5_0(), Q5_1(), Q8_0(), Q4_K(), Q5_K(), Q6_K())
}
"""What a GGUF's tensors may be kept in, by ggml's names."""

FORMATS: dict[str, Format] = {**QUANTISERS, **FILE_FORMATS}
