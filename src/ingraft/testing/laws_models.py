"""Laws of life inside other people's frameworks: accelerate's hooks, generation, output capture, transformers' Trainer."""

from __future__ import annotations

import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ingraft.adapt as adapt
from ingraft.methods.contract import InputPart, ParameterPart
from ingraft.testing.cases import (
    Case,
    Snapshot,
    close,
    differs,
    gradients,
    loss_of,
    on_weights,
    output,
    refused,
    run,
    same,
)
from ingraft.testing.subjects import Subject
from ingraft.testing.suite import law


def _not_transformers(case: Case) -> str | None:
    return None if case.subject.transformers else "no transformers model"


def _not_causal(case: Case) -> str | None:
    return None if case.subject.causal else "it generates no text"


# ---------------------------------------------------------------------------------------------------------------- accelerate


@law(16)
def accelerate_hooks_in_both_orders(case: Case) -> None:
    """Hooks of accelerate on the layers, put there before or after attach, run, and neither bypass the adapter nor survive being taken off."""
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    calls: list[str] = []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            calls.append(type(module).__name__)
            return args, kwargs

    batch = case.batch()
    base = case.base()
    expected_base = run(base, batch)
    expected = run(case.adapted("a"), batch)

    def hook(model: nn.Module) -> list[nn.Module]:
        hooked = layers(model)
        for module in hooked:
            add_hook_to_module(module, Counting())
        return hooked

    # Hooks first.
    model = case.base()
    hooked = hook(model)
    run(model, batch)
    usual = bool(calls)  # torch's encoder passes over its layers, hooks and all
    case.attach(model, "a")
    calls.clear()
    same(run(model, batch), expected, "hooked, then adapted")
    assert calls, "no hook ran"
    gradients(model, "a", batch)
    case.detach(model)
    calls.clear()
    same(run(model, batch), expected_base, "hooked, adapted, detached")
    assert bool(calls) == usual, "detach took the hooks off"
    for module in hooked:
        remove_hook_from_module(module)
    same(run(model, batch), expected_base, "all off")
    # Adapter first.
    model = case.base()
    before = Snapshot.of(model)
    case.attach(model, "a")
    hooked = hook(model)
    calls.clear()
    same(run(model, batch), expected, "adapted, then hooked")
    assert calls, "no hook ran"
    for module in hooked:
        remove_hook_from_module(module)
    same(run(model, batch), expected, "adapted, hooks off again")
    case.detach(model)
    for module in hooked:  # accelerate leaves its own mark on the instance
        for mark in ("_hf_hook", "_old_forward", "forward"):
            module.__dict__.pop(mark, None)
    before.assert_restored(model)


def layers(model: nn.Module) -> list[nn.Module]:
    """The layers: modules of the base that own parameters and have no child modules of their own."""
    from ingraft.adapt.select import base_modules
    from ingraft.methods.contract import Part

    return [
        module
        for module in base_modules(model).values()
        if module._parameters and all(isinstance(child, Part) for child in module.children())
    ]


def _base_fails_offloaded(case: Case) -> str | None:
    if case.subject.name in ("attention", "encoder"):
        return "the base fails by itself: torch's attention reads a weight that accelerate brings in only where it is called"
    return None


@law(16, heavy=True, hole=_base_fails_offloaded)
def accelerate_offload_in_both_orders(case: Case) -> None:
    """With the base's weights offloaded by accelerate, adapters attached before or after act as they do without."""
    from accelerate import cpu_offload

    batch = case.batch()
    expected = run(case.adapted("a"), batch)
    model = case.adapted("a")
    cpu_offload(model, torch.device("cpu"))
    same(run(model, batch), expected, "adapted, then offloaded")
    model = case.base()
    cpu_offload(model, torch.device("cpu"))
    if issubclass(case.part, ParameterPart):
        refused(lambda: case.attach(model, "a"), "Attach first, then offload")
        return
    case.attach(model, "a")
    same(run(model, batch), expected, "offloaded, then adapted")
    if on_weights(case):
        refused(lambda: adapt.merge(model), "offloaded")


# ---------------------------------------------------------------------------------------------------------------- generation


def _generate(model: Any, batch: dict[str, Tensor], **options: Any) -> Tensor:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*generation flags.*")
        return model.generate(**batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options)


@law(18, hole=_not_causal)
def caches_agree(case: Case) -> None:
    """Greedy text is the same without a cache, with a dynamic and with a static one, and is what the logits of whole passes say."""
    model, batch = case.adapted("a"), case.batch()
    batch = {"input_ids": batch["input_ids"][:, :5], "attention_mask": batch["attention_mask"][:, :5]}
    by_hand = batch["input_ids"]
    for _ in range(6):
        with adapt.context(model, prompt=batch["attention_mask"]):
            logits = run(model, {"input_ids": by_hand, "attention_mask": torch.ones_like(by_hand)})
        by_hand = torch.cat([by_hand, _pick(logits[:, -1])], 1)
    none = _generate(model, batch, use_cache=False)
    same(none, by_hand, "without a cache and by whole passes")
    same(_generate(model, batch, use_cache=True), none, "dynamic cache and none")
    same(_generate(model, batch, cache_implementation="static"), none, "static cache and none")
    with adapt.disabled(model):
        base = _generate(model, batch)
        logits = run(model, batch)
    same(base, _generate(case.base(), batch), "text of the base")
    differs(run(model, batch), logits, "logits of adapter and base")


