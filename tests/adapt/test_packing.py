"""Rows laid end to end say, and learn, what each of them says and learns by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, create_mask
from transformers import masking_utils
from transformers.integrations import flex_attention as flex

import ingraft.adapt as adapt
from ingraft.adapt import flat
from ingraft.adapt.control import require_control
from ingraft.adapt.dropout import kept
from ingraft.errors import IngraftError
from ingraft.methods import registry
from ingraft.testing.cases import Case, Snapshot, close_each, differs
from ingraft.testing.subjects import SUBJECTS, redrawn
from ingraft.testing.table import METHODS, row

LENGTHS = (5, 12, 12, 7, 3)
LLAMA = SUBJECTS["llama"]
BACKENDS = ("sdpa", "eager", "flex_attention")


def batch(lengths: tuple[int, ...] = LENGTHS, seed: int = 0, left: bool = False) -> dict[str, Tensor]:
    """Rows of these lengths, of which all but the first two tokens are learned."""
    generator = torch.Generator().manual_seed(seed)
    B, T = len(lengths), max(lengths)
    ids = torch.randint(2, 40, (B, T), generator=generator)
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    mask = mask.flip(1) if left else mask
    labels = ids.masked_fill(mask == 0, -100)
    first = mask.argmax(1)
    for row_, at in zip(labels, first.tolist(), strict=True):
        row_[at : at + 2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses(model: Any, given: dict[str, Tensor]) -> Tensor:
    """(B,) the summed loss of each row."""
    labels = given["labels"]
    logits = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"], labels=labels).logits
    each = F.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=-100)
    return each.sum(1)


def learned(model: Any, name: str, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Each row's loss, and an adapter's gradients; rows count differently, so that none can stand for another."""
    for parameter in model.parameters():
        parameter.grad = None
    loss_B = losses(model, given)
    (loss_B * torch.arange(1, len(loss_B) + 1)).sum().backward()
    grads = {key: p.grad.clone() for key, p in adapt.parameters(model, name).items() if p.grad is not None}
    return loss_B.detach(), grads


def as_unpacked(model: Any, name: str = "a", given: dict[str, Tensor] | None = None) -> None:
    """Assert it, within 1e-5."""
    given = batch() if given is None else given
    plain, grads = learned(model, name, given)
    calls = require_control(model).call
    with adapt.packing(model):
        assert require_control(model).call is calls, "trying the model left something behind"
        with seen_laid() as seen:
            packed, packed_grads = learned(model, name, given)
    assert seen, "nothing was packed"
    torch.testing.assert_close(packed, plain, rtol=1e-5, atol=1e-5)
    assert any(float(g.abs().max()) > 1e-3 for g in grads.values())
    close_each(packed_grads, grads, "gradients packed and unpacked", times=2.0)


@contextlib.contextmanager
def seen_laid() -> Iterator[list[int]]:
    """How many tokens were laid end to end, call by call."""
    seen: list[int] = []
    run = flat.laid

    @contextlib.contextmanager
    def noted(one: flat.Flat) -> Iterator[None]:
        seen.append(one.tokens)
        with run(one):
            yield

    flat.laid = noted  # type: ignore[assignment]
    try:
        yield seen
    finally:
        flat.laid = run


@contextlib.contextmanager
def tasks(model: Any, name: str, n: int) -> Iterator[None]:
    """The rows' tasks, for the one method that needs them."""
    if require_control(model).adapters[name].method.name != "multitask-prompt":
        yield
        return
    with adapt.context(model, tasks=[i % 2 for i in range(n)]):
        yield


@pytest.mark.parametrize("name", [name for name in METHODS if name != "loftq"])  # LoRA, over packed weights only
def test_packed_rows_are_the_rows_unpacked(name: str) -> None:
    """Every method: each row's loss and the gradients within 1e-5, its dropout on."""
    case = Case(row=row(name), subject=LLAMA)
    model = case.adapted("a", dropout=0.25)
    for part in model.modules():
        part.training = type(part).__module__.startswith("ingraft.methods")
    adapt.dropout_step(model, 7, torch.tensor([31, 5, 77, 12, 40]))
    with tasks(model, "a", len(LENGTHS)):
        as_unpacked(model)


