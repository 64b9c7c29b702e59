"""Which base an adapter was trained on, in three digests.

An adapter put into another base of the same shapes computes nonsense without complaint, so every saved adapter carries its base's
fingerprint and loading compares it:

* `config`: what the weights' shapes do not show (kind of model, heads, activation, norm, positions). A list of names rather than the whole
  config, because configs grow fields with every release of transformers and collect run-time settings.
* `tensors`: names and shapes.
* `content`: up to 64 values of each tensor at fixed places, rounded to bfloat16, so that a float32 and a bfloat16 copy of one base agree.
  It takes about 2 ms for a model of 135 million parameters, so the values are looked at anew with every call: neither a tensor's identity nor its
  version shows every change (`.data`). The other two are worked out again only when names, shapes or settings differ from the last ones.

A base that is quantised while it is loaded has the fingerprint of the base it was loaded from: an adapter trained over nf4 belongs to that base,
and fits it in any precision.

Modules that the adapter itself replaces in full (a fresh classification head) are left out: their random start differs from run to run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Collection, Mapping
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from ingraft.adapt.control import require_control
from ingraft.adapt.merging import unmerged
from ingraft.adapt.walk import walked
from ingraft.adapt.weights import kind_of
from ingraft.quant.layers import Origin, places, sampled

FIELDS = frozenset(
    {
        *("model_type", "is_encoder_decoder", "is_decoder", "position_embedding_type", "layer_types", "sliding_window"),
        *("num_attention_heads", "num_heads", "n_head", "num_key_value_heads", "n_heads", "decoder_attention_heads"),
        *(
            "encoder_attention_heads",
            "head_dim",
            "d_kv",
            "scale_attn_weights",
            "query_pre_attn_scalar",
            "attn_logit_softcapping",
        ),
        *("hidden_act", "hidden_activation", "activation_function", "feed_forward_proj", "activation"),
        *(
            "rms_norm_eps",
            "layer_norm_eps",
            "layer_norm_epsilon",
            "norm_epsilon",
            "scale_embedding",
            "final_logit_softcapping",
        ),
        *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor", "relative_attention_num_buckets"),
        *(
            "relative_attention_max_distance",
            "num_experts_per_tok",
            "norm_topk_prob",
            "image_size",
            "patch_size",
            "multi_query",
        ),
    }
)
"""Config entries that change what the same weights compute."""

COMPARED = {
    "config": "the architecture's settings (heads, activation, norms, positions)",
    "tensors": "the names or shapes of the weights",
    "content": "the values of the weights",
}


def fingerprint(model: nn.Module, without: Collection[str] = (), *, as_merged: bool = False) -> dict[str, Any]:
    """The base's fingerprint, whatever is attached or merged.

    Args:
        without: paths of modules to leave out.
        as_merged: of the base with what is merged into it now, for an adapter that stands on that.

    Returns:
        `config`, `tensors`, `content` (hex sha256; None where the model has no config, or no data: the meta device), and for information
        `name` and `dtype`.
    """
    found: dict[str, Tensor] = {}
    packed: dict[str, Origin] = {}
    with nullcontext() if as_merged else unmerged(model):
        for path, module in walked(model).modules.items():
            for name, parameter in module._parameters.items():
                if parameter is None or path in without:
                    continue
                full = f"{path}.{name}" if path else name
                # Packed numbers are bytes, or a tensor of a class of its own.
                numbers = name != "weight" or (type(parameter) is nn.Parameter and parameter.is_floating_point())
                kind = None if numbers else kind_of(module)
                if kind is not None and kind.dense_class is not None:
                    packed[full] = kind.origin_of(module) or _as_it_is(kind.weight_of(module))
                else:
                    found[full] = parameter
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    return {
        "name": name or None,
        "dtype": main_dtype(found.values()),
        "config": _digest(_settings(config.to_dict())) if config is not None and hasattr(config, "to_dict") else None,
        "tensors": _of_shapes(tuple((name, one.shape) for name, one in (*found.items(), *packed.items()))),
        "content": _content(found, packed),
    }


def _as_it_is(weight: Tensor | None) -> Origin:
    """Of a packed weight whose origin is not known: what it says now."""
    assert weight is not None
    return Origin(shape=tuple(weight.shape), sample=sampled(weight))


def base_of(model: nn.Module, name: str) -> dict[str, Any]:
    """What `COMPARED` lists of the fingerprint of the base that an adapter acts on."""
    adapter = require_control(model).require(name)
    found = fingerprint(model, adapter.saved_whole, as_merged=bool(adapter.ground))
    return {field: found[field] for field in COMPARED}


def main_dtype(parameters: Collection[Tensor]) -> str | None:
    """The dtype that all floating parameters share ("bfloat16"), or None where they differ or there are none."""
    kinds = {dtype for dtype in {parameter.dtype for parameter in parameters} if dtype.is_floating_point}
    return str(kinds.pop()).removeprefix("torch.") if len(kinds) == 1 else None


def differences(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints, in words; entries that either side lacks are not compared."""
    return [
        f"{words} ({field})"
        for field, words in COMPARED.items()
        if recorded.get(field) is not None and present.get(field) is not None and recorded[field] != present[field]
    ]


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a config that count, those of its sub-configs included."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and name.endswith("config"):
            found[name] = _settings(cast(Mapping[str, Any], value))
        elif name in FIELDS and value is not None:
            found[name] = value
    return found


@functools.lru_cache(maxsize=8)
def _of_shapes(shapes: tuple[tuple[str, tuple[int, ...]], ...]) -> str:
    """Of names and shapes."""
    return _digest(sorted((name, list(shape)) for name, shape in shapes))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@torch.no_grad()
def _content(parameters: Mapping[str, Tensor], packed: Mapping[str, Origin]) -> str | None:
    if any(parameter.is_meta for parameter in parameters.values()):
        return None
    samples = {name: _bits(origin.sample) for name, origin in packed.items()} | _samples(parameters)
    return hashlib.sha256(b"".join(samples[name] for name in sorted(samples))).hexdigest()


def _bits(sample: Tensor) -> memoryview:
    return sample.cpu().contiguous().view(torch.uint8).numpy().data


def _samples(parameters: Mapping[str, Tensor]) -> dict[str, memoryview]:
    """`sampled` of each parameter. Those of one dtype and device are rounded, and brought to the host, as one tensor."""
    alike: dict[tuple[torch.dtype, str, int], dict[str, Tensor]] = {}
    found: dict[str, memoryview] = {}
    for name, parameter in parameters.items():
        if type(parameter) in (Tensor, nn.Parameter) and parameter.is_contiguous():
            alike.setdefault((parameter.dtype, parameter.device.type, parameter.get_device()), {})[name] = places(
                parameter
            )
        else:
            found[name] = _bits(sampled(parameter))
    for group in alike.values():
        bits, done = _bits(torch.cat(list(group.values())).to(torch.bfloat16)), 0
        for name, sample in group.items():
            end = done + sample.shape[0] * torch.bfloat16.itemsize
            found[name] = bits[done:end]
            done = end
    return found
