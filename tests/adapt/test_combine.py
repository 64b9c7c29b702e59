"""Combining and converting: defined on what adapters change, so right for every scaling, method and kind of layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ingraft
from ingraft import BitFitConfig, DoraConfig, HoulsbyConfig, IA3Config, LoraConfig, PrefixTuningConfig
from ingraft.adapt.arithmetic import WAYS
from ingraft.adapt.merging import merge, unmerge
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.quant.formats import QUANTISERS
from ingraft.quant.layers import quantised
from ingraft.testing.cases import Case, close, differs, randomise, run, why_not
from ingraft.testing.subjects import SUBJECTS
from ingraft.testing.table import METHODS, row

TIED = pytest.mark.filterwarnings("ignore:.*shares its weight")
"""A BERT's decoder is its embedding; adapting one side is allowed, and said."""

MERGEABLE = [name for name in METHODS if registry.load(name).mergeable]


class Blocks(nn.Module):
    """A convolution in one and one in three dimensions, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.three, self.head = nn.Conv1d(3, 6, 3), nn.Conv3d(2, 6, (1, 3, 3)), nn.Linear(12, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return self.head(torch.cat([self.one(x).mean(-1), self.three(z).mean((2, 3, 4))], dim=1))


def two(first: Any, second: Any, subject: str = "llama") -> tuple[Any, dict[str, Tensor]]:
    """A subject with adapters `a` and `b` of these options, their values drawn."""
    model = SUBJECTS[subject].make_redrawn()
    for name, config in (("a", first), ("b", second)):
        ingraft.attach(model, config, name)
        randomise(model, name, scale=0.3)
    return model, SUBJECTS[subject].batch(3)


def merged_values(model: Any, *names: str) -> dict[str, Tensor]:
    """The base's parameters with these adapters written in."""
    merge(model, *names, untie=True)
    found = {name: value.detach().clone() for name, value in ingraft.adapt.base_parameters(model).items()}
    unmerge(model)
    return found


# ------------------------------------------------------------------------------------------------------------- one with weight 1


KINDS = ["linear", "conv1d-transposed", "embedding", "conv2d", "conv2d-groups", "attention", "mixtral", "llama"]


@TIED
@pytest.mark.parametrize("subject", KINDS)
@pytest.mark.parametrize("name", MERGEABLE)
def test_regression_4_one_adapter_with_weight_one_gives_itself(name: str, subject: str) -> None:
    """Whatever scales or renormalises it: no rank is asked for, so nothing is lost."""
    case = Case(row=row(name), subject=SUBJECTS[subject])
    if (reason := why_not(case)) is not None:
        pytest.skip(reason)
    model, batch = case.adapted("a"), case.batch()
    expected = run(model, batch)
    for how in ("svd", "cat", "linear", *(("ties", "magnitude_prune_svd") if subject == "linear" else ())):
        made = ingraft.combine(model, {"a": 1.0}, how, how=how, density=1.0)
        close(run(model, batch), expected, f"{how} of one", times=2.0)
        assert made.error < 1e-5
        sites = set(model.ingraft_control.adapters["a"].sites)
        assert all(any(name == path or name.startswith(f"{path}.") for path in sites) for name in made.sites)
        assert len(made.sites) >= len(sites)


def test_regression_17_every_kind_of_convolution_combines() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, batch = Blocks().eval(), {"x": torch.randn(2, 3, 7), "z": torch.randn(2, 2, 3, 5, 5)}
    for name, r in (("a", 2), ("b", 3)):
        ingraft.attach(model, LoraConfig(r=r, target_modules=("one", "three")), name)
        randomise(model, name)
    ingraft.activate(model, "a", "b")
    both = run(model, batch)
    for how, rank in (("svd", 5), ("cat", None)):
        made = ingraft.combine(model, {"a": 1.0, "b": 1.0}, how, how=how, rank=rank)
        close(run(model, batch), both, how)
        assert made.method == "lora"
    ingraft.combine(model, {"a": 1.0, "b": 1.0}, "cut", how="svd", rank=2)
    differs(run(model, batch), both, "rank 2", least=1e-3)


