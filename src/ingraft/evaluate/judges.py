"""Adapters that judge over a base that writes: a reward model, and the value function that starts from one.

A reward run trains an adapter and a head (one number from the last token's hidden state) over the base as a sequence classifier. Over the same base as a
language model the adapter's layers are the same, and the head is a row of numbers kept beside the model: so policy, reference, reward and value are four adapters
over one base in memory. The head is no module of the model, because the base would then be another one to everything that is saved or compared.

Legend: B rows, T tokens, D width.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save_file
from torch import Tensor, nn

from ingraft import adapt, durable
from ingraft.adapt.files import CONFIG, WEIGHTS
from ingraft.adapt.files.fingerprint import differences, fingerprint
from ingraft.adapt.lifecycle import acting_kept
from ingraft.bases.heads import head_modules
from ingraft.errors import IngraftError
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.loss import Poll, by_length, device_of
from ingraft.evaluate.modes import unnoticed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ingraft.data.examples import Example

REWARD, VALUE = "reward", "value"
"""The adapters' names in the model; a run keeps its reward model in a folder called so."""

HEAD = "score"
"""What transformers calls the head of a sequence classifier over a decoder."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Judge:
    """An adapter in a model and its head.

    Attributes:
        name: of the adapter.
        head_1D: float32.
    """

    name: str
    head_1D: nn.Parameter

    def numbers(self, states_BTD: Tensor) -> Tensor:
        """(B, T) what it says at each token, float32."""
        return (states_BTD.float() @ self.head_1D.T)[..., 0]


def load_judge(
    model: PreTrainedModel, folder: Path, name: str, *, trainable: bool = False, allow_base_mismatch: bool = False
) -> Judge:
    """Put the adapter of a reward run into a model that writes. What acts stays as it is.

    Raises:
        IngraftError: the folder is no reward run's, or its base is another one.
    """
    try:
        facts: dict[str, Any] = durable.verify(folder)["facts"]
    except IngraftError as error:
        raise IngraftError(*(f"reward_adapter: {text}" for text in error.problems)) from None
    task = (facts.get("run") or {}).get("task")
    if task != "reward":
        raise IngraftError(
            f"reward_adapter: {folder} holds no reward model (task {task or 'unknown'}); train one with --task reward."
        )
    recorded = cast("dict[str, Any]", facts.get("base") or {})
    differing = differences(
        {key: recorded.get(key) for key in ("tensors", "content")}, fingerprint(model, head_modules(model))
    )
    if differing and not allow_base_mismatch:
        raise IngraftError(
            f"reward_adapter: {folder} was trained on another base ({recorded.get('name') or 'unnamed'}): this one differs in "
            f"{' and '.join(differing)}. Policy and reward share one base; train the reward model on it."
        )
    config = durable.read_json(folder / CONFIG)
    try:
        tensors = load_tensors(durable.read_bytes(folder / WEIGHTS))
    except SafetensorError as error:
        raise IngraftError(f"reward_adapter: {folder / WEIGHTS} cannot be read: {error}.") from error
    heads = [key for key in tensors if key.endswith(f".{HEAD}.weight")]
    if len(heads) != 1 or tensors[heads[0]].shape[0] != 1:
        raise IngraftError(
            f"reward_adapter: {folder} has no head called {HEAD} that says one number; bases that write have one."
        )
    head_1D = tensors.pop(heads[0]).float()
    whole = [path for path in config.get("modules_to_save") or [] if path != HEAD]
    with tempfile.TemporaryDirectory() as made:
        alone = Path(made) / name
        alone.mkdir()
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, alone / WEIGHTS, metadata={"format": "pt"}
        )
        durable.write_json(alone / CONFIG, config | {"modules_to_save": whole or None, "task_type": "CAUSAL_LM"})
        with acting_kept(model):
            adapt.load(model, alone, name=name, trainable=trainable)
    return Judge(name=name, head_1D=nn.Parameter(head_1D.to(device_of(model)), requires_grad=trainable))


def keep_judge(source: Path, run: Path) -> None:
    """Copy a reward model into a run's folder, so that the run and its evaluations need no other."""
    if source.resolve() == (run / REWARD).resolve():
        return
    facts = durable.read_manifest(source)["facts"]
    with durable.folder(run / REWARD, True, facts) as tmp:
        for name in (CONFIG, WEIGHTS):
            durable.write_file(tmp / name, durable.read_bytes(source / name))


@contextmanager
def judging(model: nn.Module, judge: Judge) -> Iterator[None]:
    """Inside the block the model's hidden states are the judge's."""
    with acting_kept(model):
        adapt.activate(model, judge.name)
        yield


def judged(
    model: nn.Module, judge: Judge, answers: Sequence[Example], pad_id: int, batch_size: int, poll: Poll | None = None
) -> list[float]:
    """What a reward model says of whole sequences, prompt and answer: its number at the last token."""
    said = [0.0] * len(answers)
    head = CausalHead(model)
    with judging(model, judge), unnoticed(model):
        for positions, batch in by_length(answers, pad_id, batch_size, device_of(model), poll):
            numbers_BT = judge.numbers(head.states({name: batch[name] for name in ("input_ids", "attention_mask")}))
            last_B = batch["attention_mask"].sum(dim=1) - 1
            found_B = numbers_BT[torch.arange(len(positions), device=last_B.device), last_B]
            for position, value in zip(positions, found_B.tolist(), strict=True):
                said[position] = value
    return said
