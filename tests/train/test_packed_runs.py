"""`data.packing: true`: the same run, without padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ingraft.adapt import flat
from ingraft.errors import IngraftError
from ingraft.train import loop
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("method", "options"), [("lora", {"lora_dropout": 0.2}), ("p-tuning", {"num_virtual_tokens": 3})]
)
def test_a_packed_run_is_the_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, options: dict[str, Any]
) -> None:
    """The same rows in every step, dropout included: the same losses, evaluations and adapter, up to rounding."""
    tokens: list[int] = []
    run_laid = flat.run_laid

    def noted(laid: flat.Flat, *args: Any, **named: Any) -> Any:
        tokens.append(laid.tokens)
        return run_laid(laid, *args, **named)

    monkeypatch.setattr("ingraft.adapt.virtual.run_laid", noted)
    found: list[tuple[dict[str, Tensor], list[dict[str, Any]]]] = []
    for packing in (False, True):
        assert not tokens
        run = train(
            recipe(
                method=method,
                method_config=options,
                data_packing=packing,
                gradient_accumulation_steps=2,
                adam_epsilon=1.0,  # plain descent in effect, so that a rounding error stays one
                learning_rate=1.0,
                output_dir=str(tmp_path / f"packed-{packing}"),
            ),
            quiet=True,
        )
        found.append((adapter(run.folder), entries(run.folder / "log.jsonl")))
        assert run.model.config._attn_implementation == "sdpa"
    assert len(tokens) > 24
    (plain, plain_log), (packed, packed_log) = found
    for name, tensor in plain.items():
        torch.testing.assert_close(packed[name], tensor, rtol=1e-4, atol=1e-5)
    for one, other in zip(plain_log, packed_log, strict=True):
        assert list(other) == list(one)
        for key in {"loss", "grad_norm", "eval_loss"}.intersection(one):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


def test_a_packed_run_goes_on_with_the_same_bits(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which rows lie together is decided by the step alone, so a run that was stopped ends as one that was not."""
    whole = train(recipe(data_packing=True, output_dir=str(tmp_path / "whole")), quiet=True).folder
    step, made = loop.step, recipe(data_packing=True)

    class Killed(BaseException):
        pass

    def die(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 7:
            raise Killed
        return step(session, progress, *rest)

    with monkeypatch.context() as dying:
        dying.setattr(loop, "step", die)
        with pytest.raises(Killed):
            train(made, quiet=True)
    with pytest.raises(IngraftError, match="packing"):
        train(recipe(data_packing=False), resume_from_checkpoint="last", quiet=True)
    again = train(made, resume_from_checkpoint="last", quiet=True).folder
    for name, tensor in adapter(whole).items():
        assert torch.equal(adapter(again)[name], tensor), name


def test_a_base_that_cannot_pack_is_refused_first(recipe: Make, home: Path) -> None:
    """Nothing is written, and the base is named."""
    made = recipe(model=str(home / "bert"), task="classify", data_packing=True)
    with pytest.raises(IngraftError, match="BertModel pools"):
        train(made, quiet=True)
    assert not Path(made["output_dir"]).exists()
