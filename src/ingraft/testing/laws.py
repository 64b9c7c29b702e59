"""Laws of one adapter: refusal, identity, merge, unmerge, detach, the shortcut, switching off, counting."""

from __future__ import annotations

import torch

import ingraft.adapt as adapt
from ingraft.errors import IngraftError
from ingraft.methods.contract import ParameterPart
from ingraft.testing.cases import (
    Case,
    Snapshot,
    close,
    close_each,
    differs,
    force_general_path,
    gradients,
    has_shortcut,
    merge,
    on_weights,
    refused,
    run,
    same,
    shared_over_rows,
)
from ingraft.testing.suite import law


def no_weight_form(case: Case) -> str | None:
    """Methods that are no change of weights."""
    return None if on_weights(case) else "it is no change of weights, so a merge is refused"


@law(0, of_refusal=True)
def refuses_what_it_cannot_adapt(case: Case) -> None:
    """A method that has no place in a module is refused with an explanation, and the module is what it was."""
    model = case.base()
    before = Snapshot.of(model)
    refused(lambda: adapt.attach(model, case.config, "a"))
    before.assert_restored(model)


@law(0, hole=lambda case: None if case.method.over is None else "its modules are those of the adapters it acts on")
def refuses_a_pattern_without_match(case: Case) -> None:
    """A target that matches nothing is refused, by name, and the module is what it was."""
    import dataclasses

    model = case.base()
    before = Snapshot.of(model)
    refused(
        lambda: adapt.attach(model, dataclasses.replace(case.config, target_modules=("nosuchmodule",)), "a"),
        "nosuchmodule",
    )
    before.assert_restored(model)


@law(1, hole=lambda case: None if case.method.identity_at_init else "it does not claim to start as the identity")
def identity_at_init(case: Case) -> None:
    """A fresh adapter changes no output of the base (bitwise where nothing is added, within rounding where zero is)."""
    model = case.base()
    expected = run(model, case.batch())
    adapt.attach(model, case.config, "a", seed=3)
    close(run(model, case.batch()), expected, "fresh adapter and base")
    model.train()
    close(run(model, case.batch()), expected, "fresh adapter and base, training")


def _refuses_merge(case: Case) -> None:
    model = case.adapted("a", "b")
    bits = {key: value.clone() for key, value in model.state_dict().items()}
    expected = run(model, case.batch())
    refused(lambda: adapt.merge(model), case.method.name, "cannot be merged")
    refused(lambda: adapt.merge(model, "b"), case.method.name, "cannot be merged")
    refused(lambda: adapt.unmerge(model), "nothing is merged")
    for key, value in model.state_dict().items():
        same(value, bits[key], key)
    same(run(model, case.batch()), expected, "output after the refusal")


def _merged_is_active(case: Case, dtype: torch.dtype) -> None:
    model = case.adapted("a", dtype=dtype)
    batch = case.batch(dtype=dtype)
    active = run(model, batch)
    with adapt.disabled(model):
        differs(active, run(model, batch), "active and base")
    merge(model)
    merged = run(model, batch)
    close(merged, active, f"merged and active in {dtype}", dtype=dtype)
    assert adapt.status(model).adapters[0].merged
    adapt.detach(model, keep_merged=True)
    same(run(model, batch), merged, "merged for good and merged")


@law(2, refusal=no_weight_form, refuses=_refuses_merge)
def merged_is_active_float32(case: Case) -> None:
    """A merged adapter computes what the active one computes, in float32."""
    _merged_is_active(case, torch.float32)


@law(2, refusal=no_weight_form, refuses=_refuses_merge)
def merged_is_active_bfloat16(case: Case) -> None:
    """A merged adapter computes what the active one computes, within bfloat16's rounding; and both compute what float32 does."""
    _merged_is_active(case, torch.bfloat16)
    close(
        run(case.narrowed("a"), case.batch(dtype=torch.bfloat16)).float(),
        run(case.representable("a"), case.batch()),
        "active in bfloat16 and in float32",
        dtype=torch.bfloat16,
        times=2.0,
    )


@law(2, refusal=no_weight_form, refuses=_refuses_merge)
def merge_of_a_damaged_adapter_is_refused(case: Case) -> None:
    """A merge that would write a value that is not finite is refused and writes nothing, at any site."""
    model = case.adapted("a")
    bits = {key: value.clone() for key, value in model.state_dict().items() if "adapter:" not in key}
    last = list(adapt.parameters(model, "a").values())[-1]
    with torch.no_grad():
        last.view(-1)[0] = float("nan")
    refused(lambda: adapt.merge(model, untie=True), "not finite")
    for key, value in model.state_dict().items():
        if key in bits:
            same(value, bits[key], key)


@law(3, refusal=no_weight_form, refuses=_refuses_merge)
def unmerge_is_exact(case: Case) -> None:
    """Unmerge puts back the very tensors of the base: the same objects, the same bits, after one cycle and after 100 in bfloat16 (5 in models)."""
    for dtype, cycles in ((torch.float32, 1), (torch.bfloat16, 5 if case.subject.transformers else 100)):
        model = case.adapted("a", dtype=dtype)
        before = {key: (p, p.detach().clone()) for key, p in adapt.base_parameters(model).items()}
        active = run(model, case.batch(dtype=dtype))
        for _ in range(cycles):
            merge(model)
            adapt.unmerge(model)
        now = adapt.base_parameters(model)
        assert list(now) == list(before)
        for key, (parameter, bits) in before.items():
            assert now[key] is parameter, f"{key} is another tensor object after unmerge"
            same(now[key].detach(), bits, f"{key} after {cycles} cycles in {dtype}")
        same(run(model, case.batch(dtype=dtype)), active, "active after unmerge")


