"""LoReFT against an independent implementation: which tokens, which numbers, through caches, training and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ingraft import adapt
from ingraft.errors import IngraftError
from ingraft.methods.reft import Reft, ReftConfig
from ingraft.methods.registry import make_config
from ingraft.testing.cases import randomise
from ingraft.testing.subjects import SUBJECTS


def _model(config: ReftConfig, name: str = "a", dtype: torch.dtype = torch.float32) -> Any:
    model = SUBJECTS["llama"].make_redrawn().to(dtype)
    adapt.attach(model, config, name, seed=1)
    randomise(model, name)
    return model


def _parts(model: Any) -> list[Reft]:
    return [module for module in model.modules() if isinstance(module, Reft)]


def _edit(h_W: Tensor, M: Tensor, W: Tensor, b: Tensor, config: ReftConfig) -> Tensor:
    """One token, in float64, from the paper's equation; the orthogonal factor by Gram and Schmidt."""
    h, M, W, b = (x.detach().double() for x in (h_W, M, W, b))
    if config.orthogonality:
        rows: list[Tensor] = []
        for m in M:
            for r in rows:
                m = m - (r @ m) * r
            rows.append(m / m.norm())
        M = torch.stack(rows)
    return h + M.T @ (W @ h + b - (M @ h if config.subtract_projection else 0.0))


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"positions": "f1+l1"}, [[2, 5], [0, 3]]),
        ({"positions": "f2+l1"}, [[2, 3, 5], [0, 1, 3]]),
        ({"positions": "l2"}, [[4, 5], [2, 3]]),
        ({"positions": "f3"}, [[2, 3, 4], [0, 1, 2]]),
        ({"positions": "f9+l9"}, [[2, 3, 4, 5], [0, 1, 2, 3]]),
        ({"positions": "all"}, [[2, 3, 4, 5], [0, 1, 2, 3]]),
        ({"positions": "all", "orthogonality": False}, [[2, 3, 4, 5], [0, 1, 2, 3]]),
        ({"positions": "f1", "subtract_projection": False}, [[2], [0]]),
        ({"positions": "l1", "orthogonality": False, "subtract_projection": False}, [[5], [3]]),
    ],
)
def test_the_right_tokens_get_the_papers_numbers(options: dict[str, Any], chosen: list[list[int]]) -> None:
    """One row padded on the left, one on the right."""
    config = ReftConfig(r=3, **options)
    model = _model(config)
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 48, (2, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    bare = SUBJECTS["llama"].make_redrawn()

    def edit(part: Reft) -> Any:
        def hook(module: Any, args: Any, y: Any) -> Any:
            del module, args
            h = y.clone()
            for row, places in enumerate(chosen):
                for t in places:
                    h[row, t] = _edit(y[row, t], part.rotation, part.weight, part.bias, config).float()
            return h

        return hook

    for layer, part in zip(bare.model.layers, _parts(model), strict=True):
        layer.register_forward_hook(edit(part))
    with torch.no_grad():
        plain = SUBJECTS["llama"].make_redrawn()(input_ids=ids, attention_mask=mask).logits
        expected = bare(input_ids=ids, attention_mask=mask).logits
        found = model(input_ids=ids, attention_mask=mask).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[real], rtol=2e-5, atol=2e-5)
    assert (found - plain)[real].abs().max() > 0.05
    for row, places in enumerate(chosen):  # nothing before the first chosen token changes
        assert torch.equal(
            found[row, : places[0]][mask[row, : places[0]].bool()],
            plain[row, : places[0]][mask[row, : places[0]].bool()],
        )


def test_an_answer_is_not_edited() -> None:
    """With the prompt told, the edit is that of the prompt alone, as decoding finds it."""
    model = _model(ReftConfig(r=2, positions="f1+l1"))
    ids = torch.randint(3, 48, (2, 8), generator=torch.Generator().manual_seed(1))
    prompt = torch.arange(8)[None] < torch.tensor([[3], [5]])
    with torch.no_grad():
        with adapt.context(model, prompt=prompt):
            whole = model(input_ids=ids).logits
        for row, length in enumerate((3, 5)):
            step = model(input_ids=ids[row : row + 1, :length], use_cache=True)
            torch.testing.assert_close(step.logits[0], whole[row, :length], rtol=1e-4, atol=1e-5)
            for t in range(length, 8):
                step = model(input_ids=ids[row : row + 1, t : t + 1], past_key_values=step.past_key_values)
                torch.testing.assert_close(step.logits[0, -1], whole[row, t], rtol=1e-4, atol=1e-5)


def test_rows_stay_orthonormal_along_training() -> None:
    model = _model(ReftConfig(r=4, positions="all"))
    batch = SUBJECTS["llama"].batch(4)
    optimiser = torch.optim.AdamW(adapt.parameters(model, "a").values(), lr=0.05)
    before = [part.subspace(torch.float32).detach() for part in _parts(model)]
    for _ in range(20):
        optimiser.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimiser.step()
    for part, start in zip(_parts(model), before, strict=True):
        R = part.subspace(torch.float32).detach()
        assert (R @ R.T - torch.eye(4)).abs().max() < 1e-5
        assert (R - start).abs().max() > 0.1, "it was trained"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = _model(ReftConfig(r=3, positions="f2+l2"), dtype=dtype)
    adapt.save(model, tmp_path / "a", "a")
    other = SUBJECTS["llama"].make_redrawn().to(dtype)
    adapt.load(other, tmp_path / "a")
    batch = SUBJECTS["llama"].batch(4)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_sft_rows_tell_their_prompt() -> None:
    """The loss of a training row edits no token of its answer; plain text is edited as text."""
    from ingraft.evaluate.head import CausalHead, prompts

    model = _model(ReftConfig(r=2, positions="l1"))
    ids = torch.randint(3, 48, (2, 6), generator=torch.Generator().manual_seed(1))
    labels = torch.where(torch.arange(6)[None] < torch.tensor([[2], [4]]), -100, ids)
    labels[1, 5] = -100  # padding
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 6, [1] * 5 + [0]]), "labels": labels}
    assert prompts(batch).int().tolist() == [[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]]
    assert prompts({**batch, "labels": ids}).tolist() == batch["attention_mask"].bool().tolist()
    found = CausalHead(model).loss(batch)
    with adapt.context(model, prompt=prompts(batch)), torch.no_grad():
        logits = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        untold = model(input_ids=ids, attention_mask=batch["attention_mask"]).logits
    assert (untold - logits).abs().max() > 0.05


def test_options_that_cannot_work_are_refused() -> None:
    for positions in ("f", "f1+f2", "last", "f0+l0", "f0", ""):
        with pytest.raises(IngraftError, match="positions"):
            ReftConfig(positions=positions)
    with pytest.raises(IngraftError) as caught:
        make_config("reft", {"r": 0, "dropout": 1.0, "positions": "x"})
    assert len(caught.value.problems) == 3
    with pytest.raises(IngraftError, match="r=17 is more than the width 16"):
        adapt.attach(SUBJECTS["llama"].make_redrawn(), ReftConfig(r=17))
