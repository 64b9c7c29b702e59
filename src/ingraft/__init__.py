"""Ingraft: graft small trained parts onto a pretrained model and leave the model itself untouched.

    import ingraft
    from ingraft import LoraConfig

    ingraft.attach(model, LoraConfig(r=8))     # same object, same type
    ...                                        # train it as you always did
    ingraft.save(model, "my-adapter")
    ingraft.load(another_model, "my-adapter")

The names below are resolved when they are first used: importing this package imports neither torch nor transformers, so that the command
line answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ingraft.adapt import activate as activate
    from ingraft.adapt import add_tokens as add_tokens
    from ingraft.adapt import after_step as after_step
    from ingraft.adapt import attach as attach
    from ingraft.adapt import combine as combine
    from ingraft.adapt import context as context
    from ingraft.adapt import convert as convert
    from ingraft.adapt import detach as detach
    from ingraft.adapt import disabled as disabled
    from ingraft.adapt import load as load
    from ingraft.adapt import merge as merge
    from ingraft.adapt import packing as packing
    from ingraft.adapt import param_groups as param_groups
    from ingraft.adapt import parameters as parameters
    from ingraft.adapt import prepare as prepare
    from ingraft.adapt import rows as rows
    from ingraft.adapt import save as save
    from ingraft.adapt import status as status
    from ingraft.adapt import trainable as trainable
    from ingraft.adapt import unmerge as unmerge
    from ingraft.adapt.callback import AdapterCallback as AdapterCallback
    from ingraft.errors import IngraftError as IngraftError
    from ingraft.methods.adalora import AdaLoraConfig as AdaLoraConfig
    from ingraft.methods.bitfit import BitFitConfig as BitFitConfig
    from ingraft.methods.boft import BOFTConfig as BOFTConfig
    from ingraft.methods.c3a import C3AConfig as C3AConfig
    from ingraft.methods.compacter import CompacterConfig as CompacterConfig
    from ingraft.methods.dora import DoraConfig as DoraConfig
    from ingraft.methods.eva import EvaConfig as EvaConfig
    from ingraft.methods.fourierft import FourierFTConfig as FourierFTConfig
    from ingraft.methods.freeze import FreezeConfig as FreezeConfig
    from ingraft.methods.full import FullConfig as FullConfig
    from ingraft.methods.fusion import FusionConfig as FusionConfig
    from ingraft.methods.gralora import GraloraConfig as GraloraConfig
    from ingraft.methods.hira import HiraConfig as HiraConfig
    from ingraft.methods.houlsby import HoulsbyConfig as HoulsbyConfig
    from ingraft.methods.hra import HRAConfig as HRAConfig
    from ingraft.methods.ia3 import IA3Config as IA3Config
    from ingraft.methods.llama_adapter import LlamaAdapterConfig as LlamaAdapterConfig
    from ingraft.methods.ln_tuning import LNTuningConfig as LNTuningConfig
    from ingraft.methods.loftq import LoftQConfig as LoftQConfig
    from ingraft.methods.loha import LoHaConfig as LoHaConfig
    from ingraft.methods.lokr import LoKrConfig as LoKrConfig
    from ingraft.methods.lora import LoraConfig as LoraConfig
    from ingraft.methods.lora_fa import LoraFAConfig as LoraFAConfig
    from ingraft.methods.lora_plus import LoraPlusConfig as LoraPlusConfig
    from ingraft.methods.miss import MissConfig as MissConfig
    from ingraft.methods.multitask_prompt import MultitaskPromptConfig as MultitaskPromptConfig
    from ingraft.methods.oft import OFTConfig as OFTConfig
    from ingraft.methods.olora import OloraConfig as OloraConfig
    from ingraft.methods.p_tuning import PTuningConfig as PTuningConfig
    from ingraft.methods.p_tuning_v2 import PTuningV2Config as PTuningV2Config
    from ingraft.methods.parallel import ParallelConfig as ParallelConfig
    from ingraft.methods.pfeiffer import PfeifferConfig as PfeifferConfig
    from ingraft.methods.pissa import PissaConfig as PissaConfig
    from ingraft.methods.prefix import PrefixTuningConfig as PrefixTuningConfig
    from ingraft.methods.prompt import PromptTuningConfig as PromptTuningConfig
    from ingraft.methods.randlora import RandLoraConfig as RandLoraConfig
    from ingraft.methods.reft import ReftConfig as ReftConfig
    from ingraft.methods.road import RoadConfig as RoadConfig
    from ingraft.methods.routing import RoutingConfig as RoutingConfig
    from ingraft.methods.rslora import RsLoraConfig as RsLoraConfig
    from ingraft.methods.shira import ShiraConfig as ShiraConfig
    from ingraft.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
    from ingraft.methods.vblora import VBLoRAConfig as VBLoRAConfig
    from ingraft.methods.vera import VeraConfig as VeraConfig

_VERBS = (
    *(
        "activate",
        "add_tokens",
        "after_step",
        "attach",
        "combine",
        "context",
        "convert",
        "detach",
        "disabled",
        "load",
        "merge",
    ),
    *("packing", "param_groups", "parameters", "prepare", "rows", "save", "status", "trainable", "unmerge"),
)
_NAMES = {
    "AdapterCallback": "ingraft.adapt.callback",
    "IngraftError": "ingraft.errors",
    **dict.fromkeys(_VERBS, "ingraft.adapt"),
}
"""Public name -> module that defines it. The methods' configs come from the catalogue."""


def __getattr__(name: str) -> Any:
    module = _NAMES.get(name) or _configs().get(name)
    if module is None:
        raise AttributeError(f"module 'ingraft' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_NAMES, *_configs()})


def _configs() -> dict[str, str]:
    """Config class -> module, for every method in the catalogue."""
    from ingraft.methods.registry import records

    return {record.config: record.target.partition(":")[0] for record in records().values()}