# ------------------------------------------------------------------------------------------------------------------------ sums


@pytest.mark.parametrize("subject", KINDS[:-3])
def test_a_weighted_sum_is_the_sum_of_the_changes(subject: str) -> None:
    """Of two methods of different ranks, one without factors; negative weights too."""
    targets = SUBJECTS[subject].targets
    model, _ = two(
        LoraConfig(r=2, lora_alpha=6, target_modules=targets), DoraConfig(r=3, target_modules=targets), subject
    )
    base = {name: value.detach().clone() for name, value in ingraft.adapt.base_parameters(model).items()}
    a, b = merged_values(model, "a"), merged_values(model, "b")
    exact = ingraft.combine(model, {"a": -0.5, "b": 2.0}, "exact")
    assert exact.method == "full"
    for name, value in merged_values(model, "exact").items():
        close(value, base[name] - 0.5 * (a[name] - base[name]) + 2.0 * (b[name] - base[name]), name)
    cut = ingraft.combine(model, {"a": -0.5, "b": 2.0}, "cut", rank=4)
    assert cut.method == "lora"
    found = merged_values(model, "cut")
    size = error = 0.0
    for path, site in cut.sites.items():
        wanted = merged_values(model, "exact")[f"{path}.weight"] - base[f"{path}.weight"]
        apart = found[f"{path}.weight"] - base[f"{path}.weight"] - wanted
        assert float(apart.norm()) == pytest.approx(site.error, rel=1e-3)
        assert float(wanted.norm()) == pytest.approx(site.norm, rel=1e-3)
        size, error = size + site.norm**2, error + site.error**2
    assert cut.error == pytest.approx((error / size) ** 0.5)
    assert 0 < cut.error < 1


def test_adapters_over_different_modules_are_united() -> None:
    first = LoraConfig(r=2, target_modules=("q_proj",), modules_to_save=("lm_head",))
    model, batch = two(first, LoraConfig(r=4, target_modules=("q_proj", "down_proj")))
    ingraft.activate(model, "a", "b")
    both = run(model, batch)
    made = ingraft.combine(model, {"a": 1.0, "b": 1.0}, "c", how="cat")
    close(run(model, batch), both, "cat over two sets of modules")
    assert {site.rank for path, site in made.sites.items() if path.endswith("q_proj")} == {6}
    assert {site.rank for path, site in made.sites.items() if path.endswith("down_proj")} == {4}
    assert made.sites["lm_head"].rank is None


def test_mixing_factors_is_cheap_and_says_what_it_costs() -> None:
    model, _ = two(LoraConfig(r=2, target_modules="all-linear"), LoraConfig(r=2, target_modules="all-linear"))
    assert ingraft.combine(model, {"a": 1.0, "b": 1.0}, "linear", how="linear").error > 0.1
    assert ingraft.combine(model, {"a": 1.0, "b": 1.0}, "cat", how="cat").error == 0.0


@pytest.mark.parametrize("how", [way for way in WAYS if "dare" in way])
def test_random_pruning_follows_its_seed(how: str) -> None:
    model, batch = two(LoraConfig(r=2), LoraConfig(r=2))
    found = []
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        ingraft.combine(model, {"a": 0.5, "b": 0.5}, name, how=how, density=0.5, seed=seed)
        found.append(run(model, batch))
    assert torch.equal(found[0], found[1])
    differs(found[0], found[2], "another seed")


def test_pruning_keeps_the_share_it_is_told() -> None:
    model = SUBJECTS["linear"].make_redrawn()
    ingraft.attach(model, LoraConfig(r=16, target_modules=("second",)), "a")
    randomise(model, "a")
    base = model.second.weight.detach().clone()
    change = merged_values(model, "a")["second.weight"] - base
    ingraft.combine(model, {"a": 1.0}, "pruned", how="magnitude_prune_svd", density=0.25, rank=16)
    pruned = merged_values(model, "pruned")["second.weight"] - base
    kept = pruned.abs() > 1e-4
    assert int(kept.sum()) == change.numel() // 4
    assert float(change[kept].abs().min()) >= float(change[~kept].abs().max())
    close(pruned[kept], change[kept], "what is kept")