def attention(model: Any, name: str) -> Any:
    model.set_attn_implementation(name)
    return model


def dense(query: Tensor, key: Tensor, value: Tensor, block_mask: Any = None, scale: Any = None, **given: Any) -> Any:
    """What flex attention computes, with a derivative on every device: its mask, written out."""
    B, H, Q, _ = query.shape
    mask = create_mask(block_mask.mask_mod, B, H, Q, key.shape[2], device=query.device)
    groups = H // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = (query @ key.mT) * scale
    out = torch.softmax(scores.masked_fill(~mask, float("-inf")), -1) @ value
    return out if given.get("return_aux") is None else (out, SimpleNamespace(lse=torch.logsumexp(scores, -1)))


@pytest.fixture
def flex_with_a_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flex attention has no backward on the CPU; its mask is what is tried."""
    monkeypatch.setattr(
        flex, "compile_friendly_flex_attention", lambda *qkv, training=False, **given: dense(*qkv, **given)
    )
    monkeypatch.setattr(masking_utils, "create_block_mask", lambda _compile=False, **given: create_block_mask(**given))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lora", "prompt", "prefix"])
def test_each_attention_backend(backend: str, name: str, flex_with_a_derivative: None) -> None:
    """Losses and gradients within 1e-5 whichever way the attention is computed."""
    model = attention(Case(row=row(name), subject=LLAMA).bare(), backend)
    if name == "prefix" and backend == "flex_attention":
        with pytest.raises(IngraftError, match="flex_attention"):
            adapt.attach(model, row(name).config, "a", seed=1)
        return
    adapt.attach(model, row(name).config, "a", seed=1)
    as_unpacked(model)


def test_dropout_is_a_function_of_row_and_position() -> None:
    """Masks by token are those by row, also where two tokens share a pair of bits."""
    keys_B = torch.randint(-(2**31), 2**31 - 1, (3,), dtype=torch.int32)
    lengths, T = (4, 7, 1), 7
    mask = (torch.arange(T) < torch.tensor(lengths)[:, None]).long()
    laid = flat.layout(mask, causal=True)
    assert laid is not None
    for width in (6, 5, 1):
        x_BTI = torch.zeros(3, T, width)
        by_row = kept(x_BTI.shape, 0.4, keys_B)
        x_1NI = laid.lay(x_BTI)
        assert torch.equal(kept(x_1NI.shape, 0.4, laid.keys(keys_B, x_1NI)), laid.lay(by_row)), width


@pytest.mark.parametrize("backend", BACKENDS)
def test_regression_24_packed_neighbours_do_not_see_each_other(backend: str, flex_with_a_derivative: None) -> None:
    """No row changes when its neighbours do, whichever the attention; and one that may see its neighbours is found out."""
    model = attention(Case(row=row("lora"), subject=LLAMA).bare(), backend)
    adapt.attach(model, row("lora").config, "a", seed=1)
    given, others = batch(), batch(seed=1)
    others = {**given, "input_ids": others["input_ids"].clone()}
    others["input_ids"][2] = given["input_ids"][2]
    with torch.no_grad(), adapt.packing(model), seen_laid() as seen:
        ours, theirs = (
            model(input_ids=x["input_ids"], attention_mask=x["attention_mask"]).logits for x in (given, others)
        )
    assert len(seen) == 2
    torch.testing.assert_close(ours[2], theirs[2], rtol=0, atol=1e-6)
    differs(ours[:2], theirs[:2], "rows that changed")


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_leak_is_found(backend: str, flex_with_a_derivative: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows taken for one row, their positions right: the comparison with unpacked rows fails, and so does a model's trial."""
    model = attention(Case(row=row("lora"), subject=LLAMA).bare(), backend)
    adapt.attach(model, row("lora").config, "a", seed=1)
    right = flat._together  # pyright: ignore[reportPrivateUsage]
    with adapt.packing(model):
        pass
    with monkeypatch.context() as wrong:
        wrong.setattr(flat, "_together", lambda lengths, at_once: right([sum(lengths)], at_once))
        with pytest.raises(AssertionError, match="not close"):
            as_unpacked(model)
        require_control(model).packs = False
        with pytest.raises(IngraftError, match="does not keep them apart"), adapt.packing(model):
            pass
    as_unpacked(model)


