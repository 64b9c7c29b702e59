"""Losses of preferences are TRL's on the same batch, and their scores are what their definitions say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import ingraft.adapt as adapt
from ingraft.data import collate
from ingraft.data.examples import IGNORED, Example
from ingraft.data.preferences import Compared
from ingraft.evaluate import scorer_of
from ingraft.evaluate.head import CausalHead
from ingraft.evaluate.preference import (
    bradley_terry,
    dpo,
    ipo,
    pairs_of,
    score_pairs,
    wilson,
)
from ingraft.methods.lora import LoraConfig
from ingraft.recipe import Losses, PreferenceRecipe
from ingraft.train.objectives import objective_for

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


def adapted_model(model: Any) -> Any:
    """The script's base with its change as an adapter: switched off, it is the reference."""
    MAKER.fill(model)
    adapt.attach(
        model, LoraConfig(r=MAKER.R, lora_alpha=MAKER.ALPHA, target_modules=MAKER.LAYERS), name="policy", seed=0
    )
    with torch.no_grad():
        for path, module in model.named_modules():
            if path.rpartition(".")[2] in MAKER.LAYERS:
                for ours, theirs in zip(
                    factors(model, path), MAKER.factors(path, tuple(module.weight.shape)), strict=True
                ):
                    ours.copy_(theirs)
    return model


@pytest.fixture(scope="module")
def policy() -> Any:
    return adapted_model(LlamaForCausalLM(LlamaConfig(**MAKER.LLAMA)).eval())


TOKENIZER: Any = MAKER.tokenizer()


def factors(model: nn.Module, path: str) -> tuple[nn.Parameter, nn.Parameter]:
    found = {name: p for name, p in adapt.parameters(model, "policy").items() if path in name}
    (a,) = (p for name, p in found.items() if "lora_A" in name)
    (b,) = (p for name, p in found.items() if "lora_B" in name)
    return a, b


def rows(*keys: str, labels: Sequence[int] = (1, 2), beside: str = "") -> list[Compared]:
    """The script's rows with their answers of these kinds; `beside` adds the next row's answer of that kind behind this row's prompt."""
    found: list[Compared] = []
    for number, row in enumerate(MAKER.ROWS):
        answers = [row[key] for key in keys]
        if beside:
            answers.append(MAKER.ROWS[(number + 1) % len(MAKER.ROWS)][beside])
        prompt = row["prompt_ids"]
        own, *others = [
            Example(input_ids=prompt + ids, labels=[IGNORED] * len(prompt) + ids, row_id=number, label=label)
            for ids, label in zip(answers, labels, strict=True)
        ]
        found.append(
            Compared(input_ids=own.input_ids, labels=own.labels, label=own.label, row_id=number, beside=tuple(others))
        )
    return found


def judged(beside: str) -> list[Compared]:
    return [
        replace(row, label=int(good)) for row, good in zip(rows("chosen_ids", beside=beside), MAKER.GOOD, strict=True)
    ]


def loss_of(task: str, model: Any, examples: Sequence[Compared], **settings: float) -> tuple[Tensor, dict[str, float]]:
    """The mean over rows, and what the objective takes note of."""
    objective = objective_for(task, model, 3, Losses(preference=PreferenceRecipe(**settings)))
    objective.begin([examples])
    objective.ready(examples, 2)
    loss = objective.loss(objective.batch(examples)) / sum(map(objective.units, examples))
    return loss, {name: total / count for name, (total, count) in objective.taken().items()}


def ratios(model: Any, examples: Sequence[Compared]) -> Tensor:
    """(S,) log policy - log reference."""
    head, batch = CausalHead(model), collate(examples, 3)
    with torch.no_grad(), adapt.disabled(model):
        reference_S = head.by_row(batch)
    with torch.no_grad():
        return reference_S - head.by_row(batch)


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


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("task", "theirs"), [("dpo", "sigmoid"), ("ipo", "ipo")])
def test_losses_of_pairs_are_trl_s(policy: Any, task: str, theirs: str, beta: float) -> None:
    """Loss and gradients of one forward over six sequences; and the loss that is told of rows held out."""
    examples = rows("chosen_ids", "rejected_ids")
    loss, noticed = loss_of(task, policy, examples, beta=beta)
    check(policy, loss, TRL[f"{theirs} {beta}"])
    if (task, beta) == ("dpo", 0.1):
        assert {name: noticed[name] for name in TRL["metrics 0.1"]} == pytest.approx(TRL["metrics 0.1"], abs=1e-6)
    scorer: Any = scorer_of(task)(policy, TOKENIZER, losses=Losses(preference=PreferenceRecipe(beta=beta)))
    told = scorer.of(examples, ratios(policy, examples)).metrics()
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {name: told[name] for name in noticed} == pytest.approx(noticed, abs=1e-5)


def test_a_reference_is_asked_once_a_sequence(policy: Any) -> None:
    """It is frozen: a part that was scored, or a file of it, costs the policy's forwards alone and has the figures of its own rows."""
    examples = rows("chosen_ids", "rejected_ids")
    data: Any = SimpleNamespace(
        parts={"eval": SimpleNamespace(examples=examples), "one": SimpleNamespace(examples=examples[1:2])}
    )
    scorer = scorer_of("dpo")(policy, TOKENIZER)
    calls: list[Any] = []
    handle = policy.register_forward_hook(lambda *args: calls.append(args))
    counts: list[int] = []
    for _ in range(2):
        whole = scorer.evaluate(data, "eval")
        counts.append(len(calls))
        calls.clear()
    own = scorer.evaluate(data, "one")
    handle.remove()
    assert counts[0] == 2 * counts[1]
    assert own == pytest.approx(scorer_of("dpo")(policy, TOKENIZER).evaluate(data, "one"), abs=1e-5)
    assert own["loss"] != whole["loss"]


@pytest.mark.parametrize(
    ("beta", "weights", "beside"), [(0.1, (1.0, 1.0), "chosen_ids"), (0.5, (1.5, 0.7), "rejected_ids")]
)
def test_kto_is_trl_s(policy: Any, beta: float, weights: tuple[float, float], beside: str) -> None:
    """Loss, gradients and the point of reference, which no gradient goes through."""
    settings = {"beta": beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    examples, theirs = judged(beside), TRL[f"kto {beta}"]
    loss, noticed = loss_of("kto", policy, examples, **settings)
    assert noticed["kl"] == pytest.approx(theirs["kl"], abs=1e-5)
    check(policy, loss, theirs)
    scorer: Any = scorer_of("kto")(policy, TOKENIZER, losses=Losses(preference=PreferenceRecipe(**settings)))
    told = scorer.of(examples, ratios(policy, examples)).metrics()
    assert told["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert {name: told[name] for name in noticed} == pytest.approx(noticed, abs=1e-5)
    assert (TRL["kto 0.1"]["kl"] == 0) is not (TRL["kto 0.5"]["kl"] == 0)


def test_the_reward_model_is_trl_s() -> None:
    """Loss, gradients, accuracy and margin."""
    model = adapted_model(LlamaForSequenceClassification(LlamaConfig(**MAKER.LLAMA, num_labels=1)).eval())
    examples = [
        replace(row, labels=None, beside=(replace(row.beside[0], labels=None),))
        for row in rows("chosen_ids", "rejected_ids")
    ]
    loss, noticed = loss_of("reward", model, examples)
    check(model, loss, TRL["reward"])
    for name in ("accuracy", "margin"):
        assert noticed[name] == pytest.approx(TRL["reward"][name], abs=1e-6)


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