def _pick(logits_BV: Tensor) -> Tensor:
    """The likeliest token that does not end the text, as `min_new_tokens` makes `generate` do."""
    logits_BV = logits_BV.clone()
    logits_BV[:, 2] = float("-inf")
    return logits_BV.argmax(-1, keepdim=True)


def _worth_many_texts(case: Case) -> bool:
    """Twelve texts; what padding and beams do to rows is the hosts' doing, and the prompts'."""
    return case.method.name == "lora" or (case.subject.name in ("llama", "gpt2") and case.exemplary)


@law(18, hole=_not_causal, heavy=True, everyday=lambda case: _worth_many_texts(case) or not on_weights(case))
def padding_and_beams_agree(case: Case) -> None:
    """A row padded on the left gives the text it gives alone; beams find the same with every cache; rows keep their adapters in both."""
    model, full = case.adapted("a", "b"), case.batch(3)["input_ids"]
    mask = torch.ones_like(full)
    padded = full.clone()
    for row, pad in enumerate((0, 2, 4)):
        padded[row, :pad], mask[row, :pad] = 0, 0
    batch = {"input_ids": padded, "attention_mask": mask}
    texts = _generate(model, batch)[:, full.shape[1] :]
    entries = ["a", None, "b"]
    with adapt.rows(model, entries):
        mixed = _generate(model, batch)[:, full.shape[1] :]
        beams = _generate(model, batch, num_beams=2)
        same(
            _generate(model, batch, num_beams=2, use_cache=False), beams, "beams over mixed rows, no cache and dynamic"
        )
        static = _generate(model, batch, cache_implementation="static")[:, full.shape[1] :]
    same(static, mixed, "mixed rows, static cache and dynamic")
    for row, pad in enumerate((0, 2, 4)):
        alone = {"input_ids": full[row : row + 1, pad:], "attention_mask": mask[row : row + 1, pad:]}
        adapt.activate(model, "a")
        same(
            texts[row : row + 1],
            _generate(model, alone)[:, alone["input_ids"].shape[1] :],
            f"row {row} padded and alone",
        )
        adapt.activate(model, *([] if entries[row] is None else [str(entries[row])]))
        same(
            mixed[row : row + 1],
            _generate(model, alone)[:, alone["input_ids"].shape[1] :],
            f"row {row} in mixed rows and alone",
        )
        found = _generate(model, alone, num_beams=2)[:, alone["input_ids"].shape[1] :]
        same(beams[row : row + 1, full.shape[1] :], found, f"row {row}, beams in mixed rows and alone")


def _writes_nothing(case: Case) -> str | None:
    return None if _writes(case.subject) else "it generates no text"


@cache
def _writes(subject: Subject) -> bool:
    return subject.transformers and subject.make_redrawn().can_generate()  # type: ignore[operator]


@law(18, hole=_writes_nothing)
def text_needs_no_forward_before(case: Case) -> None:
    """Straight after attach `generate` gives the text it gives after a forward, greedy and with beams; greedy, what whole passes say."""
    batch = {key: value[:, :5] for key, value in case.batch(2).items() if not key.startswith("decoder")}
    first = {beams: _generate(case.adapted("a"), batch, num_beams=beams) for beams in (1, 2)}
    model = case.adapted("a")
    run(model, case.batch(2))
    for beams, text in first.items():
        same(
            text, _generate(model, batch, num_beams=beams), f"{beams} beams, straight after attach and after a forward"
        )
    if case.subject.causal:
        return  # `caches_agree` holds it against whole passes
    by_hand = torch.full((2, 1), int(model.config.decoder_start_token_id))
    for _ in range(6):
        logits = run(model, {**batch, "decoder_input_ids": by_hand})[:, -1]
        logits[:, 1] = float("-inf")  # its end of text
        by_hand = torch.cat([by_hand, logits.argmax(-1, keepdim=True)], 1)
    same(first[1], by_hand, "greedy text and whole passes")


# ------------------------------------------------------------------------------------------------------- what others look at


