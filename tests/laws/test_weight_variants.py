"""Options that change what a method on weights is made of, held to the same laws: cores, full and halved factors, sparse banks, shards, odd sizes."""

from __future__ import annotations

from typing import Any

import pytest

from ingraft.methods import registry
from ingraft.testing import SUBJECTS, Row, check_method

NUMBERS = [1, 2, 4, 5, 6, 7, 21, 22]
CALLS = [9, 10, 12]
"""Laws of who acts when, which options of how a weight changes do not touch: tried on request."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "loha-above-the-thin-llama": ("loha", {"r": 4, "alpha": 8, "rank_pattern": {"down_proj": 2}}),
    "loha-cores-conv2d": ("loha", {"r": 3, "alpha": 30, "use_effective_conv2d": True}),
    "loha-cores-conv1d": ("loha", {"r": 3, "alpha": 30, "use_effective_conv2d": True}),
    "lokr-halved-llama": ("lokr", {"r": 1, "decompose_both": True, "decompose_factor": 8}),
    "lokr-lycoris-linear": ("lokr", {"r": 3, "init_weights": "lycoris", "decompose_factor": 3}),
    "lokr-cores-conv2d": ("lokr", {"r": 1, "alpha": 4, "use_effective_conv2d": True, "decompose_factor": 2}),
    "lokr-cores-conv1d": ("lokr", {"r": 1, "alpha": 60, "use_effective_conv2d": True, "decompose_factor": 1}),
    "vera-unsaved-bert": ("vera", {"r": 5, "save_projection": False, "projection_prng_key": 8, "d_initial": 0.6}),
    "randlora-sparse-llama": ("randlora", {"r": 5, "randlora_alpha": 8, "sparse": True}),
    "randlora-very-sparse-linear": (
        "randlora",
        {"r": 2, "randlora_alpha": 8, "very_sparse": True, "save_projection": False},
    ),
    "fourierft-all-frequencies-llama": ("fourierft", {"n_frequency": 128, "scaling": 40.0, "random_loc_seed": 3}),
    "fourierft-odd-linear": ("fourierft", {"n_frequency": 60}),
    "c3a-whole-conv1d-transposed": ("c3a", {"block_size": 4, "block_size_pattern": {"second": 16}}),
    "shira-seed-llama": ("shira", {"r": 2, "random_seed": 3}),
    "miss-uneven-llama": ("miss", {"r": 7}),
    "miss-mini-llama": ("miss", {"r": 5, "mini_r": 4, "init_weights": "mini"}),
    "miss-mini-conv2d": ("miss", {"r": 5, "mini_r": 2, "init_weights": "mini"}),
    "miss-bat-llama": ("miss", {"r": 4, "init_weights": "bat"}),
    "hira-gaussian-conv2d": ("hira", {"r": 3, "init_weights": "gaussian"}),
    "gralora-hybrid-llama": ("gralora", {"r": 8, "gralora_k": 4, "hybrid_r": 2, "alpha": 10}),
    "vblora-three-bert": ("vblora", {"r": 2, "num_vectors": 5, "vector_length": 8, "topk": 3}),
}
"""Name, ending in a subject's -> method and options."""


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        pytest.param(name, numbers, id=f"{name}-{kind}", marks=marks)
        for name in VARIANTS
        for kind, numbers, marks in (("weights", NUMBERS, ()), ("calls", CALLS, pytest.mark.study))
    ],
)
def test_a_variant_keeps_every_law(name: str, numbers: list[int]) -> None:
    method, options = VARIANTS[name]
    subject = max((subject for subject in SUBJECTS if name.endswith("-" + subject)), key=len)
    row = Row(config=registry.make_config(method, options))
    assert check_method(row, subjects=[SUBJECTS[subject]], numbers=numbers, study=True) > (
        10 if numbers is NUMBERS else 2
    )
