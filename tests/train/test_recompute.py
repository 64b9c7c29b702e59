"""Blocks that recompute themselves change memory and nothing else: which of them, how many, and what they keep."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from ingraft import adapt
from ingraft.data.examples import Example
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.recipe import Recipe, as_recipe
from ingraft.train import loop, memory, recompute
from ingraft.train.objectives.causal import CausalObjective
from ingraft.train.roofline import Products
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
LAYERS = 4


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    size |= {"num_attention_heads": 4, "vocab_size": 64, "pad_token_id": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**size)).eval()


def recipe_of(asked: Any, **more: Any) -> Recipe:
    return as_recipe({"model": "x", "data": {"train": "x"}, "gradient_checkpointing": asked, **more})


ROW = Example(row_id=3, input_ids=list(range(2, 22)), labels=[-100] * 10 + list(range(12, 22)))


def prepared(asked: Any, method: str = "lora", **options: Any) -> tuple[Any, CausalObjective, Recipe]:
    model, recipe = llama(), recipe_of(asked)
    recompute.enable(model, recipe)
    adapt.attach(model, registry.make_config(method, options), seed=0)
    objective = CausalObjective(model, 0)
    objective.begin()
    return model, objective, recipe


def recomputing(model: nn.Module) -> list[int]:
    return [i for i, block in enumerate(recompute.blocks_of(model)) if block.gradient_checkpointing]


def gradients(model: nn.Module, objective: CausalObjective, chosen: Sequence[int]) -> dict[str, Any]:
    recompute.use(model, chosen)
    for block in recompute.blocks_of(model):
        block.training = bool(block.gradient_checkpointing)
    adapt.dropout_step(model, 1, torch.tensor([ROW.row_id]))
    model.zero_grad()
    objective.loss(objective.batch([ROW])).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("method", ["lora", "dora", "ia3", "pfeiffer", "prefix", "prompt", "vera", "full"])
def test_any_choice_of_blocks_gives_the_same_gradients(method: str) -> None:
    """To the bit, with dropout where the method has some."""
    options = {"lora_dropout": 0.2} if method == "lora" else {}
    model, objective, _ = prepared(True, method, **options)
    wanted = gradients(model, objective, ())
    for chosen in ((0,), (0, 1), (1, 3), range(LAYERS)):
        found = gradients(model, objective, list(chosen))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted), chosen


def test_a_block_that_recomputes_itself_keeps_only_its_input() -> None:
    model, objective, _ = prepared(True)
    plain = memory.probe(model, objective, recompute.blocks_of(model), ROW)
    gradients(model, objective, (0, 1))
    spared = memory.probe(model, objective, recompute.blocks_of(model), ROW)
    assert plain.blocks[1] == plain.blocks[2] == plain.blocks[3] > 0
    assert spared.blocks[3] == plain.blocks[3]
    assert max(spared.blocks[:2]) <= plain.entry
    assert plain.entry == 4 * 32 * len(ROW)


@pytest.mark.parametrize(("asked", "chosen"), [(True, [0, 1, 2, 3]), (False, []), (1, [0]), (3, [0, 1, 2]), (0, [])])
def test_how_many_blocks(monkeypatch: pytest.MonkeyPatch, asked: Any, chosen: list[int]) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 50)
    model, objective, recipe = prepared(asked)
    found = memory.choose(model, objective, [ROW], recipe, 2)
    assert list(found.recomputed) == chosen
    assert found.rows == 2
    assert not found.why


def test_the_first_blocks_that_take_part_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies below the lowest adapted block keeps nothing, so there is nothing to spare."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 50)
    model, objective, recipe = prepared(1, layers_to_transform=[2, 3])
    assert memory.choose(model, objective, [ROW], recipe, 2).recomputed == (2,)


def test_auto_takes_as_few_blocks_as_the_memory_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "plenty", lambda *args: False)
    model, objective, recipe = prepared("auto")
    kept = memory.Kept(
        outside=1000, blocks=(0, 0, *[10_000] * 12), entry=500
    )  # two blocks below the lowest adapted one
    monkeypatch.setattr(memory, "probe", lambda *args: kept)
    rows, part = 64, range(2, 14)
    needs = [memory.forecast(model, kept, rows, part[:n]) for n in range(13)]
    assert needs[:11] == sorted(needs[:11], reverse=True)
    for free, count in ((needs[0], 0), (needs[5], 5), (needs[5] - 1, 6)):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: free)
        found = memory.choose(model, objective, [ROW], recipe, rows)
        assert found.recomputed == tuple(part[:count]), free
        assert found.rows == rows, "rows are not touched while blocks can be"
        assert bool(found.why) == (count > 0)
    monkeypatch.setattr(memory, "free_memory", lambda device: min(needs) - 1)
    found = memory.choose(model, objective, [ROW], recipe, rows)
    assert found.recomputed == tuple(part[: needs.index(min(needs))]), "what needs least"
    assert found.rows == rows // 2
    assert [line.split(" ")[0] for line in found.why] == ["64", "Even"]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    fixed = recipe_of("auto", auto_find_batch_size=False)
    found = memory.choose(model, objective, [ROW], fixed, rows)
    assert found.rows == rows
    assert "may not fit" in found.why[-1]


def test_runs_are_the_same_to_the_bit(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[bytes] = []
    for name, asked in (("none", False), ("one", 1), ("all", True), ("auto", "auto")):
        if name == "auto":
            monkeypatch.setattr(memory, "plenty", lambda *args: False)
            monkeypatch.setattr(memory, "free_memory", lambda device: 1)
            monkeypatch.setattr(memory, "AGAIN", 0)  # or two blocks are too few for it to pay
        made = recipe(
            gradient_checkpointing=asked, max_steps=3, auto_find_batch_size=False, output_dir=str(tmp_path / name)
        )
        run = train(made, quiet=True)
        found.append((run.folder / "adapter_model.safetensors").read_bytes())
        assert recomputing(run.model) == {"none": [], "one": [0]}.get(name, [0, 1])
        assert not any(module.training for module in run.model.modules())
    assert len(set(found)) == 1


def test_what_cannot_be_is_refused_before_anything_is_attached() -> None:
    with pytest.raises(IngraftError, match="9 blocks are asked for, and LlamaForCausalLM has 4"):
        recompute.enable(llama(), recipe_of(9))
    for asked, text in ((2, "cannot be chosen one by one"), ("auto", "one by one"), (True, "cannot recompute")):
        with pytest.raises(IngraftError, match=text):
            recompute.enable(nn.Sequential(nn.Linear(2, 2)), recipe_of(asked))
    recompute.enable(nn.Sequential(nn.Linear(2, 2)), recipe_of(False))
    with pytest.raises(IngraftError, match="gradient_checkpointing"):
        recipe_of("some")


def test_nothing_below_the_lowest_adapted_block_takes_part() -> None:
    """Neither bytes nor a node of the graph, with gradient checkpointing or without; with an adapter at the embeddings everything does."""
    for asked in (False, True):
        model, objective, _ = prepared(asked, layers_to_transform=[2, 3])
        recompute.use(model, ())
        kept = memory.probe(model, objective, recompute.blocks_of(model), ROW)
        assert kept.blocks[:2] == (0, 0)
        assert min(kept.blocks[2:]) > 0
        assert nodes(model, objective) == (0, 0, 1, 1)
    model, objective, _ = prepared(False, "prompt")
    assert nodes(model, objective) == (1, 1, 1, 1)


def nodes(model: nn.Module, objective: CausalObjective) -> tuple[int, ...]:
    """How many times each block runs backward."""
    counts = [0] * LAYERS

    def note(number: int) -> Callable[..., None]:
        def forward(module: nn.Module, args: Any, output: Any) -> None:
            if output.requires_grad:
                output.register_hook(lambda gradient: counts.__setitem__(number, counts[number] + 1))

        return forward

    handles = [block.register_forward_hook(note(i)) for i, block in enumerate(recompute.blocks_of(model))]
    objective.loss(objective.batch([ROW])).backward()
    for handle in handles:
        handle.remove()
    return tuple(counts)


def test_products_of_backward_below_the_lowest_adapted_block_are_not_made() -> None:
    """Exactly: the pass back makes the products of two blocks, and the lower one's hands nothing down."""
    _, objective, _ = prepared(False, layers_to_transform=[2, 3])
    with Products() as whole:
        objective.loss(objective.batch([ROW])).backward()
    with Products() as alone:
        objective.loss(objective.batch([ROW]))
    n, width, inner = len(ROW), 32, 48
    frozen = 2 * n * (4 * width * width + 3 * width * inner)  # a block's seven products, forward
    attention = 2 * n * n * width
    back = whole.work - alone.work
    rank = 2 * n * 8
    thin = rank * (4 * (2 * width) + 3 * (width + inner))  # one pass through A and B of a block
    upper = frozen + 5 * attention + 2 * thin
    lower = (
        upper - 2 * n * 3 * width * width - rank * 3 * width
    )  # q, k and v of the lowest adapted block hand nothing down
    assert back == upper + lower