@law(19, hole=_not_transformers)
def outputs_and_names_are_the_models_own(case: Case) -> None:
    """Hidden states and attentions come in the base's numbers and shapes and show the adapter; class names and architectures are unchanged.

    One exception is meant: the states of an encoder that a decoder reads hold a prompt's virtual tokens, in front.
    """
    base, batch = case.base(), case.batch()
    wanted = {"output_hidden_states": True, "output_attentions": True}
    base.set_attn_implementation("eager")  # type: ignore[operator]
    names = {path: (type(m).__name__, type(m).__qualname__, type(m).__module__) for path, m in base.named_modules()}
    config = base.config.to_dict()  # type: ignore[union-attr]
    with torch.no_grad():
        plain = base(**batch, **wanted)
    case.attach(base, "a")
    model: Any = base
    for path, (name, qualname, module) in names.items():
        cls = type(model.get_submodule(path))
        assert (cls.__name__, cls.__qualname__, cls.__module__) == (name, qualname, module), path
    own_attention = {"_attn_implementation", "attn_implementation"}
    changed = [
        key for key, value in model.config.to_dict().items() if config.get(key) != value and key not in own_attention
    ]
    assert not changed, f"the config says another {changed}"
    with torch.no_grad():
        adapted = model(**batch, **wanted)
        with adapt.disabled(model):
            off = model(**batch, **wanted)
    assert type(adapted) is type(plain) and list(adapted) == list(plain), f"{list(adapted)} instead of {list(plain)}"
    for key in plain:
        if isinstance(plain[key], tuple):
            assert len(plain[key]) == len(adapted[key]), key
    assert any(key.endswith("hidden_states") for key in plain) and any(key.endswith("attentions") for key in plain)
    for key in [key for key in plain if key.endswith("hidden_states")]:
        for layer, (was, now) in enumerate(zip(plain[key], adapted[key], strict=True)):
            if issubclass(case.part, InputPart) and key == "encoder_hidden_states":
                now = now[:, -was.shape[1] :]
            assert was.shape == now.shape, f"{key} {layer}: {tuple(was.shape)} -> {tuple(now.shape)}"
            same(off[key][layer], was, f"{key} {layer} of the base")
    last = "decoder_hidden_states" if "decoder_hidden_states" in plain else "hidden_states"
    # A final layer's hidden state shows the adapter, unless all of it lies behind (a bias of the head).
    differs(adapted[last][-1], plain[last][-1], "hidden states of base and adapter", least=1e-4)


# ------------------------------------------------------------------------------------------------------------------- Trainer


class _Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows for a Trainer, labels among them."""

    def __init__(self, case: Case) -> None:
        batch = case.batch(8)
        if case.subject.name == "vit":
            batch["labels"] = torch.arange(8) % 5
        elif case.subject.name == "t5":
            batch["labels"] = batch.pop("decoder_input_ids")
        else:
            batch["labels"] = batch["input_ids"].clone()
        self.batch = batch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {key: value[index] for key, value in self.batch.items()}


def _trained(case: Case, folder: Path, resume: Path | None) -> Any:
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback

    model = case.adapted("a", dropout=0.2 if case.dropout else 0.0)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        per_device_train_batch_size=4,
        save_steps=2,
        logging_steps=2,
        learning_rate=1e-2,
        seed=3,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_total_limit=3,
        dataloader_pin_memory=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=_Rows(case))
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return model


def _worth_training(case: Case) -> bool:
    """A Trainer treats all adapters alike: every day one of each family, and those that want more of a trainer than a step."""
    method = case.method
    own = method.update or method.penalty or method.rates or method.shared
    return method.name == "lora" or (case.subject.name == "llama" and (case.exemplary or own is not None))


@law(20, hole=_not_transformers, heavy=True, everyday=_worth_training)
def trainer_resumes_to_the_same_bits(case: Case) -> None:
    """transformers' Trainer trains the adapter; resumed from its checkpoint in a new model it ends with the bits of the uninterrupted run."""
    with tempfile.TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="torch|transformers|accelerate")
        through = _trained(case, Path(scratch), None)
        start = adapt.parameters(case.adapted("a"), "a")
        moved = [
            key for key, p in adapt.parameters(through, "a").items() if not torch.equal(p.detach(), start[key].detach())
        ]
        assert moved, "nothing was trained"
        checkpoint = Path(scratch) / "checkpoint-2"
        files = {path.name for path in checkpoint.rglob("*")}  # of several adapters each has a folder
        assert "adapter_model.safetensors" in files, f"the checkpoint holds no adapter: {sorted(files)}"
        resumed = _trained(case, Path(scratch) / "again", checkpoint)
        for key, p in adapt.parameters(through, "a").items():
            same(adapt.parameters(resumed, "a")[key].detach(), p.detach(), f"{key}, resumed and uninterrupted")
        base = dict(adapt.base_parameters(case.base()).items())
        for key, p in adapt.base_parameters(resumed).items():
            same(p.detach(), base[key].detach(), f"{key} of the base after training")


@law(20, hole=_not_transformers, heavy=True)
def loss_falls_in_a_plain_loop(case: Case) -> None:
    """Ten steps of AdamW on one batch lower the loss, by the adapter's parameters alone."""
    model, batch = case.adapted("a"), case.batch()
    model.train()
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses: list[float] = []
    for _ in range(10):
        optimiser.zero_grad()
        loss = loss_of(output(model, batch))
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0], f"{losses[0]} -> {losses[-1]}"
    model.eval()
    with adapt.disabled(model):
        close(run(model, batch), run(case.base(), batch), "the base after training")