def test_rows_of_different_adapters() -> None:
    """Packed rows may each have their own adapters, of several methods, or none."""
    model = Case(row=row("lora"), subject=LLAMA).adapted("a")
    for name in ("dora", "prefix", "prompt", "reft", "houlsby", "oft"):
        adapt.attach(model, row(name).config, name, seed=1)
    for entries in (["a", None, "dora", "oft", "a"], [("a", "reft"), "houlsby", "prefix", None, "prompt"]):
        names = sorted({one for entry in entries for one in ((entry,) if isinstance(entry, str) else entry or ())})
        adapt.trainable(model, *names)
        with adapt.rows(model, entries):
            with torch.no_grad(), adapt.packing(model):
                losses(model, batch())  # where its rows are is found out before its rows are packed
            for name in names:
                as_unpacked(model, name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["lora", "prefix", "reft"])
def test_with_gradient_checkpointing(name: str, reentrant: bool) -> None:
    """A block that is run again in backward is run on the same packed rows, though the block of code is left and another adapter acts."""
    model = Case(row=row(name), subject=LLAMA).adapted("a")
    given = batch()
    _, expected = learned(model, "a", given)
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    for module in model.modules():
        module.training = getattr(module, "gradient_checkpointing", False)
    model.zero_grad()
    with adapt.packing(model):
        loss_B = losses(model, given)
        adapt.activate(model)
        (loss_B * torch.arange(1, len(loss_B) + 1)).sum().backward()
    close_each(
        {k: p.grad for k, p in adapt.parameters(model, "a").items() if p.grad is not None},
        expected,
        "checkpointed",
        times=2.0,
    )


def small(kind: str, **options: Any) -> nn.Module:
    """A tiny causal model of a family, its weights redrawn."""
    import transformers

    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 24}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{kind}Config")(
        **{**sizes, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, **options}
    )
    named = {"GPT2": "GPT2LMHeadModel", "Gemma3Text": "Gemma3ForCausalLM"}
    return redrawn(getattr(transformers, named.get(kind, f"{kind}ForCausalLM"))(config))


FAMILIES: dict[str, dict[str, Any]] = {
    "Mistral": {"sliding_window": 3, "num_key_value_heads": 1},
    "Gemma3Text": {
        "sliding_window": 3,
        "head_dim": 8,
        "num_key_value_heads": 1,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "GPT2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_inner": 24, "n_positions": 64},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16, "max_position_embeddings": 64},
    "Mixtral": {"num_local_experts": 3, "num_key_value_heads": 1},
    "Phi3": {"num_key_value_heads": 1},
}


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_families(kind: str, backend: str) -> None:
    """Sliding windows, learned positions, positions from the mask, experts: packed rows are the rows unpacked."""
    model = attention(small(kind, **FAMILIES[kind]), backend)
    adapt.attach(model, registry.make_config("lora", {"r": 2, "init_lora_weights": False}), "a", seed=1)
    as_unpacked(model)


def test_rows_padded_on_the_left() -> None:
    """Positions are those that the model would count, on whichever side the padding is."""
    for subject in (LLAMA.make_redrawn(), small("OPT", **FAMILIES["OPT"])):
        adapt.attach(subject, row("prefix" if subject.config.model_type == "llama" else "lora").config, "a", seed=1)
        as_unpacked(subject, given=batch(left=True))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("Bloom", {"n_head": 2, "n_layer": 2}, "positions"),
        ("Mamba", {"state_size": 4}, "positions"),
        ("Lfm2", {"num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}, "no transformer blocks"),
    ],
)
def test_what_cannot_keep_rows_apart_is_refused(kind: str, options: dict[str, Any], words: str) -> None:
    """Positions worked out from columns, and what mixes tokens beside attention: refused by name, and the model is as it was."""
    model = small(kind, **options)
    adapt.attach(model, registry.make_config("full", {"target_modules": "all-linear"}), "a", seed=1)
    before = Snapshot.of(model)
    with pytest.raises(IngraftError, match=words), adapt.packing(model):
        pass
    before.assert_restored(model)


