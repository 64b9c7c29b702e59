"""Laws of training: who gets gradients, compilation, gradient checkpointing, autocast."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ingraft.adapt as adapt
from ingraft.methods.contract import AttentionPart, InputPart
from ingraft.testing.cases import (
    Case,
    close,
    close_each,
    differs,
    gradients,
    loss_of,
    merge,
    on_weights,
    output,
    run,
    shared_over_rows,
    taken,
)
from ingraft.testing.suite import law


@law(7)
def only_the_adapter_gets_gradients(case: Case) -> None:
    """Backward gives gradients to the acting adapter's parameters, to all of them, and to nothing else."""
    model, batch = case.adapted("a", "b"), case.batch()
    adapt.trainable(model, "a", "b")
    unreachable = _without_gradient(case, batch)
    found = gradients(model, "a", batch)
    for key, gradient in found.items():
        assert torch.isfinite(gradient).all(), f"{key}: gradient not finite"
        assert gradient.abs().max() > 0 or key.rpartition(".")[0] in unreachable, f"{key}: gradient is zero everywhere"
    own = {id(p) for p in adapt.parameters(model, "a").values()}
    strangers = [key for key, p in model.named_parameters() if p.grad is not None and id(p) not in own]
    assert not strangers, f"gradients where nothing trains: {strangers}"


def _without_gradient(case: Case, batch: dict[str, Tensor]) -> set[str]:
    """Modules whose own parameters get no gradient in the base either (a relative bias of a single token, say)."""
    model = case.base()
    adapt.make_dense(model)
    model.requires_grad_(True)
    loss_of(output(model, batch)).backward()
    reached: dict[str, bool] = {}
    for key, p in model.named_parameters():
        owner = key.rpartition(".")[0]
        reached[owner] = reached.get(owner, False) or (p.grad is not None and bool(p.grad.abs().max() > 0))
    return {owner for owner, any_reached in reached.items() if not any_reached}


@law(7, hole=lambda case: case.row.inexact)
def a_step_reduces_the_loss(case: Case) -> None:
    """A small step against the gradient lowers the loss by what the gradient says (first order), so the gradients are right."""
    model, batch = case.adapted("a"), case.batch()
    before = float(loss_of(output(model, batch)).detach().double())
    found = gradients(model, "a", batch)
    norm = sum(float(g.double().square().sum()) for g in found.values())
    assert norm > 0
    step = 2e-3 / norm**0.5
    values = {key: p.detach().clone() for key, p in adapt.parameters(model, "a").items()}
    losses = []
    for sign in (1.0, -1.0):
        with torch.no_grad():
            for key, p in adapt.parameters(model, "a").items():
                p.copy_(values[key] + sign * step * found[key])
        losses.append(float(loss_of(run(model, batch)).double()))
    slope = (losses[0] - losses[1]) / (2 * step * norm)
    assert abs(slope - 1.0) < 0.05 or abs(losses[0] - losses[1]) < 20 * 1.2e-7 * abs(before), (
        f"measured slope / gradient = {slope:.4f}"
    )


# ----------------------------------------------------------------------------------------------------------- compilation


def _compiled(model: nn.Module) -> Callable[..., Any]:
    return torch.compile(model, fullgraph=True, backend="eager", dynamic=False)


