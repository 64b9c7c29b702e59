"""NEFTune: noise of the stated scale on real tokens, a function of seed, step and row, while the adapter trains and never otherwise."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ingraft import adapt
from ingraft.adapt.control import require_control
from ingraft.adapt.rows import row_keys
from ingraft.bases import load_base
from ingraft.errors import IngraftError
from ingraft.evaluate.modes import scoring
from ingraft.methods import registry
from ingraft.recipe import as_recipe
from ingraft.train import loop
from ingraft.train.attached import ADAPTER
from ingraft.train.noise import SALT, noise, noisy
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]


def mask(*lengths: int, width: int | None = None) -> Tensor:
    return (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()


def test_the_noise_is_even_between_the_stated_bounds_and_nothing_on_padding() -> None:
    """alpha / sqrt(L D) by row, L being its real tokens: bound, mean and deviation of an even distribution, and all 2^16 values about equally often."""
    lengths, width, alpha = (64, 7, 300), 96, 5.0
    drawn = noise(mask(*lengths), width, alpha, torch.tensor([11, -5, 7], dtype=torch.int32))
    assert drawn.shape == (3, 300, 96)
    for row, length in enumerate(lengths):
        assert not drawn[row, length:].any()
        own, bound = drawn[row, :length].double(), alpha / math.sqrt(length * width)
        assert bound * 0.98 < own.abs().max() < bound
        error = bound / math.sqrt(3 * own.numel())
        assert abs(own.mean()) < 4 * error
        assert own.std() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    quarters = torch.histc(drawn[2] / (alpha / math.sqrt(300 * width)), bins=8, min=-1, max=1) / (300 * width)
    assert quarters.numpy() == pytest.approx([1 / 8] * 8, rel=0.06)


def test_the_noise_of_a_row_is_its_own() -> None:
    """Neighbours and padding change nothing; another row or step is other noise."""
    keys = torch.tensor([3, 4], dtype=torch.int32)
    alone = noise(mask(5), 8, 1.0, keys[:1])
    beside = noise(mask(5, 9, width=12), 8, 1.0, keys)
    assert torch.equal(beside[0, :5], alone[0])
    assert not torch.allclose(beside[1, :5] * math.sqrt(9 / 5), alone[0])


def embedded(model: nn.Module, batch: dict[str, Tensor]) -> list[Tensor]:
    """What behind the embeddings goes on, in the order in which it was seen."""
    seen: list[Tensor] = []
    weight = model.get_input_embeddings().weight  # type: ignore[operator]
    places = [place for place in model.modules() if isinstance(place, nn.Embedding) and place.weight is weight]
    handles = [
        place.register_forward_hook(lambda module, args, output: seen.append(output.detach().clone()))
        for place in places
    ]
    try:
        model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return seen


BATCH = {"input_ids": torch.tensor([[6, 9, 10, 11], [9, 12, 3, 3]]), "attention_mask": mask(4, 2)}


def prepared(home: Path, method: str, base: str = "llama", task: str = "sft", **options: Any) -> tuple[nn.Module, Any]:
    recipe = as_recipe(
        {
            "model": str(home / base),
            "data": "x",
            "task": task,
            "method": method,
            "neftune_noise_alpha": 3.0,
            "method_config": options,
        }
    )
    model = load_base(recipe.model, "float32", False, task).model
    adapt.attach(model, registry.make_config(method, recipe.method_config), name=ADAPTER, seed=1)
    loop.adapting(model, [type("L", (), {"name": ADAPTER})], True)  # type: ignore[list-item]
    adapt.dropout_step(model, 2, torch.tensor([7, 1]))
    return model, recipe


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("method", "options"), [("lora", {}), ("prompt", {"num_virtual_tokens": 3}), ("prefix", {}), ("full", {})]
)
def test_real_tokens_get_the_noise_whatever_trains_and_however_rows_are_laid(
    home: Path, method: str, options: dict[str, Any], packed: bool
) -> None:
    """By its definition, on the very numbers; none in evaluation, none after the block."""
    model, recipe = prepared(home, method, **options)
    (plain,) = embedded(model, BATCH)
    keys = row_keys(require_control(model).call, recipe.seed ^ SALT, 2, None, torch.device("cpu"))
    wanted = model.get_input_embeddings()(BATCH["input_ids"]) + noise(BATCH["attention_mask"], 32, 3.0, keys)  # type: ignore[operator]
    with noisy(model, ADAPTER, recipe):
        with adapt.packing(model) if packed else scoring(nn.Identity()), torch.no_grad():
            (found,) = embedded(model, BATCH)
            whole = model(**BATCH).logits
        assert (found.shape[0] == 1) == (packed and method != "prompt"), "prompts join before rows are laid"
        if found.shape[0] == 1:  # the longest row first
            assert torch.equal(found[0], torch.cat([wanted[0], wanted[1, :2]]))
        else:
            assert torch.equal(found[BATCH["attention_mask"].bool()], wanted[BATCH["attention_mask"].bool()])
        with scoring(model):
            assert torch.equal(embedded(model, BATCH)[0], plain)
        adapt.dropout_step(model, 3, torch.tensor([7, 1]))
        assert not torch.equal(model(**BATCH).logits, whole)
    assert torch.equal(embedded(model, BATCH)[0], plain)


def test_only_what_is_read_gets_noise(home: Path) -> None:
    """Of an encoder-decoder the encoder's tokens, also where the decoder has as many."""
    model, recipe = prepared(home, "lora", "t5", "seq2seq")
    batch = {**BATCH, "decoder_input_ids": BATCH["input_ids"].clone()}
    plain = embedded(model, batch)
    with noisy(model, ADAPTER, recipe):
        found = embedded(model, batch)
    assert len(plain) == len(found) == 2
    assert not torch.equal(found[0], plain[0]) and torch.equal(found[1], plain[1])


