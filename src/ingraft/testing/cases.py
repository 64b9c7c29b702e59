"""One method on one subject, and the measures the laws are stated with.

A *case* makes bases and adapted models that are the same each time it is asked: an adapter's values depend on its name alone, so that the
adapter `a` of a pair, of a copy and of a model of its own is one adapter. Values are drawn anew after attaching (`randomise`): at its
initial values an adapter changes nothing, and every law about it would hold of one that does nothing.

The tolerances stand in `TOLERANCE` and nowhere else.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.adapt.building import own_sizes
from ingraft.adapt.control import HOST_ATTRIBUTE, HostState, child_name, control_of, host_state, require_control
from ingraft.adapt.select import PLACES, base_modules, select
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.methods.contract import (
    AttentionPart,
    InputPart,
    Method,
    MethodConfig,
    OutputPart,
    ParameterPart,
    ShortcutPart,
    WeightPart,
    everywhere,
)
from ingraft.testing.subjects import FAMILIES, Subject
from ingraft.testing.table import METHODS, Row

TOLERANCE: Mapping[torch.dtype, float] = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
"""Largest difference allowed where two ways of computing the same are compared: root mean square, as a share of what is expected.

No single entry may be off by more than `PEAK` times that. bfloat16 rounds at 4e-3, float32 at 6e-8; an output gathers some ten roundings
on its way through a model of two layers, and single entries of it lie where large numbers cancel.
"""

PEAK = 10.0

EFFECT = 1e-2
"""The least an adapter under test must change, as a share of the output: less, and the comparison would prove nothing."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method, with the options it is tried with, on one subject."""

    row: Row
    subject: Subject

    def __str__(self) -> str:
        return f"{self.method.name}-{self.subject.name}"

    @property
    def method(self) -> Method:
        """The facts of the method."""
        return registry.load(self.row.config.method)

    @property
    def exemplary(self) -> bool:
        """Whether laws that need one method of each family are tried with this one; a method that the package does not know has no other to stand
        for it."""
        return self.method.name in FAMILIES or self.method.name not in METHODS

    @property
    def layer(self) -> str:
        """The subject that stands for all layers by themselves: linear ones, or embeddings for a method of tokens."""
        return "embedding" if self.method.sites == ("tokens",) else "linear"

    @property
    def config(self) -> MethodConfig:
        """The options on this subject; a plain module's layers are named unless the options name some already."""
        config = self.row.elsewhere.get(self.subject.plain, self.row.config)
        if config.target_modules is not None or self.method.over is not None:
            return config
        if not (self.subject.targets or self.subject.outputs):
            return config
        if issubclass(self.method.part, WeightPart) and self.method.sites != ("biases",):
            return replace(config, target_modules=self.subject.targets, target_parameters=self.subject.parameters)
        if issubclass(self.method.part, OutputPart) and not self.subject.transformers:
            return replace(config, target_modules=self.subject.outputs or self.subject.targets)
        return config

    @property
    def dropout(self) -> str | None:
        """The name of the dropout option that may be set here, None if there is none."""
        return None if self.subject.reads and issubclass(self.part, WeightPart) else self.row.dropout

    @property
    def part(self) -> type[nn.Module]:
        """The method's part class, which says what kind of method it is."""
        return self.method.part

    def base(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The subject with nothing attached, or with the row's companions, none of which acts."""
        model = self.bare(dtype)
        self.accompany(model)
        return model

    def bare(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        """The subject with nothing attached."""
        return self.subject.make_redrawn().to(dtype)

    def accompany(self, model: nn.Module) -> None:
        """Attach the row's companions."""
        for name, config in self.row.companions.items():
            if unfit_for_outputs(self.subject) is not None:
                break
            if not self.subject.transformers:
                config = replace(config, target_modules=self.subject.outputs)
            elif self.subject.targets is not None and issubclass(registry.load(config.method).part, WeightPart):
                config = replace(config, target_modules=self.subject.targets)
            adapt.attach(model, config, name, seed=zlib.crc32(name.encode()))
            randomise(model, name)
            adapt.activate(model)
            adapt.trainable(model)

    def detach(self, model: nn.Module) -> None:
        """Leave the model as `base` made it."""
        adapt.detach(model, *(name for name in require_control(model).adapters if name not in self.row.companions))

    def batch(self, n: int = 4, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """n rows for the subject."""
        return {
            key: value.to(dtype) if value.is_floating_point() else value for key, value in self.subject.batch(n).items()
        }

    def adapted(self, *names: str, dtype: torch.dtype = torch.float32, dropout: float = 0.0) -> Any:
        """The subject with adapters of these names, values drawn from the names; only the first one acts."""
        model = self.base(dtype)
        for name in names:
            self.attach(model, name, dropout=dropout)
        if len(names) > 1:
            adapt.activate(model, names[0])
        return model

    def narrowed(self, name: str) -> Any:
        """The subject in bfloat16 with the adapter that `adapted` makes in float32. One that starts from the weight's singular vectors would be
        another one there, where the rounding of the weight turns vectors of like values into each other."""
        model, full = self.adapted(name, dtype=torch.bfloat16), self.representable(name)
        own = child_name(name)
        for path, module in full.named_modules():
            if path.rpartition(".")[2] == own:
                found = model.get_submodule(path)
                for target, source in zip(_tensors(found), _tensors(module), strict=True):
                    target.data.copy_(source)
        return model

    def representable(self, name: str) -> Any:
        """The subject in float32 with an adapter whose values are numbers of bfloat16: what a method chooses by (VB-LoRA's largest logits) is then
        the same in both dtypes, and only the arithmetic rounds."""
        model = self.adapted(name)
        with torch.no_grad():
            for parameter in adapt.parameters(model, name).values():
                parameter.copy_(parameter.to(torch.bfloat16))
        return model

    def attach(self, model: nn.Module, name: str, *, dropout: float = 0.0) -> None:
        """Attach an adapter whose values depend on its name."""
        config = self.config if not dropout or self.dropout is None else replace(self.config, **{self.dropout: dropout})  # type: ignore[arg-type]
        adapt.attach(model, config, name, seed=zlib.crc32(name.encode()))
        randomise(model, name)


def _tensors(part: nn.Module) -> list[Tensor]:
    return [*part.parameters(), *part.buffers()]


def why_not(case: Case) -> str | None:
    """Why this method cannot be attached to this subject, or None. Law 0 asserts that it is then refused."""
    part, subject = case.part, case.subject
    if issubclass(part, AttentionPart | InputPart) and not subject.transformers:
        return "has its place in a transformers model's attention or input"
    if issubclass(part, OutputPart) and (reason := unfit_for_outputs(subject)) is not None:
        return reason
    if issubclass(part, InputPart) and subject.name == "vit":
        return "an image has no tokens to put a prompt in front of"
    on_weights = any(issubclass(registry.load(one.method).part, WeightPart) for one in case.row.companions.values())
    if on_weights and subject.name == "attention":
        return "of adapters on weights only those of linear layers can be acted on"
    return _refusal(case)


def unfit_for_outputs(subject: Subject) -> str | None:
    """Why no bottleneck finds a place in this subject, or None."""
    if not subject.transformers and not subject.outputs:
        return "a bottleneck acts on vectors of features, which neither a lookup nor a picture's channels are"
    return None


_REFUSALS: dict[tuple[str, str, str], str | None] = {}


def _refusal(case: Case) -> str | None:
    """What the method itself says against the subject's sites (`Method.refuses`), the first site's reason."""
    if case.method.refuses is everywhere and not set(case.method.sites) & set(PLACES):
        return None
    key = case.method.name, case.subject.name, repr(case.config)
    if key not in _REFUSALS:
        model, config = case.base(), case.config
        try:
            sites, _, _ = select(model, config, case.method)
            own_sizes(model, case.method, config, sites)
        except IngraftError as error:  # no such place in this module, or not for this method
            return _REFUSALS.setdefault(key, error.problems[0])
        _REFUSALS[key] = None
    return _REFUSALS[key]


# ------------------------------------------------------------------------------------------------------------------- measures


@torch.no_grad()
def randomise(model: nn.Module, name: str, *, scale: float = 1.0) -> None:
    """Move an adapter's values away from where they started, by half their size and at least 0.2, from a seed of its name."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + 1)
    for parameter in adapt.parameters(model, name).values():
        size = max(float(parameter.square().mean().sqrt()), 0.2)
        parameter += (0.5 * scale * size * torch.randn(parameter.shape, generator=generator)).to(parameter)


def output(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What a model is for: its result, or the first tensor of it."""
    result = model(**batch)
    return result if isinstance(result, Tensor) else result[0]


def run(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """`output` without gradients."""
    with torch.no_grad():
        return output(model, batch)


def gradients(model: nn.Module, name: str, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of one adapter under a fixed loss of the batch."""
    for parameter in model.parameters():
        parameter.grad = None
    loss_of(output(model, batch)).backward()
    return taken(model, name)


def taken(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The gradients an adapter has now."""
    missing = [key for key, p in adapt.parameters(model, name).items() if p.grad is None]
    assert not missing, f"no gradient for {', '.join(missing)}"
    return {key: p.grad.clone() for key, p in adapt.parameters(model, name).items() if p.grad is not None}


def loss_of(y: Tensor) -> Tensor:
    """A loss that no symmetry of the output makes flat."""
    weights = torch.linspace(-1.0, 1.5, y.numel(), dtype=torch.float32).sin().reshape(y.shape)
    return (y.float() * weights + 0.1 * y.float().square()).mean()


def close(actual: Tensor, expected: Tensor, what: str, *, dtype: torch.dtype | None = None, times: float = 1.0) -> None:
    """Assert that two tensors agree within the tolerance of the dtype they were computed in."""
    assert actual.shape == expected.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(expected.shape)}"
    allowed = times * TOLERANCE[dtype or expected.dtype]
    distance, peak = difference(actual, expected)
    assert distance <= allowed, f"{what}: differ by {distance:.2e} of their size, {allowed:.0e} is allowed"
    assert peak <= PEAK * allowed, (
        f"{what}: one entry is off by {peak:.2e} of their size, {PEAK * allowed:.0e} is allowed"
    )


def difference(actual: Tensor, expected: Tensor, size: float = 0.0) -> tuple[float, float]:
    """The difference, root mean square and largest, as shares of the size of what is expected; infinite if not a number."""
    if not expected.numel():
        return 0.0, 0.0
    size = max(float(expected.double().square().mean().sqrt()), size, 1e-12)
    apart = actual.double() - expected.double()
    found = float(apart.square().mean().sqrt()) / size, float(apart.abs().max()) / size
    return (float("inf"), float("inf")) if any(value != value for value in found) else found


def close_each(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    what: str,
    *,
    dtype: torch.dtype | None = None,
    times: float = 1.0,
) -> None:
    """`close` for tensors by name. One yardstick for all: a gradient that is zero in exact arithmetic is noise of the others' size."""
    assert list(actual) == list(expected), f"{what}: {sorted(set(actual) ^ set(expected))}"
    size = max((float(value.double().square().mean().sqrt()) for value in expected.values()), default=0.0)
    allowed = times * TOLERANCE[dtype or torch.float32]
    for name, value in expected.items():
        distance, peak = difference(actual[name], value, 0.02 * size)
        assert distance <= allowed, f"{what}: {name} differs by {distance:.2e} of its size, {allowed:.0e} is allowed"
        assert peak <= PEAK * allowed, (
            f"{what}: an entry of {name} is off by {peak:.2e} of its size, {PEAK * allowed:.0e} is allowed"
        )


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Assert that two tensors have the same bits."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} and {expected.dtype}"
    assert torch.equal(actual, expected), (
        f"{what}: not the same bits, largest difference {difference(actual, expected)[1]:.2e} of their size"
    )


def differs(actual: Tensor, other: Tensor, what: str, *, least: float = EFFECT) -> None:
    """Assert that two tensors are visibly not the same."""
    assert actual.shape == other.shape, f"{what}: shapes {tuple(actual.shape)} and {tuple(other.shape)}"
    distance, _ = difference(actual, other)
    assert distance >= least, f"{what}: hardly differ ({distance:.1e} of their size), so nothing is shown"


def refused(action: Any, *words: str) -> None:
    """Assert that an action raises an IngraftError whose text has these words."""
    try:
        action()
    except IngraftError as error:
        text = str(error)
        assert text.strip(), "the refusal says nothing"
        missing = [word for word in words if word not in text]
        assert not missing, f"the refusal does not say {missing}: {text}"
    else:
        raise AssertionError("should have been refused")


def force_general_path(model: nn.Module) -> int:
    """Let no host use a shortcut any more; returns how many could."""
    states = [state for module in model.modules() if (state := host_state(module)) is not None]
    forced = sum(state.known_forward for state in states)
    for state in states:
        state.known_forward = False
    return forced


def has_shortcut(case: Case) -> bool:
    """Whether the method has a way round the weight."""
    return issubclass(case.part, ShortcutPart)


def on_weights(case: Case) -> bool:
    """Whether the method is defined by weights, and so can be merged."""
    return issubclass(case.part, WeightPart | ParameterPart)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """Everything of a model that an adapter must give back."""

    types: dict[str, type]
    parameters: dict[str, tuple[int, bool, Tensor]]
    buffers: dict[str, Tensor]
    attributes: dict[str, tuple[str, ...]]
    hooks: dict[str, int]
    training: dict[str, bool]
    config: object
    adapters: tuple[str, ...]

    @staticmethod
    def of(model: nn.Module) -> Snapshot:
        """Take it."""
        modules = base_modules(model)
        config = getattr(model, "config", None)
        return Snapshot(
            types={path: type(module) for path, module in modules.items()},
            parameters={
                key: (id(p), p.requires_grad, p.detach().clone())
                for key, p in model.named_parameters(remove_duplicate=False)
            },
            buffers={key: buffer.clone() for key, buffer in model.named_buffers()},
            attributes={path: tuple(sorted({*module.__dict__, *module._modules})) for path, module in modules.items()},
            hooks={
                path: len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
                for path, module in modules.items()
            },
            training={path: module.training for path, module in modules.items()},
            config=config.to_dict() if config is not None and hasattr(config, "to_dict") else None,
            adapters=tuple(control.adapters) if (control := control_of(model)) is not None else (),
        )

    def assert_restored(self, model: nn.Module) -> None:
        """Assert that the model is as it was: the very classes, the very tensors, their bits, names, flags, hooks."""
        now = Snapshot.of(model)
        for field in ("types", "attributes", "hooks", "training", "config"):
            was, is_now = getattr(self, field), getattr(now, field)
            assert was == is_now, f"{field} changed: {_changes(was, is_now)}"
        assert list(now.parameters) == list(self.parameters), sorted(set(now.parameters) ^ set(self.parameters))
        for key, (identity, requires_grad, bits) in self.parameters.items():
            new_identity, new_requires_grad, new_bits = now.parameters[key]
            assert new_identity == identity, f"{key} is another tensor object than before"
            assert new_requires_grad == requires_grad, f"{key}.requires_grad was {requires_grad}"
            same(new_bits, bits, key)
        assert list(now.buffers) == list(self.buffers)
        for key, buffer in self.buffers.items():
            same(now.buffers[key], buffer, key)
        assert now.adapters == self.adapters
        if not self.adapters:
            assert control_of(model) is None
            assert all(HOST_ATTRIBUTE not in module.__dict__ for module in model.modules())


def _changes(was: Any, is_now: Any) -> str:
    if not (isinstance(was, dict) and isinstance(is_now, dict)):
        return f"{was!r} -> {is_now!r}"
    return "; ".join(
        f"{key}: {was.get(key)!r} -> {is_now.get(key)!r}"
        for key in {**was, **is_now}
        if was.get(key) != is_now.get(key)
    )


def merge(model: nn.Module, *names: str) -> None:
    """Merge; where the base ties what would be written, see that this is refused and that `untie=True`, which the refusal names, is obeyed."""
    owned = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    try:
        adapt.merge(model, *names)
    except IngraftError as error:
        assert len(owned) > len(set(owned)) and "is tied to" in str(error) and "untie=True" in str(error), str(error)
        adapt.merge(model, *names, untie=True)


def shared_over_rows(case: Case) -> str | None:
    """Why the adapters of this case cannot differ from row to row, or None."""
    if case.method.sites == ("parameters",) and case.subject.name == "t5":
        return "T5's relative position bias is computed once for the whole batch: refused by name"
    return None


def states(model: nn.Module) -> list[HostState]:
    """The states of a model's hosts."""
    return [state for module in model.modules() if (state := host_state(module)) is not None]