def _graphs(action: Callable[[], object]) -> int:
    """How many graphs an action makes."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    action()
    return counters["stats"]["unique_graphs"] - before


def _worth_compiling(case: Case) -> bool:
    """A graph of a model takes seconds, and hosts compile alike everywhere: every method once, every kind of host in a model once."""
    if case.subject.transformers:
        in_model = issubclass(case.part, AttentionPart | InputPart) or case.method.name in ("lora", "parallel")
        return case.subject.name == "llama" and in_model
    return case.subject.plain == case.layer or case.method.name == "lora"


def _of_a_family(case: Case) -> bool:
    """What sets of adapters and steps of dropout cost is the hosts' doing; that each method's own arithmetic compiles, forward and back, is
    `compiles_before_attach_and_in_training`."""
    return _worth_compiling(case) and (case.exemplary or case.method.name == "parallel")


@law(11, heavy=True, everyday=_of_a_family)
def compiles_to_one_graph_for_each_active_set(case: Case) -> None:
    """Compiled in full graph the model computes the same, and switching back and forth costs one graph for each set of adapters."""
    torch._dynamo.reset()
    model, batch = case.adapted("a", "b"), case.batch()
    sets: tuple[tuple[str, ...], ...] = (("a",), ()) if case.subject.transformers else (("a",), ("b",), (), ("a", "b"))
    expected: dict[tuple[str, ...], Tensor] = {}
    for names in sets:
        adapt.activate(model, *names)
        expected[names] = run(model, batch)
    compiled = _compiled(model)

    def visit() -> None:
        for names in sets:
            adapt.activate(model, *names)
            with torch.no_grad():
                result = compiled(**batch)
            close(
                result if isinstance(result, Tensor) else result[0],
                expected[names],
                f"compiled and not, {names} acting",
            )

    made = _graphs(visit)
    assert made <= len(sets), f"{made} graphs for {len(sets)} sets of adapters"
    again = _graphs(visit)
    assert again == 0, f"{again} more graphs for sets seen before"
    torch._dynamo.reset()


@law(11, heavy=True, everyday=_worth_compiling)
def compiles_before_attach_and_in_training(case: Case) -> None:
    """A model compiled before its adapter was attached computes with it, and its gradients are those of the model not compiled."""
    torch._dynamo.reset()
    model, batch = case.base(), case.batch()
    compiled = _compiled(model)
    if not case.subject.transformers:  # a graph of the base, to be left behind
        with torch.no_grad():
            compiled(**batch)
    case.attach(model, "a")
    plain = gradients(model, "a", batch)
    for p in model.parameters():
        p.grad = None
    result = compiled(**batch)
    loss_of(result if isinstance(result, Tensor) else result[0]).backward()
    close_each(taken(model, "a"), plain, "gradients compiled and not", times=5.0)
    torch._dynamo.reset()


@law(
    11,
    heavy=True,
    everyday=_of_a_family,
    hole=lambda case: None if case.dropout else "it has no dropout, or it is refused there",
)
def dropout_compiles_to_one_graph(case: Case) -> None:
    """Compiled with dropout, every step has a mask of its own, the one it has without compiling, and steps cost no graphs."""
    torch._dynamo.reset()
    model, batch = case.adapted("a", dropout=0.3), case.batch()
    model.train()
    compiled = _compiled(model)
    outputs: list[Tensor] = []

    def step() -> None:
        result = compiled(**batch)
        outputs.append(result if isinstance(result, Tensor) else result[0])

    assert _graphs(step) == 1
    assert _graphs(step) + _graphs(step) == 0, "a step made a graph of its own"
    for number, result in enumerate(outputs, start=1):
        adapt.dropout_step(model, number)
        close(result.detach(), run(model, batch), f"step {number}, compiled and not")
    if case.subject.plain != "embedding":  # a lookup drops nothing
        differs(outputs[0].detach(), outputs[1].detach(), "two steps", least=1e-3)
    torch._dynamo.reset()


# ----------------------------------------------------------------------------------------------------- gradient checkpointing


def _checkpointing(model: Any, reentrant: bool) -> None:
    """Switch transformers' gradient checkpointing on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()


def _plain_model(case: Case) -> str | None:
    return None if case.subject.transformers else "the module has no checkpointing of its own; see recomputed_by_torch"


def _transformers_model(case: Case) -> str | None:
    return "the model checkpoints itself; see checkpointing_changes_no_gradient" if case.subject.transformers else None


MIXED = ("a", "b", None, "a")


