"""Hosts in places where frameworks pass over, iterate over or reuse modules; rows that cannot be told; what happens by itself."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import ingraft.adapt as adapt
from ingraft.adapt.control import require_control
from ingraft.errors import IngraftError
from ingraft.methods.full import FullConfig
from ingraft.methods.houlsby import HoulsbyConfig
from ingraft.methods.lora import LoraConfig
from ingraft.methods.parallel import ParallelConfig
from ingraft.testing.cases import close, differs, randomise, run, same
from ingraft.testing.subjects import SUBJECTS, redrawn


def adapted(model: nn.Module, config: object, name: str = "default") -> nn.Module:
    adapt.attach(model, config, name, seed=1)  # type: ignore[arg-type]
    randomise(model, name)
    return model


# ------------------------------------------------------------------------------------------------------- fused paths


@pytest.mark.parametrize("target", ["linear1", "linear2"])
def test_the_fused_path_of_an_encoder_layer_does_not_pass_over_an_adapter(target: str) -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    layer = redrawn(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0))
    with torch.no_grad():
        expected = layer(x)
        adapted(layer, LoraConfig(r=2, target_modules=[target]))
        active = layer(x)
        differs(active, expected, "adapter in an encoder layer and base")
        adapt.merge(layer)
        close(layer(x), active, "merged and active in an encoder layer")
        adapt.unmerge(layer)
        adapt.detach(layer)
        same(layer(x), expected, "the fused path after detach")


def test_the_fused_path_of_a_whole_encoder_does_not_pass_over_an_adapter() -> None:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 2, enable_nested_tensor=False
    )
    model = redrawn(encoder)
    with torch.no_grad():
        expected = model(x)
        adapted(model, LoraConfig(r=2, target_modules=["linear1"]))
        differs(model(x), expected, "adapter in an encoder and base")


class Bypassing(nn.Module):
    """Reads a layer's weight and never calls it."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        self.read = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.inner(x), self.read.weight)


def test_an_adapter_that_is_never_called_is_an_error_that_names_it() -> None:
    model = Bypassing()
    adapt.attach(model, LoraConfig(r=2, target_modules=["read", "inner.0"]))
    with pytest.raises(IngraftError, match="without calling read"):
        model(torch.ones(1, 4))
    model = Bypassing()
    adapt.attach(model, LoraConfig(r=2, target_modules=["inner.0"]))
    model(torch.ones(1, 4))


class Twins(nn.Module):
    """Calls one of two equal layers, and treats the other in a way of its own."""

    def __init__(self, treat: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.norm, self.treat = nn.Linear(4, 4), nn.Linear(4, 4), nn.BatchNorm1d(4), treat
        self.forwards = 0

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        self.forwards += 1
        if cache is not None:
            cache.length += len(x)
        return self.k(self.norm(nn.functional.dropout(x, 0.5, self.training))) + self.treat(self.q, x)


READS = {
    "product": lambda q, x: nn.functional.linear(x, q.weight),
    "view": lambda q, x: x @ q.weight[:2].data.T @ torch.ones(2, 4),
    "bias": lambda q, x: x + q.bias,
}
LEAVES = {
    "nothing": lambda q, x: x,
    "dtype": lambda q, x: x.to(q.weight.dtype),
    "shape": lambda q, x: x + q.weight.new_zeros(4) + torch.zeros_like(q.weight)[0] + q.weight.shape[0],
    "on_some_inputs": lambda q, x: q(x) if len(x) > 2 else x,
}


@pytest.mark.parametrize("way", READS)
def test_a_layer_that_is_read_beside_one_of_its_shape_that_ran_is_refused(way: str) -> None:
    model = redrawn(Twins(READS[way]))
    adapt.attach(model, LoraConfig(r=2, target_modules=["q", "k"]))
    with pytest.raises(IngraftError, match="without calling q:"):
        model(torch.ones(2, 4))


@pytest.mark.parametrize("way", LEAVES)
@pytest.mark.parametrize("training", [False, True])
def test_a_layer_that_is_not_called_on_this_input_is_no_error_and_looking_leaves_no_trace(
    way: str, training: bool
) -> None:
    """Output, gradients, running means and random numbers are those of the one forward; the look is taken once, not for every forward."""
    x, found = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)), []
    for unchecked in (True, False):
        model = redrawn(Twins(LEAVES[way]).train(training))
        adapted(model, LoraConfig(r=2, target_modules=["q", "k"]))
        require_control(model).unchecked = unchecked
        torch.manual_seed(3)
        y = model(x)
        y.sum().backward()
        found.append([y, *model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)])
        found[-1].append(torch.rand(3))
        assert model.forwards == 1 + unchecked
        model(x)
        assert model.forwards == 2 + unchecked
    assert len(found[0]) == len(found[1])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("mixed", [False, True])