def test_what_mixes_tokens_beside_attention_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A convolution over the sequence shows in a trial of two rows, and nobody had to know its name."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    model = LLAMA.make_redrawn()
    adapt.attach(model, row("lora").config, "a", seed=1)
    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) + 0.1 * F.pad(x, (0, 0, 1, -1)))
    before = Snapshot.of(model)
    with pytest.raises(IngraftError, match="but attention mixes tokens"), adapt.packing(model):
        pass
    before.assert_restored(model)


def test_a_pooler_inside_the_stack_is_refused(tiny: SimpleNamespace) -> None:
    """A BERT pools its first column itself; an encoder-decoder reads its encoder's rows."""
    for kind, words in (("bert", "pools"), ("mt5", "encoder-decoder")):
        model = tiny.make(kind)
        adapt.attach(model, row("lora").config, "a", seed=1)
        before = Snapshot.of(model)
        with pytest.raises(IngraftError, match=words), adapt.packing(model):
            pass
        before.assert_restored(model)


def test_the_model_is_as_it_was() -> None:
    """Packing leaves names, states and classes as they were; attaching and detaching inside of it too."""
    for name in ("lora", "prefix", "houlsby"):
        model = Case(row=row(name), subject=LLAMA).adapted("a")
        before = Snapshot.of(model)
        with adapt.packing(model):
            adapt.attach(model, row("prefix").config, "b", seed=2)
            as_unpacked(model, "b")
            adapt.detach(model, "b")
            adapt.activate(model, "a")
            adapt.trainable(model, "a")
            as_unpacked(model)
        before.assert_restored(model)
        with adapt.packing(model):
            adapt.detach(model)
        assert not any("ingraft" in key for module in model.modules() for key in module.__dict__)
        assert model.config._attn_implementation == "sdpa"


def test_what_has_a_cache_is_not_packed() -> None:
    """`generate` says the same inside the block, and so does a batch without padding."""
    model = Case(row=row("prompt"), subject=LLAMA).adapted("a")
    given = {key: value for key, value in batch(left=True).items() if key != "labels"}
    said = model.generate(**given, max_new_tokens=4, do_sample=False)
    with adapt.packing(model), seen_laid() as seen:
        assert torch.equal(model.generate(**given, max_new_tokens=4, do_sample=False), said)
        model(**batch((6, 6)))
    assert not seen


@pytest.mark.parametrize("lengths", [(9, 3), (4, 4, 9, 4), (12, 11, 11, 2, 2, 1)])
def test_rows_are_filled_up_by_an_eighth_at_most(lengths: tuple[int, ...]) -> None:
    """Attention gets rows of like length at once; each token once."""
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    laid = flat.layout(mask, causal=True)
    assert laid is not None and sorted(laid.lengths) == sorted(lengths)
    for rows in laid.together:
        assert rows.tokens >= (1 - flat.FILLED) * rows.longest * len(rows.lengths)
    assert torch.equal(laid.put_back(torch.ones(1, laid.tokens, dtype=torch.int64)), mask)
    x = torch.randn(len(lengths), max(lengths), 3, dtype=torch.float64) * mask[..., None]
    assert torch.equal(laid.put_back(laid.lay(x)), x)


def test_holes_and_empty_rows_are_left_alone() -> None:
    """A row that is not one piece is no row that could be laid."""
    for mask in ([[1, 1, 0, 1], [1, 1, 1, 1]], [[0, 0, 0, 0], [1, 1, 1, 1]], [[1, 1], [1, 1]]):
        assert flat.layout(torch.tensor(mask), causal=True) is None


