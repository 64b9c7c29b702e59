"""Laws of several adapters: independence, switching, composition, copies, mixed rows, dropout."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from torch import Tensor

import ingraft.adapt as adapt
from ingraft.methods.contract import ShortcutPart, WeightPart
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
    randomise,
    refused,
    run,
    same,
    shared_over_rows,
    taken,
)
from ingraft.testing.subjects import POOLED
from ingraft.testing.suite import law


@law(9)
def adapters_are_independent(case: Case) -> None:
    """Two adapters in one base are each what it is alone; switching between them is exact; training one moves only that one."""
    model, batch = case.adapted("a", "b"), case.batch()
    alone = {name: run(case.adapted(name), batch) for name in ("a", "b")}
    differs(alone["a"], alone["b"], "a and b")
    for name in ("a", "b", "a"):
        adapt.activate(model, name)
        same(run(model, batch), alone[name], f"{name} beside the other and {name} alone")
    other = {key: p.detach().clone() for key, p in adapt.parameters(model, "b").items()}
    adapt.trainable(model, "a", "b")
    loss_of(output(model, batch)).backward()
    taken(model, "a")
    assert all(p.grad is None for p in adapt.parameters(model, "b").values()), "b got a gradient though a acted"
    randomise(model, "a")
    for key, p in adapt.parameters(model, "b").items():
        same(p.detach(), other[key], key)


@law(9)
def two_active_compose_as_defined(case: Case) -> None:
    """Two acting adapters are: methods that add, W + (W_a - W) + (W_b - W); methods that chain, b on what a made. Order kept."""
    model, batch = case.adapted("a", "b"), case.batch()
    adapt.activate(model, "a", "b")
    both = run(model, batch)
    close(both, _reference(case, batch), "two active and their composition", times=2.0)
    if on_weights(case):
        merge(model, "a", "b")
        close(run(model, batch), both, "two merged and two active", times=2.0)
        adapt.unmerge(model)
    for name in ("a", "b"):
        adapt.activate(model, name)
        differs(both, run(model, batch), f"both and {name}")


def _reference(case: Case, batch: dict[str, Tensor]) -> Tensor:
    """The composition, without the code that composes."""
    part = case.part
    if on_weights(case) and not (issubclass(part, WeightPart) and part.composition == "chain"):
        base = case.base()
        adapt.make_dense(base)
        start = {key: p.detach() for key, p in base.named_parameters(remove_duplicate=False)}
        made: list[dict[str, Tensor]] = []
        for name in ("a", "b"):
            model = case.adapted(name)
            merge(model)
            adapt.detach(model, keep_merged=True)
            adapt.make_dense(model)
            made.append({key: p.detach() for key, p in model.named_parameters(remove_duplicate=False)})
        for key in made[0]:
            origin = start.get(key, torch.zeros(()))  # a bias that was not there
            owner, _, leaf = key.rpartition(".")
            value = origin + sum(one[key] - origin for one in made)
            base.get_submodule(owner)._parameters[leaf] = torch.nn.Parameter(value)
        return run(base, batch)
    if on_weights(case):
        model = case.adapted("a")
        merge(model)
        adapt.detach(model, keep_merged=True)
        case.attach(model, "b")
        return run(model, batch)
    # Methods without a weight: attached in the other order; activation order alone decides.
    model = case.base()
    case.attach(model, "b")
    case.attach(model, "a")
    adapt.activate(model, "a", "b")
    return run(model, batch)


@law(9, hole=lambda case: None if case.method.identity_at_init else "it does not claim to start as the identity")
def composing_with_an_identity_changes_nothing(case: Case) -> None:
    """An adapter that acts beside a fresh one, in either order, is what it is alone."""
    model, batch = case.adapted("a"), case.batch()
    alone = run(model, batch)
    adapt.attach(model, case.config, "fresh", seed=5)
    for names in (("a", "fresh"), ("fresh", "a")):
        adapt.activate(model, *names)
        close(run(model, batch), alone, f"{names} and a alone")


def _copies(model: Any) -> list[Any]:
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


@law(10)
def copies_are_independent(case: Case) -> None:
    """A deepcopy and a pickled copy compute the same bits, and nothing done to a copy is seen by the original, or the other way round."""
    model, batch = case.adapted("a", "b"), case.batch()
    adapt.trainable(model, "a", "b")
    active = run(model, batch)
    base_bits = run(case.base(), batch)
    adapt.activate(model, "b")
    other = run(model, batch)
    adapt.activate(model, "a")
    for twin in _copies(model):
        assert type(twin) is type(model) and type(twin).__qualname__ == type(model).__qualname__
        same(run(twin, batch), active, "copy and original")
        adapt.activate(twin, "b")
        same(run(twin, batch), other, "copy after a switch")
        same(run(model, batch), active, "original after the copy's switch")
        randomise(twin, "a")
        same(run(model, batch), active, "original after the copy's values changed")
        if on_weights(case):
            merge(twin, "b")
            same(run(model, batch), active, "original after the copy's merge")
            adapt.unmerge(twin)
        adapt.detach(twin)
        same(run(twin, batch), base_bits, "copy after its detach and base")
        same(run(model, batch), active, "original after the copy's detach")
        gradients(model, "a", batch)
    twin = copy.deepcopy(model)
    adapt.detach(model)
    same(run(twin, batch), active, "copy after the original's detach")


# ---------------------------------------------------------------------------------------------------------------- rows

MIX: tuple[Any, ...] = ("a", "b", None, "a", ("a", "b"), ("b", "a"))
"""One adapter, none, several, in both orders."""


def _one_row(batch: dict[str, Tensor], row: int, copies: int = 1) -> dict[str, Tensor]:
    return {key: value[row * copies : (row + 1) * copies] for key, value in batch.items()}


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _refuses_rows(case: Case) -> None:
    model = case.adapted("a", "b")
    expected = run(model, case.batch(2))
    with adapt.rows(model, ["a", "b"]):
        refused(lambda: run(model, case.batch(2)), "relative_attention_bias", "rows")
    same(run(model, case.batch(2)), expected, "output after the refusal")


VISIBLE = 1e-3
"""A mask's effect, as a share of the output: a fusion drops scores of an attention, a compacter entries before a bottleneck of two, which moves
little; rounding moves 1e-6."""


@law(13, refusal=shared_over_rows, refuses=_refuses_rows)
def mixed_rows_are_each_row_alone(case: Case) -> None:
    """In a batch whose rows have different adapters, or none, or several, each row is what it is alone."""
    model, batch = case.adapted("a", "b"), case.batch(len(MIX))
    with adapt.rows(model, MIX):
        mixed = run(model, batch)
    for row, entry in enumerate(MIX):
        adapt.activate(model, *_names(entry))
        close(mixed[row : row + 1], run(model, _one_row(batch, row)), f"row {row} ({entry}) in the batch and alone")


@law(
    13, hole=lambda case: None if case.subject.name == "bert" else "another model's: it is about a pooler inside of one"
)
def mixed_rows_are_pooled_alone(case: Case) -> None:
    """Each mixed row is the row alone also where the model itself pools its first column: what fills up a row never stands there."""
    mixed_rows_are_each_row_alone(Case(row=case.row, subject=POOLED))


@law(13, refusal=shared_over_rows, refuses=_refuses_rows)
def rows_that_agree_are_a_whole_batch(case: Case) -> None:
    """Rows that all name the same adapter are that adapter acting on the batch, and repeated rows (beams) count as their row."""
    model, batch = case.adapted("a", "b"), case.batch(4)
    with adapt.rows(model, ["a"] * 4):
        same(run(model, batch), run(case.adapted("a"), batch), "rows of one adapter and that adapter")
    with adapt.rows(model, ["b", None]):
        mixed = run(model, batch)
    with adapt.rows(model, ["b", "b", None, None]):
        same(mixed, run(model, batch), "two rows repeated twice and four rows")


@law(13, refusal=shared_over_rows, refuses=_refuses_rows)
def mixed_rows_train_each_adapter_by_its_rows(case: Case) -> None:
    """In a mixed batch the gradients of an adapter are those of its own rows alone."""
    model, batch = case.adapted("a", "b"), case.batch(4)
    adapt.trainable(model, "a", "b")
    entries = ["a", None, "b", "a"]
    with adapt.rows(model, entries):
        y = output(model, batch)
        loss_of(y).backward()
    mixed = {name: taken(model, name) for name in ("a", "b")}
    for name, own in (("a", [0, 3]), ("b", [2])):
        for p in model.parameters():
            p.grad = None
        adapt.activate(model, name)
        z = output(model, batch)
        keep = torch.zeros(4, *[1] * (z.dim() - 1))
        keep[own] = 1.0
        # Other rows enter the loss as the constants they are, so that the loss is the same function.
        loss_of(keep * z + (1 - keep) * y.detach()).backward()
        close_each(
            mixed[name], taken(model, name), f"gradients of {name} in the mixed batch and from its rows", times=5.0
        )


def _no_dropout(case: Case) -> str | None:
    return None if case.dropout else "it has no dropout, or it is refused there"


@law(13, hole=_no_dropout)
def dropout_belongs_to_the_row(case: Case) -> None:
    """A row's dropout mask depends on seed, step, site and row alone: not on the batch it is in, nor on the adapters of others."""
    if not _drops_something(case):
        return
    model = case.adapted("a", "b", dropout=0.4)
    model.train()
    batch, ids = case.batch(4), torch.tensor([17, 3, 99, 40])
    entries = ["a", "b", "a", None]
    adapt.dropout_step(model, 5, ids)
    with adapt.rows(model, entries):
        mixed = run(model, batch)
        same(run(model, batch), mixed, "the same step twice")
    for row, entry in enumerate(entries):
        adapt.activate(model, *_names(entry))
        adapt.dropout_step(model, 5, ids[row : row + 1])
        close(mixed[row : row + 1], run(model, _one_row(batch, row)), f"row {row} with dropout, in the batch and alone")
    adapt.activate(model, "a")
    adapt.dropout_step(model, 5, ids)
    at_five = run(model, batch)
    adapt.dropout_step(model, 6, ids)
    differs(run(model, batch), at_five, "two steps", least=VISIBLE)
    adapt.dropout_step(model, 5, ids + 1)
    differs(run(model, batch), at_five, "two identities of the rows", least=VISIBLE)
    model.eval()
    close(run(model, batch), run(case.adapted("a"), batch), "dropout in evaluation and no dropout")


def _drops_something(case: Case) -> bool:
    """A lookup has no input to drop: there dropout is none, which is asserted."""
    if not (issubclass(case.part, ShortcutPart) and case.subject.plain == "embedding"):
        return True
    model = case.adapted("a", dropout=0.4)
    model.train()
    same(run(model, case.batch()), run(case.adapted("a"), case.batch()), "a lookup with dropout and without")
    return False