def test_a_base_that_writes_into_its_input_writes_there_once(mixed: bool) -> None:
    """Neither the look for layers passed over nor the one for rows is a trace in what the caller gave."""
    model = redrawn(Twins(lambda q, x: x.add_(1)).eval())
    for name in ("a", "b"):
        adapt.attach(model, LoraConfig(r=2, target_modules=["q", "k"]), name=name)
    x = torch.zeros(2, 4)
    with adapt.rows(model, ["a", "b"]) if mixed else nullcontext():
        model(x)
    assert model.forwards == (4 if mixed else 2)
    assert torch.equal(x, torch.ones(2, 4))


@pytest.mark.parametrize(("length", "forwards", "refused"), [(0, 2, True), (3, 1, False)])
def test_a_cache_is_not_written_to_twice(length: int, forwards: int, refused: bool) -> None:
    """An empty one is copied for the second look; one that holds something may be large, so there is no second look."""

    class Cache:
        def __init__(self, length: int) -> None:
            self.length = length

        def get_seq_length(self) -> int:
            return self.length

    model, cache = redrawn(Twins(READS["product"])), Cache(length)
    adapt.attach(model, LoraConfig(r=2, target_modules=["q", "k"]))
    with pytest.raises(IngraftError, match="without calling q:") if refused else nullcontext():
        model(torch.ones(2, 4), cache=cache)
    assert (model.forwards, cache.length) == (forwards, length + 2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_look_at_the_base_is_not_what_a_recomputation_runs_with(reentrant: bool) -> None:
    """Blocks checkpointed by torch's own function are run again in backward with the adapters of the forward, not bare as in the look."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Twins(LEAVES["nothing"])

        def forward(self, x: Tensor, through: bool = False) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=reentrant) if through else self.inner(x)

    found = []
    for through in (False, True):
        model = adapted(redrawn(Outer().eval()), LoraConfig(r=2, target_modules=["q", "k"]))
        x = torch.randn(2, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
        model(x, through=through).square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 1
    for one, other in zip(*found, strict=True):
        close(one, other, "gradients, checkpointed and plain")


def test_a_whole_module_that_is_not_run_is_no_error() -> None:
    """Only a layer whose parent ran has been passed over: an encoder-decoder may run its encoder alone."""
    model = SUBJECTS["t5"].make_redrawn()
    adapt.attach(model, LoraConfig(r=2))
    with torch.no_grad():
        model.get_encoder()(input_ids=torch.tensor([[5, 6]]))  # type: ignore[operator]


# -------------------------------------------------------------------------------------------------------- containers


def test_a_sequential_host_does_not_run_its_adapters_as_layers() -> None:
    model = redrawn(nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)), nn.Linear(4, 4)))
    x = torch.randn(3, 4)
    expected = run_plain(model, x)
    adapt.attach(model, HoulsbyConfig(target_modules=["0"]))
    inner = model[0]
    assert len(inner) == 3 and [type(layer).__name__ for layer in inner] == ["Linear", "Tanh", "Linear"]
    assert isinstance(inner, nn.Sequential) and inner[2] is list(inner)[2] and inner[-1] is inner[2]
    same(run_plain(model, x), expected, "fresh adapter on a Sequential and base")
    randomise(model, "default")
    differs(run_plain(model, x), expected, "adapter on a Sequential and base")
    adapt.detach(model)
    same(run_plain(model, x), expected, "base after detach")


def run_plain(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def test_a_sequential_root_may_have_adapters() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapt.attach(model, LoraConfig(r=2, target_modules=["0", "1"]))
    assert len(model) == 2
    model(torch.ones(1, 4))


def test_one_module_used_twice_hosts_one_adapter() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.first(self.first(x)))

    model = redrawn(Twice())
    x = torch.randn(2, 4)
    adapted(model, LoraConfig(r=2, target_modules=["first"]))
    active = run_plain(model, x)
    adapt.merge(model)
    close(run_plain(model, x), active, "merged and active, a layer called twice")


# ------------------------------------------------------------------------------------------------------ rows and errors


def test_rows_errors_name_what_is_wrong() -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), "a")
    with pytest.raises(IngraftError, match="'b' is attached") as caught, adapt.rows(model, ["a", "b", "c"]):
        pass
    assert len(caught.value.problems) == 2
    with pytest.raises(IngraftError, match="is empty"), adapt.rows(model, []):
        pass
    with adapt.rows(model, ["a", None, "a"]), pytest.raises(IngraftError, match=r"3 rows.*4 entries"):
        model(torch.ones(4, 4))
    with pytest.raises(IngraftError, match="leave `rows` first"), adapt.rows(model, ["a", None]):
        adapt.merge(model)
    adapt.merge(model)
    for verb in (
        lambda: adapt.rows(model, ["a"]).__enter__(),
        lambda: adapt.disabled(model).__enter__(),
        lambda: adapt.activate(model),
    ):
        with pytest.raises(IngraftError, match="unmerge"):
            verb()
    with pytest.raises(IngraftError, match="merged already"):
        adapt.merge(model)


def test_rows_at_a_layer_that_the_batch_shares() -> None:
    """GPT-2's position embedding sees (1, T); a mixed batch gives it a row for each."""
    model = SUBJECTS["gpt2"].make_redrawn()
    adapted(model, LoraConfig(r=2, target_modules=["wpe"]), "a")
    batch = SUBJECTS["gpt2"].batch(4)
    with adapt.rows(model, ["a", None]):
        mixed = run(model, batch)
    close(mixed[:2], run(model, {key: value[:2] for key, value in batch.items()}), "rows with the adapter")
    with adapt.disabled(model):
        close(mixed[2:], run(model, {key: value[2:] for key, value in batch.items()}), "rows without")


def test_rows_at_a_layer_that_no_row_belongs_to_are_refused() -> None:
    model = SUBJECTS["t5"].make_redrawn()
    adapted(model, LoraConfig(r=2, target_modules=["relative_attention_bias"]), "a")
    with adapt.rows(model, ["a", None]), pytest.raises(IngraftError, match="relative_attention_bias is computed once"):
        run(model, SUBJECTS["t5"].batch(2))


def test_unknown_names_and_missing_adapters() -> None:
    bare = nn.Linear(2, 2)
    for verb in (
        lambda: adapt.activate(bare, "a"),
        lambda: adapt.merge(bare),
        lambda: adapt.detach(bare),
        lambda: adapt.parameters(bare, "a"),
    ):
        with pytest.raises(IngraftError, match="Nothing is attached"):
            verb()
    model = adapted(nn.Sequential(nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), "a")
    for verb in (lambda: adapt.activate(model, "b"), lambda: adapt.merge(model, "b"), lambda: adapt.detach(model, "b")):
        with pytest.raises(IngraftError, match="No adapter named 'b' is attached \\(attached: a\\)"):
            verb()


# ------------------------------------------------------------------------------------- regressions that are not a law's


def test_regression_11_bfloat16_cycles_change_no_bit() -> None:
    """Five cycles of merge and unmerge changed 71 % of the incumbent's weights in bfloat16."""
    model = SUBJECTS["llama"].make_redrawn().to(torch.bfloat16)
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    adapted(model, LoraConfig(r=4))
    for _ in range(5):
        adapt.merge(model)
        adapt.unmerge(model)
    for key, p in adapt.base_parameters(model).items():
        assert torch.equal(p, before[key]), key


def test_regression_16_disabling_and_detaching_leave_trainability_alone() -> None:
    """The incumbent's `disable_adapter` re-enabled gradients of frozen adapters; `unload` left the base frozen."""
    model = SUBJECTS["llama"].make_redrawn()
    adapted(model, LoraConfig(r=2))
    adapt.trainable(model)
    with adapt.disabled(model):
        pass
    adapt.activate(model, "default")
    assert not any(p.requires_grad for p in model.parameters())
    adapt.detach(model)
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("reentrant", [True, False])
def test_backward_after_a_switch(reentrant: bool) -> None:
    """Recomputation saw the adapter that was activated in between: gradients of the incumbent were off by 184 %."""
    model = SUBJECTS["llama"].make_redrawn()
    for name in ("a", "b"):
        adapted(model, LoraConfig(r=4), name)
    adapt.trainable(model, "a", "b")
    adapt.activate(model, "a")
    batch = SUBJECTS["llama"].batch(2)
    model(**batch).logits.square().mean().backward()
    expected = {key: p.grad.clone() for key, p in adapt.parameters(model, "a").items() if p.grad is not None}
    model.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the method was renamed in later versions
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})  # type: ignore[operator]
    model.train()
    loss = model(**batch).logits.square().mean()
    adapt.activate(model, "b")
    loss.backward()
    assert all(p.grad is None for p in adapt.parameters(model, "b").values())
    for key, p in adapt.parameters(model, "a").items():
        assert p.grad is not None
        close(p.grad, expected[key], key, times=5.0)