def test_a_flash_kernel_is_told_where_rows_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where attention is a flash kernel it gets tokens end to end, and the ends: what such a kernel defines is what rows say unpacked."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    told: list[int] = []

    def kernel(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any) -> Any:
        ends = given.get("cu_seq_lens_q")
        groups = module.num_key_value_groups
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        if ends is None:
            mask = None if mask is None else mask[:, None, None] & torch.ones(*[query.shape[2]] * 2).tril().bool()
            y = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=given["scaling"])
            return y.transpose(1, 2), None
        assert (
            mask is None
            and ends.dtype == torch.int32
            and int(ends.diff().max()) == given["max_length_q"] == given["max_length_k"]
        )
        assert torch.equal(ends, given["cu_seq_lens_k"])
        told.append(len(ends) - 1)
        sizes = ends.diff().tolist()
        pieces = zip(*(x.split(sizes, 2) for x in (query, key, value)), strict=True)
        return torch.cat(
            [F.scaled_dot_product_attention(*qkv, is_causal=True, scale=given["scaling"]) for qkv in pieces], 2
        ).transpose(1, 2), None

    model = LLAMA.make_redrawn()
    for interface, function in (
        (ALL_ATTENTION_FUNCTIONS, kernel),
        (ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask),
    ):
        monkeypatch.setitem(interface._global_mapping, "flash_attention_like", function)  # pyright: ignore[reportPrivateUsage]
    for config in {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values():
        config._attn_implementation_internal = "flash_attention_like"
    adapt.attach(model, row("lora").config, "a", seed=1)
    as_unpacked(model)
    assert set(told) == {2, len(LENGTHS)}


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_rows_that_the_caller_laid(name: str) -> None:
    """Rows laid by the caller, told apart by their positions (transformers' collator does so), are the rows too."""
    model, given = Case(row=row(name), subject=LLAMA).adapted("a"), batch()
    shown = given["attention_mask"].bool()
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits[shown]
        positions = torch.arange(max(LENGTHS)).expand(len(LENGTHS), -1)[shown]
        found = model(input_ids=given["input_ids"][shown][None], position_ids=positions[None], use_cache=False).logits[
            0
        ]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["prompt", "reft"])
def test_rows_that_the_caller_laid_are_refused_where_each_has_its_own(name: str) -> None:
    """A prompt in front of the first row alone would leave the others without, and nobody would notice."""
    model = Case(row=row(name), subject=LLAMA).adapted("a")
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    with pytest.raises(IngraftError, match="packing"):
        model(input_ids=positions + 3, position_ids=positions, use_cache=False)


@pytest.mark.filterwarnings("ignore:::(torch|transformers|accelerate)")
def test_in_a_foreign_trainer(tmp_path: Path) -> None:
    """transformers' Trainer, which draws its batches at random, trains packed what it trains padded."""
    from transformers import Trainer, TrainingArguments

    given = batch()
    rows = [{key: x[i] for key, x in given.items()} for i in range(len(LENGTHS))]
    found: list[dict[str, Tensor]] = []
    for where in (contextlib.nullcontext, adapt.packing):
        model = Case(row=row("lora"), subject=LLAMA).adapted("a")
        arguments = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=3, report_to=[], save_strategy="no",
            optim="sgd", learning_rate=1e-2, use_cpu=True, disable_tqdm=True, seed=3,
        )  # fmt: skip
        with where(model), seen_laid() as seen:
            Trainer(model=model, args=arguments, train_dataset=rows).train()  # type: ignore[arg-type]
        assert bool(seen) == bool(found)
        found.append({key: p.detach().clone() for key, p in adapt.parameters(model, "a").items()})
    close_each(found[1], found[0], "trained packed and padded")


@pytest.mark.parametrize(
    "kind", ["LlamaForSequenceClassification", "BertForTokenClassification", "BertForQuestionAnswering"]
)
def test_heads_see_rows(kind: str) -> None:
    """Heads that pool by padding, that speak of tokens, and that put out two numbers a token."""
    import transformers

    torch.manual_seed(0)
    made = getattr(transformers, kind)
    size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    model = made(made.config_class(**size, num_attention_heads=4, pad_token_id=0)).eval()
    adapt.attach(model, registry.make_config("lora", {"r": 2}), name="a", seed=0)
    given = batch()
    inputs = {"input_ids": given["input_ids"] * given["attention_mask"], "attention_mask": given["attention_mask"]}
    real = given["attention_mask"].bool()
    with torch.no_grad():
        plain = [x for x in model(**inputs).to_tuple() if isinstance(x, Tensor)]
        with adapt.packing(model):
            packed = [x for x in model(**inputs).to_tuple() if isinstance(x, Tensor)]
    for x, y in zip(plain, packed, strict=True):
        x, y = (x[real], y[real]) if x.shape[:2] == real.shape else (x, y)
        torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-5)