@law(4)
def detach_restores_everything(case: Case) -> None:
    """After the last detach type, names, tensors, bits, `requires_grad`, hooks and attributes are the base's own."""
    model = case.bare()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(parameter.is_floating_point() and index % 3 != 0)
    before = Snapshot.of(model)
    expected = run(model, case.batch())
    case.accompany(model)
    case.attach(model, "a")
    case.attach(model, "b")
    run(model, case.batch())
    adapt.activate(model, "b", "a")
    run(model, case.batch())
    if on_weights(case):
        merge(model)
        refused(lambda: adapt.detach(model), "unmerge")
        adapt.unmerge(model)
    adapt.detach(model, "b")
    adapt.detach(model)
    before.assert_restored(model)
    same(run(model, case.batch()), expected, "output after detach and before attach")


@law(4)
def detach_one_leaves_the_other(case: Case) -> None:
    """Detaching one of two adapters leaves the other as it would be alone."""
    model = case.adapted("a", "b")
    adapt.detach(model, "a")
    adapt.activate(model, "b")
    same(run(model, case.batch()), run(case.adapted("b"), case.batch()), "b after a has gone and b alone")


def _no_shortcut(case: Case) -> str | None:
    return None if has_shortcut(case) else "it has no shortcut: there is one path only"


@law(5, hole=_no_shortcut)
def shortcut_is_the_general_path(case: Case) -> None:
    """The way round the weight gives the outputs and the gradients that the definition `weight(W, b)` gives."""
    model, general = case.adapted("a"), case.adapted("a")
    assert force_general_path(general) > 0, "no host of this subject has a shortcut"
    batch = case.batch()
    close(run(model, batch), run(general, batch), "shortcut and general path")
    close_each(
        gradients(model, "a", batch),
        gradients(general, "a", batch),
        "gradient by shortcut and by general path",
        times=5.0,
    )


@law(5, hole=_no_shortcut)
def shortcut_is_the_general_path_for_two(case: Case) -> None:
    """With two adapters acting, too, the shortcut gives what the definition gives."""
    model, general = case.adapted("a", "b"), case.adapted("a", "b")
    force_general_path(general)
    for each in (model, general):
        adapt.activate(each, "b", "a")
    close(run(model, case.batch()), run(general, case.batch()), "shortcut and general path, two adapters", times=2.0)


@law(8)
def disabled_is_the_base(case: Case) -> None:
    """Switched off - by `disabled`, by an empty `activate`, by rows without adapters - the model gives the base's very bits."""
    model = case.base()
    batch = case.batch()
    expected = run(model, batch)
    case.attach(model, "a")
    active = run(model, batch)
    differs(active, expected, "active and base")
    with adapt.disabled(model):
        same(run(model, batch), expected, "disabled and base")
    same(run(model, batch), active, "active before and after `disabled`")
    with adapt.rows(model, [None] * 4):
        same(run(model, batch), expected, "rows without adapters and base")
    adapt.activate(model)
    same(run(model, batch), expected, "nothing active and base")
    adapt.activate(model, "a")
    same(run(model, batch), active, "active again")


@law(8)
def switching_leaves_trainability_alone(case: Case) -> None:
    """`disabled`, `activate`, `rows` and an exception inside them change no `requires_grad` and leave the state as it was."""
    model = case.adapted("a", "b")
    adapt.trainable(model, "b")
    adapt.activate(model, "a")
    flags = {key: p.requires_grad for key, p in model.named_parameters()}
    assert any(flags.values()) and not any(p.requires_grad for p in adapt.parameters(model, "a").values())
    active = run(model, case.batch())
    try:
        with adapt.disabled(model), adapt.rows(model, ["b"] * 4):
            raise IngraftError("left in the middle")
    except IngraftError:
        pass
    with adapt.rows(model, ["a", "b", None, "b"] if shared_over_rows(case) is None else ["b"] * 4):
        run(model, case.batch())
    adapt.activate(model, "b")
    adapt.activate(model, "a")
    assert {key: p.requires_grad for key, p in model.named_parameters()} == flags
    same(run(model, case.batch()), active, "active before and after")


@law(21)
def counts_by_its_formula(case: Case) -> None:
    """The method's formula gives the number of trained parameters, before anything is attached and for what is attached."""
    model = case.base()
    held = {id(p) for p in model.parameters()}
    bare = adapt.status(model).total
    if not case.subject.packed:
        assert bare == sum(p.numel() for p in {id(p): p for p in model.parameters()}.values())
    expected = adapt.expected_count(model, case.config)
    assert held == {id(p) for p in model.parameters()}, "counting attached something"
    adapt.attach(model, case.config, "a")
    own = adapt.parameters(model, "a")
    assert sum(p.numel() for p in own.values()) == expected > 0
    trained = {id(p): p for p in model.parameters() if p.requires_grad}
    assert set(trained) == {id(p) for p in own.values()}, "trainable parameters are not exactly the adapter's"
    status = adapt.status(model)
    assert status.trainable == next(one.parameters for one in status.adapters if one.name == "a") == expected
    assert status.total == bare + expected
    assert all(p.dtype == torch.float32 for p in own.values())
    if issubclass(case.part, ParameterPart):
        assert expected <= bare