def test_recomputation_that_cannot_be_told_is_an_error() -> None:
    """Under torch's own checkpointing, two forwards with different adapters before one backward: refused, never guessed."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for name in ("a", "b"):
        adapted(model, LoraConfig(r=2, target_modules=["0"]), name)
    adapt.trainable(model, "a", "b")
    x = torch.ones(2, 4)
    losses = []
    for name in ("a", "b"):
        adapt.activate(model, name)
        losses.append(checkpoint(model, x, use_reentrant=False).sum())
    with pytest.raises(IngraftError, match="which of them is meant cannot be told"):
        sum(losses).backward()  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------------------- smaller


def test_regression_23_the_seed_decides_the_start() -> None:
    starts = []
    for seed in (3, 3, 4):
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        torch.manual_seed(len(starts))
        adapt.attach(model, LoraConfig(r=2, target_modules=["0", "1"]), seed=seed)
        starts.append(adapt.parameters(model, "default"))
    assert all(torch.equal(starts[0][key], starts[1][key]) for key in starts[0])
    assert not torch.equal(starts[0]["0.lora_A"], starts[2]["0.lora_A"])
    assert not torch.equal(starts[0]["0.lora_A"], starts[0]["1.lora_A"]), "two sites started alike"
    model = nn.Sequential(nn.Linear(4, 4))
    state = torch.get_rng_state()
    adapt.attach(model, LoraConfig(r=2, target_modules=["0"]), seed=1)
    assert torch.equal(torch.get_rng_state(), state), "attach with a seed used torch's generator"


def test_torch_manual_seed_governs_where_no_seed_is_given() -> None:
    starts = []
    for _ in range(2):
        torch.manual_seed(11)
        model = nn.Sequential(nn.Linear(4, 4))
        adapt.attach(model, LoraConfig(r=2, target_modules=["0"]))
        starts.append(adapt.parameters(model, "default")["0.lora_A"])
    assert torch.equal(*starts)


def test_two_heads_of_different_size_side_by_side() -> None:
    """`modules_to_save`: each adapter has its own copy of the head; detaching gives the base's back."""
    model = SUBJECTS["vit"].make_redrawn()
    base = run(model, SUBJECTS["vit"].batch(2))
    for name in ("a", "b"):
        adapt.attach(model, LoraConfig(r=2, modules_to_save=["classifier"]), name, seed=1)
        randomise(model, name)
    adapt.activate(model, "a")
    a = run(model, SUBJECTS["vit"].batch(2))
    adapt.activate(model, "b")
    b = run(model, SUBJECTS["vit"].batch(2))
    differs(a, b, "two heads")
    with adapt.rows(model, ["a", "b"]):
        mixed = run(model, SUBJECTS["vit"].batch(2))
    close(mixed, torch.stack([a[0], b[1]]), "each row through its own head")
    adapt.detach(model)
    same(run(model, SUBJECTS["vit"].batch(2)), base, "the base's head")


