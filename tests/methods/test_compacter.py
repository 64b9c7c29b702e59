"""Compacter: one rule for all layers, sizes, and no mistaking its stacked factors for a mixture's experts."""

from __future__ import annotations

import pytest
import torch

from ingraft import adapt
from ingraft.adapt.roles import blocks
from ingraft.errors import IngraftError
from ingraft.methods.compacter import Compacter, CompacterConfig
from ingraft.methods.registry import make_config
from ingraft.testing.subjects import SUBJECTS


def _model(**options: object) -> torch.nn.Module:
    return adapt.attach(SUBJECTS["bert"].make_redrawn(), make_config("compacter", options), "a", seed=2)


def test_all_layers_share_one_rule_and_copies_one_of_their_own() -> None:
    import copy

    model = _model(phm_dim=2)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        rules = {id(bank) for part in one.modules() if isinstance(part, Compacter) for bank in part.bank}
        assert len(rules) == 1
    assert [key for key in adapt.parameters(model, "a") if "rule" in key] == ["shared.phm_rule"]
    (mine,), (theirs,) = (
        [p for key, p in adapt.parameters(one, "a").items() if "rule" in key] for one in (model, twin)
    )
    assert mine is not theirs and torch.equal(mine, theirs)


def test_a_rule_that_is_not_learned_is_kept_and_saved(tmp_path: object) -> None:
    model = _model(phm_dim=2, learn_phm=False, phm_init_range=0.5)
    assert not [key for key in adapt.parameters(model, "a") if "rule" in key]
    for parameter in adapt.parameters(model, "a").values():
        torch.nn.init.normal_(parameter, std=0.3)
    adapt.save(model, f"{tmp_path}/a", "a", dtype=torch.float32)
    other = SUBJECTS["bert"].make_redrawn()
    adapt.load(other, f"{tmp_path}/a")
    batch = SUBJECTS["bert"].batch(2)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, other(**batch).logits)


def test_own_rules_are_counted() -> None:
    bare = SUBJECTS["bert"].make_redrawn()
    shared, own = (
        adapt.expected_count(bare, CompacterConfig(phm_dim=2, shared_phm_rule=flag)) for flag in (True, False)
    )
    assert own - shared == 4 * 2 * 8 - 8, "two rules at each of four sites instead of one"
    model = _model(phm_dim=2, shared_phm_rule=False)
    assert sum(p.numel() for p in adapt.parameters(model, "a").values()) == own


def test_a_bottleneck_is_rounded_up_to_what_the_products_need() -> None:
    assert CompacterConfig(reduction_factor=32).inner(576) == 20
    assert CompacterConfig(reduction_factor=32).inner(768) == 24
    with pytest.raises(IngraftError, match="phm_dim=3 must divide the width 16"):
        _model(phm_dim=3)


@pytest.mark.parametrize("places", [None, ("block",)])
def test_a_second_adapter_finds_the_same_places(places: tuple[str, ...] | None) -> None:
    """Three-dimensional tensors of an adapter are no experts."""
    for name in ("bert", "llama"):
        model = SUBJECTS[name].make_redrawn()
        before = blocks(model)
        adapt.attach(model, CompacterConfig(phm_dim=2, target_modules=places), "a")
        assert blocks(model) == before