@pytest.mark.parametrize("name", ["OPT", "Bart", "GPT2"])
def test_a_frozen_base_drops_nothing_where_its_blocks_recompute(name: str) -> None:
    """OPT's blocks and Bart's stacks ask their own flag whether to drop out, the flag that checkpointing sets."""
    import transformers

    size: dict[str, dict[str, Any]] = {
        "OPT": {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.5},
        "Bart": {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "dropout": 0.5}
        | {
            f"{side}_{what}": n
            for side in ("encoder", "decoder")
            for what, n in (("ffn_dim", 24), ("attention_heads", 2))
        },
        "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "resid_pdrop": 0.5, "bos_token_id": 1, "eos_token_id": 2},
    }
    kind = {"OPT": "OPTForCausalLM", "Bart": "BartForConditionalGeneration", "GPT2": "GPT2LMHeadModel"}[name]
    model: Any = getattr(transformers, kind)(getattr(transformers, f"{name}Config")(vocab_size=64, **size[name])).eval()
    recompute.enable(model, recipe_of(True))
    adapt.attach(model, registry.make_config("lora", {}), seed=0)
    batch = {"input_ids": torch.arange(3, 15)[None], "use_cache": False}
    plain = model(**batch).logits
    loop.adapting(model, [SimpleNamespace(name="default")], True)  # type: ignore[list-item]
    kept: list[str] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append("x") or x, lambda x: x):
        found = model(**batch).logits
    assert len(kept) < 40, "nothing recomputes, so nothing is shown"
    assert torch.equal(found, plain)
    found.sum().backward()


def test_a_model_whose_blocks_recompute_can_be_copied_and_pickled() -> None:
    """A copy's blocks set flags of their own, not those of the blocks that they were copied from."""
    import transformers

    size = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "dropout": 0.5}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=64, **size)).eval()  # type: ignore[arg-type]
    recompute.enable(model, recipe_of(True))
    adapt.attach(model, registry.make_config("lora", {}), seed=0)
    plain = model(input_ids=torch.arange(3, 15)[None], use_cache=False).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        loop.adapting(other, [SimpleNamespace(name="default")], True)  # type: ignore[list-item]
        assert torch.equal(other(input_ids=torch.arange(3, 15)[None], use_cache=False).logits, plain)
