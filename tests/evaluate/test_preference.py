"""Losses of preferences are TRL's on the same batch, and their scores are what their definitions say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import ingraft.adapt as adapt
from ingraft.data import collate
from ingraft.data.examples import IGNORED, Example
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.preference import (
    bradley_terry,
    dpo,
    ipo,
    kto,
    kto_baseline,
    pairs_of,
    score_pairs,
    wilson,
)
from ingraft.methods.lora import LoraConfig

GOLDEN = Path(__file__).parents[1] / "golden"
TRL = json.loads((GOLDEN / "preferences.json").read_text())


def _maker() -> ModuleType:
    """The script that made TRL's numbers, for its formula and its rows."""
    spec = importlib.util.spec_from_file_location("make_preferences", GOLDEN / "make_preferences.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MAKER = _maker()


@pytest.fixture(scope="module")
def policy() -> Any:
    """The script's base with its change as an adapter: switched off, it is the reference."""
    model = LlamaForCausalLM(LlamaConfig(**MAKER.LLAMA)).eval()
    MAKER.fill(model)
    adapt.attach(
        model, LoraConfig(r=MAKER.R, lora_alpha=MAKER.ALPHA, target_modules=MAKER.LAYERS), name="policy", seed=0
    )
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in MAKER.LAYERS:
                a, b = factors(model, path)
                a_, b_ = MAKER.factors(path, tuple(module.weight.shape))
                a.copy_(a_)
                b.copy_(b_)
    return model


def factors(model: nn.Module, path: str) -> tuple[nn.Parameter, nn.Parameter]:
    found = {name: p for name, p in adapt.parameters(model, "policy").items() if path in name}
    (a,) = (p for name, p in found.items() if "lora_A" in name)
    (b,) = (p for name, p in found.items() if "lora_B" in name)
    return a, b


def sequences(*keys: str, beside: int = 0) -> list[Example]:
    """The script's answers of these kinds, row by row, behind the prompt `beside` rows before."""
    found: list[Example] = []
    for number, row in enumerate(MAKER.ROWS):
        prompt, other = row["prompt_ids"], MAKER.ROWS[(number + beside) % len(MAKER.ROWS)]
        found += [
            Example(
                input_ids=prompt + other[key], labels=[IGNORED] * len(prompt) + other[key], row_id=number, label=place
            )
            for place, key in enumerate(keys, start=1)
        ]
    return found


def ratios(model: Any, examples: list[Example]) -> Tensor:
    """(S,) log policy - log reference."""
    head, batch = CausalHead(model), collate(examples, 3)
    with torch.no_grad(), adapt.disabled(model):
        reference_S = -head.by_row(batch)
    return -head.by_row(batch) - reference_S


def check(model: Any, loss: Tensor, theirs: dict[str, Any]) -> None:
    """The loss and the gradients of the watched layer's factors."""
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5, abs=1e-5)
    a, b = factors(model, MAKER.WATCHED)
    model.zero_grad()
    loss.backward()
    for ours, key in ((a, "A"), (b, "B")):
        wanted = torch.tensor(theirs[key])
        assert ours.grad is not None
        assert (ours.grad - wanted).abs().max() <= 1e-6 + 1e-5 * wanted.abs().max()


PAIRS = pairs_of([[1, 2]] * 3)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_is_trl_s(policy: Any, beta: float) -> None:
    """Loss and gradients of one forward over six sequences."""
    margins_P = PAIRS.margins(ratios(policy, sequences("chosen_ids", "rejected_ids")))
    check(policy, PAIRS.total(dpo(margins_P, beta)) / 3, TRL[f"sigmoid {beta}"])


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_ipo_is_trl_s(policy: Any, beta: float) -> None:
    """Loss and gradients, with the log-ratios by token."""
    examples = sequences("chosen_ids", "rejected_ids")
    lengths_S = torch.tensor([example.learned for example in examples])
    margins_P = PAIRS.margins(ratios(policy, examples) / lengths_S)
    check(policy, PAIRS.total(ipo(margins_P, beta)) / 3, TRL[f"ipo {beta}"])


