"""transformers' Trainer tells methods about its steps; see `hooks.py`. A file of its own, because it cannot be imported without transformers."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ingraft.adapt.hooks import after_step


class AdapterCallback(TrainerCallback):
    """`Trainer(..., callbacks=[AdapterCallback()])`: lets methods act on their adapters behind each optimiser step."""

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        assert isinstance(model, nn.Module)
        after_step(model, state.global_step + 1, state.max_steps)