def test_full_tuning_keeps_ties() -> None:
    model = SUBJECTS["gpt2"].make_redrawn()
    adapt.attach(model, FullConfig())
    own = adapt.parameters(model, "default")
    assert "lm_head.weight" not in own and "transformer.wte.weight" in own
    randomise(model, "default")
    active = run(model, SUBJECTS["gpt2"].batch(2))
    adapt.merge(model)
    assert model.lm_head.weight is model.transformer.wte.weight  # type: ignore[union-attr]
    close(run(model, SUBJECTS["gpt2"].batch(2)), active, "merged and active")


def test_parallel_runs_beside_the_mlp_also_where_copies_are_made() -> None:
    model = adapted(SUBJECTS["llama"].make_redrawn(), ParallelConfig(reduction_factor=4))
    batch = SUBJECTS["llama"].batch(2)
    same(run(copy.deepcopy(model), batch), run(model, batch), "copy and original")


def test_status_counts_and_prints() -> None:
    model = adapted(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["0"]), "a")
    status = adapt.status(model)
    assert (status.trainable, status.total) == (16, 56)
    assert "16 of 56" in str(status) and "lora" in str(status) and "active" in str(status)
    adapt.merge(model)
    assert "merged" in str(adapt.status(model))
    assert adapt.status(nn.Linear(2, 2)).adapters == ()
