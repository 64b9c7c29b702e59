"""What the settings in AdapterHub's `adapter_config.json` mean.

AdapterHub has one config class for all bottlenecks and one for LoRA and IA3, told apart by flags. A flag that would change what the adapter
computes in a way no method here covers is refused by name; one that is off, or concerns the start of training alone, is passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingraft.errors import IngraftError

BOTTLENECK = {
    "adapter_down.0.weight": "down",
    "adapter_down.0.bias": "down_bias",
    "adapter_up.weight": "up",
    "adapter_up.bias": "up_bias",
}
"""AdapterHub's names of a bottleneck's tensors, and ours."""

STARTS = (
    "init_weights",
    "init_weights_seed",
    "phm_dim",
    "phm_c_init",
    "phm_init_range",
    "phm_rank",
    "phm_bias",
    "learn_phm",
)
"""Settings of the start of training, and of Compacters that are off."""
STARTS += (
    "hypercomplex_nonlinearity",
    "factorized_phm_W",
    "factorized_phm_rule",
    "shared_phm_rule",
    "shared_W_phm",
    "dtype",
)

_BOTTLENECK = ("mh_adapter", "output_adapter", "is_parallel", "original_ln_before", "original_ln_after")
_BOTTLENECK += ("residual_before_ln", "reduction_factor", "non_linearity", "dropout", "scaling")
_FACTORED = (
    "architecture",
    "composition_mode",
    "attn_matrices",
    "selfattn_lora",
    "intermediate_lora",
    "output_lora",
    "r",
    "alpha",
    "dropout",
)


def bottleneck_options(settings: Mapping[str, Any], *, parallel: bool, of_block: bool) -> dict[str, Any] | None:
    """The options of a bottleneck beside the MLP (`parallel`), at the block's output (`of_block`) or behind its projections; None if the settings
    are another's.

    Raises:
        IngraftError: settings that no bottleneck here has.
    """
    if "reduction_factor" not in settings or settings.get("architecture") not in (None, "adapter"):
        return None
    if bool(settings.get("is_parallel")) != parallel or (
        not parallel and bool(settings.get("original_ln_before")) != of_block
    ):
        return None
    problems = _others(settings, _BOTTLENECK)
    attention, output = bool(settings.get("mh_adapter")), bool(settings.get("output_adapter"))
    if (attention if parallel or of_block else False) or not (attention or output):
        problems.append(f"mh_adapter = {attention} with output_adapter = {output}")
    for name in ("reduction_factor", "scaling", "dropout"):
        if not isinstance(settings.get(name, 1.0), int | float):
            problems.append(f"{name} = {settings[name]!r}")
    if settings.get("residual_before_ln", True) is not True and of_block:
        problems.append("residual_before_ln = False")
    if problems:
        raise IngraftError(*(f"AdapterHub's {text} is a bottleneck that no method here covers." for text in problems))
    options = {
        name: settings[name] for name in ("reduction_factor", "non_linearity", "dropout", "scaling") if name in settings
    }
    if not (parallel or of_block):
        options["target_modules"] = (*(("attention-out",) if attention else ()), *(("mlp-out",) if output else ()))
    return options


def factored(settings: Mapping[str, Any], mode: str) -> bool:
    """Whether the settings are of LoRA's class with this mode of composition ("add", "scale").

    Raises:
        IngraftError: they are, with settings that no method here has.
    """
    if settings.get("architecture") != "lora" or settings.get("composition_mode") != mode:
        return False
    problems = _others(settings, _FACTORED)
    problems += [
        f"{name} = {settings.get(name)!r}"
        for name, kind in (("r", int), ("alpha", int | float), ("dropout", int | float))
        if not isinstance(settings.get(name, 0 if name == "dropout" else None), kind)
    ]
    if problems:
        raise IngraftError(*(f"AdapterHub's {text} belongs to no method here." for text in problems))
    return True


def _others(settings: Mapping[str, Any], known: tuple[str, ...]) -> list[str]:
    """Settings that are on and not known."""
    return [
        f"{name} = {value!r}" for name, value in settings.items() if value and name not in known and name not in STARTS
    ]