@pytest.mark.parametrize(
    ("beta", "weights", "beside"), [(0.1, (1.0, 1.0), "chosen_ids"), (0.5, (1.5, 0.7), "rejected_ids")]
)
def test_kto_is_trl_s(policy: Any, beta: float, weights: tuple[float, float], beside: str) -> None:
    """Loss, gradients and the point of reference, which no gradient goes through."""
    baseline = kto_baseline(ratios(policy, sequences(beside, beside=1)))
    theirs = TRL[f"kto {beta}"]
    assert baseline.item() == pytest.approx(theirs["kl"], abs=1e-5)
    losses_B = kto(ratios(policy, sequences("chosen_ids")), torch.tensor(MAKER.GOOD), baseline, beta, *weights)
    check(policy, losses_B.mean(), theirs)
    assert (TRL["kto 0.1"]["kl"] == 0) is not (TRL["kto 0.5"]["kl"] == 0)


def test_the_scores_are_trl_s(policy: Any) -> None:
    """What a log says of rewards."""
    with torch.no_grad():
        numbers_S = (0.1 * ratios(policy, sequences("chosen_ids", "rejected_ids"))).tolist()
    found, theirs = score_pairs([numbers_S[i : i + 2] for i in (0, 2, 4)], [[1, 2]] * 3), TRL["metrics 0.1"]
    assert found.mean(found.chosen) == pytest.approx(theirs["rewards/chosen"], abs=1e-6)
    assert found.mean(found.rejected) == pytest.approx(theirs["rewards/rejected"], abs=1e-6)
    assert found.margin == pytest.approx(theirs["rewards/margins"], abs=1e-6)
    assert found.accuracy == pytest.approx(theirs["rewards/accuracies"], abs=1e-6)


def test_a_smoothed_loss_is_that_of_pairs_turned_round() -> None:
    """Of ten equal pairs, three the wrong way round."""
    margin, beta = torch.tensor([1.7]), 0.4
    turned = torch.stack([margin * (-1 if i < 3 else 1) for i in range(10)])
    assert dpo(margin, beta, 0.3).item() == pytest.approx(dpo(turned, beta).mean().item(), abs=1e-6)


def test_a_ranking_is_all_of_its_pairs() -> None:
    """Its K(K-1)/2 pairs weigh one in all, written out; answers of one place make none; rows count alike."""
    places, scores = [[1, 2, 3, 4], [2, 1], [1, 2, 2]], torch.tensor([0.3, -1.0, 2.0, 0.7, 1.5, -0.2, 0.0, 0.9, -0.4])
    pairs = pairs_of(places)
    assert pairs.better_P.shape == (6 + 1 + 2,)

    def loss(better: int, worse: int) -> float:
        return math.log1p(math.exp(scores[worse].item() - scores[better].item()))

    wanted = sum(loss(i, j) for i, j in itertools.combinations(range(4), 2)) / math.comb(4, 2)
    wanted += loss(5, 4) + (loss(6, 7) + loss(6, 8)) / 2
    assert pairs.total(bradley_terry(pairs.margins(scores))).item() == pytest.approx(wanted, abs=1e-5)


def test_losses_are_float32_where_log_probabilities_are_not() -> None:
    """In bfloat16 a margin of 0.1 between two numbers of some hundred vanishes only if it is formed there."""
    margins_P = torch.tensor([0.30078125], dtype=torch.bfloat16)
    for loss_P in (dpo(margins_P, 0.1), ipo(margins_P, 0.1), bradley_terry(margins_P)):
        assert loss_P.dtype == torch.float32


def test_scores_by_hand() -> None:
    """Accuracy, margin, Brier score and calibration of four pairs, one of them undecided."""
    found = score_pairs([[2.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 0.0]], [[1, 2]] * 4)
    assert found.accuracy == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert found.margin == pytest.approx((2 - 1 + 0 + 3) / 4)
    s = [1 / (1 + math.exp(-m)) for m in (2, -1, 0, 3)]
    assert found.brier == pytest.approx(sum((1 - x) ** 2 for x in s) / 4)
    gaps = [abs(s[0] - 1), abs(1 - s[1] - 0), 0.0, abs(s[3] - 1)]  # 0.88, 0.73, 0.5 and 0.95 lie in parts of their own
    assert found.calibration_error() == pytest.approx(sum(gaps) / 4)
    assert score_pairs([[2.0, 0.0], [2.0, 2.0]], [[1, 2], [2, 1]]).calibration_error(bins=1) == pytest.approx(
        abs(s[0] + 0.5 - 1.5) / 2
    )


@pytest.mark.parametrize(("share", "count"), [(0.97, 110), (0.5, 9), (1.0, 110), (0.0, 40)])
def test_the_interval_by_its_definition(share: float, count: int) -> None:
    """Its ends are the shares from which the one that was seen is 1.96 standard errors away."""
    for end in wilson(share, count):
        assert (end - share) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / count, abs=1e-9)