def _both(model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The gradients that `a` and `b` have now, where they have any."""
    return {
        name: {key: p.grad.clone() for key, p in adapt.parameters(model, name).items() if p.grad is not None}
        for name in ("a", "b")
    }


def _backward(model: nn.Module, batch: dict[str, Tensor], between: Callable[[], None]) -> dict[str, dict[str, Tensor]]:
    """Gradients of `a` and `b`, with something done between forward and backward."""
    for p in model.parameters():
        p.grad = None
    loss = loss_of(output(model, batch))
    between()
    loss.backward()
    return _both(model)


def _rows_then_leave(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    for p in model.parameters():
        p.grad = None
    with adapt.rows(model, MIXED):
        loss = loss_of(output(model, batch))
    loss.backward()
    return _both(model)


@law(12, heavy=True, hole=_plain_model)
def checkpointing_changes_no_gradient(case: Case) -> None:
    """With the model's own gradient checkpointing, reentrant or not, gradients are what they are without, also where another adapter was
    activated, all were switched off, or `rows` was left before backward; the recomputation sees what the forward pass saw."""
    batch = case.batch()
    dropout = 0.3 if case.dropout else 0.0
    for reentrant in (True, False):
        plain, saving = case.adapted("a", "b", dropout=dropout), case.adapted("a", "b", dropout=dropout)
        for model in (plain, saving):
            adapt.trainable(model, "a", "b")
            model.train()
            adapt.dropout_step(model, 4)
        _checkpointing(saving, reentrant)
        switches: list[Callable[[Any], Callable[[], None]]] = [
            lambda model: lambda: None,
            lambda model: lambda: adapt.activate(model, "b"),
            lambda model: lambda: adapt.activate(model),
            lambda model: lambda: adapt.dropout_step(model, 9),
        ]
        for index, switch in enumerate(switches):
            what = f"reentrant={reentrant}, switch {index}"
            for model in (plain, saving):
                adapt.activate(model, "a")
                adapt.dropout_step(model, 4)
            _agree(_backward(saving, batch, switch(saving)), _backward(plain, batch, lambda: None), what)
        if shared_over_rows(case) is not None:
            continue
        for model in (plain, saving):
            adapt.dropout_step(model, 4)
        _agree(_rows_then_leave(saving, batch), _rows_then_leave(plain, batch), f"reentrant={reentrant}, rows left")


def _agree(saving: dict[str, dict[str, Tensor]], plain: dict[str, dict[str, Tensor]], what: str) -> None:
    for name, expected in plain.items():
        got = {key: gradient for key, gradient in saving[name].items() if key in expected}
        extra = [key for key, g in saving[name].items() if key not in expected and g.abs().max() > 0]
        assert not extra, f"{what}: {name} got gradients it has not without checkpointing: {extra[:3]}"
        close_each(got, expected, f"gradients of {name}, {what}", times=8.0)
    assert plain["a"], "nothing was compared"


class Recomputed(nn.Module):
    """A module run under torch's own checkpointing by code that knows nothing of adapters."""

    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        if not self.reentrant:
            return checkpoint(self.inner, x, use_reentrant=False)
        # Reentrant checkpointing wants an input that requires a gradient; ids cannot.
        handle = torch.zeros((), requires_grad=True)
        return checkpoint(lambda given, _: self.inner(given), x, handle, use_reentrant=True)


@law(12, hole=_transformers_model)
def recomputed_by_torch(case: Case) -> None:
    """Under torch.utils.checkpoint, reentrant or not, gradients are what they are without, also where another adapter was activated or
    `rows` was left before backward."""
    batch = case.batch()
    switches: tuple[Callable[[nn.Module], None], ...] = (
        lambda model: None,
        lambda model: adapt.activate(model, "b"),
        lambda model: adapt.activate(model),
    )
    for reentrant in (True, False):
        for index, switch in enumerate(switches):
            plain, inner = _pair(case), _pair(case)
            loss = loss_of(Recomputed(inner, reentrant)(batch["x"]))
            switch(inner)
            loss.backward()
            _agree(_both(inner), _backward(plain, batch, lambda: None), f"reentrant={reentrant}, switch {index}")
        plain, inner = _pair(case), _pair(case)
        with adapt.rows(inner, MIXED):
            loss = loss_of(Recomputed(inner, reentrant)(batch["x"]))
        loss.backward()
        _agree(_both(inner), _rows_then_leave(plain, batch), f"reentrant={reentrant}, rows left")


def _pair(case: Case) -> Any:
    model = case.adapted("a", "b")
    adapt.trainable(model, "a", "b")
    return model


# ---------------------------------------------------------------------------------------------------------------- autocast


def _base_fails_under_autocast(case: Case) -> str | None:
    if case.subject.name == "encoder":
        return "the base fails by itself: torch's fused encoder takes no note of autocast on the CPU"
    return None


@law(23, hole=_base_fails_under_autocast)
def autocast_agrees(case: Case) -> None:
    """Under autocast to bfloat16 an adapter gives what it gives in float32 within bfloat16's rounding, merged or active, and trains."""
    model, batch = case.representable("a"), case.batch()
    expected = run(model, batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        active = run(model, batch)
        close(active.float(), expected, "active under autocast and in float32", dtype=torch.bfloat16, times=2.0)
        found = gradients(model, "a", batch)
    # As one vector: a single entry may jump where a relu sees its input round to the other side.
    exact = gradients(model, "a", batch)
    got, wanted = (torch.cat([g.flatten() for g in one.values()]) for one in (found, exact))
    assert (distance := float((got - wanted).norm() / wanted.norm())) < 0.15, (
        f"gradients under autocast are off by {distance:.2f} of their size"
    )
    assert all(g.dtype == torch.float32 for g in found.values())
    if on_weights(case):
        merge(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            close(run(model, batch), active, "merged and active under autocast", dtype=torch.bfloat16, times=2.0)
    elif issubclass(case.part, InputPart):
        assert active.shape == expected.shape