# ------------------------------------------------------------------------------------------------- biases, norms, other methods


@TIED
def test_a_changed_bias_comes_along_exactly() -> None:
    """Beside a change of low rank it is the low-rank method's own bias; alone it needs no more than a vector."""
    model, batch = two(LoraConfig(r=2), BitFitConfig(), "bert")
    ingraft.activate(model, "a", "b")
    both = run(model, batch)
    made = ingraft.combine(model, {"a": 1.0, "b": 1.0}, "c", how="cat")
    close(run(model, batch), both, "LoRA and BitFit in one")
    assert made.method == "lora"
    assert {site.rank for path, site in made.sites.items() if "LayerNorm" in path} == {None}
    assert {site.rank for path, site in made.sites.items() if path.endswith("query")} == {2}


@pytest.mark.parametrize(
    "config", [PrefixTuningConfig(num_virtual_tokens=3), HoulsbyConfig(reduction_factor=4), IA3Config()]
)
def test_parameters_of_one_method_are_summed_whatever_the_method(config: Any) -> None:
    model, batch = two(config, config)
    before = run(model, batch)
    ingraft.combine(model, {"b": 1.0}, "copy", how="parameters")
    assert torch.equal(run(model, batch), before)
    ingraft.combine(model, {"a": 0.25, "b": 0.75}, "mean", how="parameters")
    a, b, mean = (ingraft.parameters(model, name) for name in ("a", "b", "mean"))
    for name, value in mean.items():
        close(value.detach(), (0.25 * a[name] + 0.75 * b[name]).detach(), name)


def test_a_combination_is_an_adapter_like_any_other(tmp_path: Path) -> None:
    """Several methods in one model, each saved and loaded; the combination too."""
    model, batch = two(LoraConfig(r=2), DoraConfig(r=2))
    ingraft.attach(model, HoulsbyConfig(reduction_factor=4), "h")
    ingraft.combine(model, {"a": 0.5, "b": 0.5}, "whole")
    ingraft.combine(model, {"a": 0.5, "b": 0.5}, "thin", rank=3)
    for name in ("a", "b", "h", "whole", "thin"):
        ingraft.activate(model, name)
        expected = run(model, batch)
        ingraft.save(model, tmp_path / name, name)
        other = SUBJECTS["llama"].make_redrawn()
        ingraft.load(other, tmp_path / name)
        assert torch.equal(run(other, batch), expected)


@pytest.mark.parametrize("form", ["nf4", "int8"])
def test_over_a_packed_base(form: str) -> None:
    """Changes are taken of the numbers the blocks stand for; without a rank a change of no low rank is asked to have one."""
    layers = nn.Sequential(quantised(nn.Linear(64, 64), QUANTISERS[form]), nn.Tanh(), nn.Linear(64, 5)).eval()
    batch = {"input": torch.randn(3, 64, generator=torch.Generator().manual_seed(1))}
    for name, config in (("a", LoraConfig(r=4, target_modules=("0",))), ("b", DoraConfig(r=4, target_modules=("0",)))):
        ingraft.attach(layers, config, name)
        randomise(layers, name)
    expected = run(layers, batch)
    ingraft.combine(layers, {"b": 1.0}, "full", rank=64)
    close(run(layers, batch), expected, "a DoRA as a LoRA of full rank", times=2.0)
    ingraft.activate(layers, "a")
    expected = run(layers, batch)
    ingraft.combine(layers, {"a": 1.0}, "copy", how="cat")
    close(run(layers, batch), expected, "a LoRA")
    with pytest.raises(IngraftError):
        ingraft.combine(layers, {"b": 1.0}, "whole")