def lasting(folder: Path) -> tuple[bytes, Any]:
    return (folder / "adapter_model.safetensors").read_bytes(), json.loads((folder / "metrics.json").read_text())


class Killed(BaseException):
    pass


def test_a_stopped_run_ends_with_the_same_bits(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And noise changes what is trained, not what is measured before."""
    whole = lasting(train(recipe(output_dir=str(tmp_path / "whole"), neftune_noise_alpha=5.0), quiet=True).folder)
    quiet = lasting(train(recipe(output_dir=str(tmp_path / "quiet")), quiet=True).folder)
    assert whole[0] != quiet[0] and whole[1]["before"] == quiet[1]["before"]
    step = loop.step

    def dying(session: Any, progress: Any, clock: Any, rows: Any) -> Any:
        if progress.step == 6:
            raise Killed
        return step(session, progress, clock, rows)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "step", dying)
        train(recipe(neftune_noise_alpha=5.0), quiet=True)
    resumed = train(recipe(neftune_noise_alpha=5.0), resume_from_checkpoint="last", quiet=True)
    assert lasting(resumed.folder) == whole


def test_accumulation_and_packing_see_the_same_noise(recipe: Make, tmp_path: Path) -> None:
    """4 rows at once, 2 twice and 4 end to end are the same run within rounding; another seed of noise would be a thousand times further off."""
    ways = {
        "one": {},
        "two": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        "laid": {"data_packing": True},
    }
    losses = [
        train(
            recipe(output_dir=str(tmp_path / name), neftune_noise_alpha=20.0, eval_steps=0, **way), quiet=True
        ).metrics["after"]["loss"]
        for name, way in ways.items()
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_where_noise_makes_no_sense_it_is_refused() -> None:
    base = {"model": "x", "data": "x", "neftune_noise_alpha": 5}
    with pytest.raises(IngraftError, match="another thing with every noise"):
        as_recipe({**base, "cache_frozen": True, "num_train_epochs": 2})
    with pytest.raises(IngraftError, match="noise is neither"):
        as_recipe({**base, "task": "grpo", "rl": {"reward_pattern": "(a)"}})