def test_regression_20_a_bias_is_merged_with_its_scale() -> None:
    """alpha 64, rank 4, unit bias, zero input: active adds 16, and so does merged; over blocks of four bits, over eight, and combined."""
    for form in ("nf4", "int8"):
        model = nn.Sequential(quantised(nn.Linear(64, 64), QUANTISERS[form])).eval()
        zero = {"input": torch.zeros(1, 64)}
        before = run(model, zero)
        ingraft.attach(model, LoraConfig(r=4, lora_alpha=64, lora_bias=True, target_modules=("0",)), "a")
        with torch.no_grad():
            ingraft.parameters(model, "a")["0.lora_bias"].fill_(1.0)
        close(run(model, zero) - before, torch.full((1, 64), 16.0), "active")
        ingraft.combine(model, {"a": 1.0}, "again")
        close(run(model, zero) - before, torch.full((1, 64), 16.0), "combined")
        ingraft.merge(model)
        close(run(model, zero) - before, torch.full((1, 64), 16.0), "merged")


# --------------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"how": "magic"}, "no way 'magic'"),
        ({"how": "ties"}, "density"),
        ({"how": "ties_svd", "density": 1.5}, r"\(0, 1\]"),
        ({"how": "ties_svd", "density": 0.5, "majority_sign_method": "most"}, "majority_sign_method"),
        ({"rank": 0}, "at least 1"),
        ({"how": "linear"}, "ranks differ"),
        ({"how": "parameters"}, "differ in options"),
        ({"weights": {"a": 1.0, "h": 1.0}}, "not a change of weights"),
        ({"weights": {}}, "no adapter"),
        ({"weights": {"nobody": 1.0}}, "No adapter named"),
    ],
)
def test_what_cannot_be_combined_is_refused_and_nothing_changes(options: dict[str, Any], words: str) -> None:
    model, batch = two(LoraConfig(r=2), LoraConfig(r=3))
    ingraft.attach(model, HoulsbyConfig(), "h")
    before, names = run(model, batch), list(model.ingraft_control.adapters)
    with pytest.raises(IngraftError, match=words):
        ingraft.combine(model, **{"weights": {"a": 1.0, "b": 1.0}, "name": "c", **options})
    assert list(model.ingraft_control.adapters) == names
    assert torch.equal(run(model, batch), before)


# ------------------------------------------------------------------------------------------------------------------- conversion


@TIED
@pytest.mark.parametrize("subject", ["linear", "embedding", "conv2d", "attention", "mixtral", "bert"])
@pytest.mark.parametrize("name", MERGEABLE)
def test_any_mergeable_method_becomes_one_of_full_rank_exactly(name: str, subject: str) -> None:
    case = Case(row=row(name), subject=SUBJECTS[subject])
    if (reason := why_not(case)) is not None:
        pytest.skip(reason)
    model, batch = case.adapted("a"), case.batch()
    expected = run(model, batch)
    made = ingraft.convert(model, "a", 1000)
    close(run(model, batch), expected, "full rank")
    assert made.name == "a-lora"
    assert made.error < 1e-5


@pytest.mark.parametrize("subject", ["attention", "mixtral"])
def test_matrices_inside_a_module_are_converted_and_saved(subject: str, tmp_path: Path) -> None:
    """Projections of an attention and stacked experts: ranks by tensor, a file that loads."""
    case = Case(row=row("dora"), subject=SUBJECTS[subject])
    model, batch = case.adapted("a"), case.batch()
    made = ingraft.convert(model, "a", error=0.5)
    assert len({site.rank for site in made.sites.values()}) > 1
    assert 0 < made.error <= 0.5
    expected = run(model, batch)
    ingraft.save(model, tmp_path / "x", "a-lora", dtype=torch.float32)
    other = case.base()
    ingraft.load(other, tmp_path / "x")
    assert torch.equal(run(other, batch), expected)


def test_conversion_reports_the_error_it_makes() -> None:
    model, _ = two(DoraConfig(r=4), IA3Config())
    errors = [ingraft.convert(model, "a", rank, name=f"r{rank}").error for rank in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True)
    made = ingraft.convert(model, "a", error=0.3, name="near")
    assert 0.1 < made.error <= 0.3
    assert all(site.share <= 0.3 for site in made.sites.values())
    assert len({site.rank for site in made.sites.values()}) > 1
    text = str(made)
    assert "relative error" in text
    assert all(path in text for path in made.sites)
    for options in ({}, {"rank": 2, "error": 0.1}, {"error": 1.5}):
        with pytest.raises(IngraftError, match="convert"):
            ingraft.convert(model, "a", **options)
