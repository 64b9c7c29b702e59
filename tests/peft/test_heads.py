"""A classifier's adapter, with its head trained in full and without: every method that both libraries have, in both directions.

A task that has a head makes PEFT look for that head in the file, whether the config names it or not.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

import ingraft
import peft
from ingraft.methods import registry
from ingraft.methods.registry import make_config

TOLERANCE = 1e-5
TARGETS = ["query", "value"]
R = {"r": 4, "target_modules": TARGETS}
SOFT = {"num_virtual_tokens": 3}

METHODS: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "lora": (R, peft.LoraConfig, R),
    "dora": (R, peft.LoraConfig, {**R, "use_dora": True}),
    "rslora": (R, peft.LoraConfig, {**R, "use_rslora": True}),
    "lora-plus": (R, peft.LoraConfig, R),
    "pissa": (R, peft.LoraConfig, {**R, "init_lora_weights": "pissa"}),
    "olora": (R, peft.LoraConfig, {**R, "init_lora_weights": "olora"}),
    "eva": (R, peft.LoraConfig, R),
    "lora-fa": (R, peft.LoraConfig, R),
    "adalora": (
        {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": TARGETS},
        peft.AdaLoraConfig,
        {"init_r": 4, "target_r": 2, "total_step": 10, "target_modules": TARGETS},
    ),
    "loha": (R, peft.LoHaConfig, R),
    "lokr": (R, peft.LoKrConfig, R),
    "vera": (R, peft.VeraConfig, R),
    "randlora": (R, peft.RandLoraConfig, R),
    "fourierft": (
        {"n_frequency": 20, "target_modules": TARGETS},
        peft.FourierFTConfig,
        {"n_frequency": 20, "target_modules": TARGETS},
    ),
    "c3a": ({"block_size": 8, "target_modules": TARGETS}, peft.C3AConfig, {"block_size": 8, "target_modules": TARGETS}),
    "shira": (R, peft.ShiraConfig, R),
    "miss": (R, peft.MissConfig, R),
    "hira": (R, peft.HiraConfig, R),
    "vblora": (
        {"num_vectors": 8, "vector_length": 8, "target_modules": TARGETS},
        peft.VBLoRAConfig,
        {"num_vectors": 8, "vector_length": 8, "target_modules": TARGETS},
    ),
    "gralora": ({**R, "gralora_k": 2}, peft.GraloraConfig, {**R, "gralora_k": 2}),
    "oft": (
        {"oft_block_size": 4, "target_modules": TARGETS},
        peft.OFTConfig,
        {"oft_block_size": 4, "target_modules": TARGETS},
    ),
    "boft": (
        {"boft_block_size": 4, "target_modules": TARGETS},
        peft.BOFTConfig,
        {"boft_block_size": 4, "target_modules": TARGETS},
    ),
    "hra": (R, peft.HRAConfig, R),
    "road": (
        {"group_size": 8, "target_modules": TARGETS},
        peft.RoadConfig,
        {"group_size": 8, "target_modules": TARGETS},
    ),
    "ia3": (
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
        peft.IA3Config,
        {"target_modules": ["key", "output.dense"], "feedforward_modules": ["output.dense"]},
    ),
    "ln-tuning": ({}, peft.LNTuningConfig, {"target_modules": ["LayerNorm"]}),
    "trainable-tokens": (
        {"token_indices": [1, 2, 3]},
        peft.TrainableTokensConfig,
        {"token_indices": [1, 2, 3], "target_modules": ["word_embeddings"]},
    ),
    "prompt": (SOFT, peft.PromptTuningConfig, SOFT),
    "p-tuning": (
        {**SOFT, "encoder_hidden_size": 8},
        peft.PromptEncoderConfig,
        {**SOFT, "encoder_hidden_size": 8},
    ),
    "multitask-prompt": ({**SOFT, "num_tasks": 2}, peft.MultitaskPromptTuningConfig, {**SOFT, "num_tasks": 2}),
    "prefix": (SOFT, peft.PrefixTuningConfig, SOFT),
    "p-tuning-v2": (SOFT, peft.PrefixTuningConfig, SOFT),
}
"""By method: our options, and PEFT's config with its own."""

NOT_HERE = {"loftq", "llama-adapter"}
"""Those that sit in no BERT in float32 (`llama-adapter` is PEFT's for Llama alone)."""

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
}


def bert(cls: type[nn.Module] = BertForSequenceClassification, labels: int = 3) -> Any:
    torch.manual_seed(0)
    labels = 2 if cls is BertForQuestionAnswering else labels
    return cls(BertConfig(**SIZES, num_labels=labels)).eval()


def distilbert() -> Any:
    torch.manual_seed(0)
    return DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=32, dim=16, hidden_dim=24, n_layers=2, n_heads=2, num_labels=3)
    ).eval()


BATCH = {"input_ids": torch.tensor([[1, 2, 3, 4, 5], [3, 1, 6, 7, 0]]), "attention_mask": torch.ones(2, 5).long()}


@torch.no_grad()
def output(model: Any, **more: Any) -> Tensor:
    found = model(**BATCH, **more)
    if "logits" not in found:
        return torch.stack((found.start_logits, found.end_logits), -1)[:, -5:]  # PEFT's with the prompt in front
    return found.logits[:, -5:] if found.logits.dim() == 3 else found.logits


def difference(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()


@contextmanager
def theirs_alone() -> Iterator[None]:
    """What the incumbent says of its own files and layers is not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_peft(base: Any, folder: Path, **more: Any) -> Tensor:
    """What PEFT computes with a folder."""
    with theirs_alone():
        return output(peft.PeftModel.from_pretrained(base, folder).eval(), **more)


def test_every_method_of_both_libraries_is_here() -> None:
    """A new layout comes with its row."""
    ours = {name for name in registry.records() if registry.load(name).peft is not None}
    assert ours == set(METHODS) | NOT_HERE


@pytest.mark.parametrize("head", [False, True], ids=["head kept", "head trained"])
@pytest.mark.parametrize("method", METHODS)
def test_ours_loads_in_peft(method: str, head: bool, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = bert()
    base = output(model)
    options = METHODS[method][0] | ({"modules_to_save": ["classifier"]} if head else {})
    ingraft.attach(model, make_config(method, options), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ours = output(model)
    assert difference(ours, base) > 10 * TOLERANCE
    ingraft.save(model, tmp_path / "a")
    again = bert()
    ingraft.load(again, tmp_path / "a")
    assert difference(output(again), ours) < 1e-6
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    if method == "trainable-tokens" and head:
        assert config["peft_type"] == "INGRAFT_TRAINABLE_TOKENS"  # PEFT's has no modules_to_save
        return
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if method == "multitask-prompt" else {}
    assert difference(in_peft(bert(), tmp_path / "a", **tasks), ours) < TOLERANCE


@pytest.mark.parametrize("head", [False, True], ids=["no task", "head trained"])
@pytest.mark.parametrize("method", METHODS)
def test_theirs_loads_here(method: str, head: bool, tmp_path: Path, tiny: SimpleNamespace) -> None:
    _, cls, options = METHODS[method]
    if not head and "num_virtual_tokens" in options:
        pytest.skip("a soft prompt cannot do without a task there")
    if head and method == "trainable-tokens":
        pytest.skip("it has no modules_to_save there")
    torch.manual_seed(2)
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if method == "multitask-prompt" else {}
    with theirs_alone():
        model = peft.get_peft_model(bert(), cls(**options, task_type="SEQ_CLS" if head else None)).eval()
        tiny.perturb(p for p in model.parameters() if p.requires_grad)
        theirs = output(model, **tasks)
        model.save_pretrained(str(tmp_path))
    here = bert()
    base = output(here)
    ingraft.load(here, tmp_path)
    assert difference(theirs, base) > 10 * TOLERANCE
    assert difference(output(here), theirs) < TOLERANCE


@pytest.mark.parametrize("cls", [BertForTokenClassification, BertForQuestionAnswering])
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_the_other_tasks_with_a_head(cls: Any, method: str, tmp_path: Path, tiny: SimpleNamespace) -> None:
    model = bert(cls)
    ingraft.attach(model, make_config(method, METHODS[method][0]), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "a")
    assert difference(in_peft(bert(cls), tmp_path / "a"), output(model)) < TOLERANCE


@pytest.mark.parametrize("head", [False, True], ids=["head kept", "head trained"])
@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_a_head_whose_name_ends_another(method: str, head: bool, tmp_path: Path, tiny: SimpleNamespace) -> None:
    """PEFT compares ends of names: DistilBERT's `classifier` means its `pre_classifier` too, which LoRA adapts here."""
    model = distilbert()
    options = {"r": 4} if method == "lora" else SOFT
    more = {"modules_to_save": ["classifier"]} if head else {}
    ingraft.attach(model, make_config(method, {**options, **more}), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "a")
    theirs = in_peft(distilbert(), tmp_path / "a")
    if method == "lora":  # DistilBERT pools the first token, which there is the prompt's
        assert difference(theirs, output(model)) < TOLERANCE
    again = distilbert()
    ingraft.load(again, tmp_path / "a")
    assert difference(output(again), output(model)) == 0
    assert ingraft.status(again).adapters[0].parameters == ingraft.status(model).adapters[0].parameters


def test_a_head_that_an_older_file_does_not_name(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """PEFT adds the head of the task by itself, so its config need not name it."""
    model = peft.get_peft_model(bert(), peft.LoraConfig(**R, task_type="SEQ_CLS")).eval()
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text()) | {"modules_to_save": None}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    here = bert()
    ingraft.load(here, tmp_path)
    assert difference(output(here), output(model)) < TOLERANCE


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)).eval()


TIED = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}


@pytest.mark.parametrize(
    ("method", "options"), [("lora", TIED), ("ln-tuning", {"modules_to_save": TIED["modules_to_save"]})]
)
def test_a_tied_embedding_and_head_are_both_in_the_file(
    method: str, options: dict[str, Any], tmp_path: Path, tiny: SimpleNamespace
) -> None:
    """PEFT gives each a tensor of its own, and misses the one that is not there."""
    model = llama()
    ingraft.attach(model, make_config(method, options), seed=3)
    tiny.perturb(ingraft.parameters(model, "default").values())
    ingraft.save(model, tmp_path / "a")
    assert difference(in_peft(llama(), tmp_path / "a"), output(model)) < TOLERANCE
    again = llama()
    ingraft.load(again, tmp_path / "a")
    assert difference(output(again), output(model)) == 0
    assert ingraft.status(again).adapters[0].parameters == ingraft.status(model).adapters[0].parameters


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_tied_modules_that_parted_there_stay_apart_here(tmp_path: Path, tiny: SimpleNamespace) -> None:
    torch.manual_seed(2)
    model = peft.get_peft_model(llama(), peft.LoraConfig(**TIED)).eval()
    tiny.perturb(p for p in model.parameters() if p.requires_grad)
    theirs = output(model)
    model.save_pretrained(str(tmp_path / "theirs"))
    here = llama()
    base = output(here)
    ingraft.load(here, tmp_path / "theirs", trainable=True)
    assert difference(output(here), theirs) < TOLERANCE
    ingraft.save(here, tmp_path / "ours")
    names = [f"base_model.model.{name}.weight" for name in ("model.embed_tokens", "lm_head")]
    kept, read = (
        load_file(tmp_path / "ours" / "adapter_model.safetensors"),
        load_file(tmp_path / "theirs" / "adapter_model.safetensors"),
    )
    assert all(torch.equal(kept[name], read[name]) for name in names)
    again = llama()
    ingraft.load(again, tmp_path / "ours")
    assert difference(output(again), theirs) < TOLERANCE
    ingraft.merge(again)
    assert difference(output(again), theirs) < TOLERANCE
    ingraft.unmerge(again)
    ingraft.detach(again)
    assert difference(output(again), base) == 0
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`", "ignore:.*shares its weight")
@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["lm_head", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 5]},
    ],
    ids=str,
)
def test_files_that_keep_ties(options: dict[str, Any], tmp_path: Path, tiny: SimpleNamespace) -> None:
    """`ensure_weight_tying`: what shares a parameter with a named module is adapted there, and in the file, without being named."""
    torch.manual_seed(2)
    with theirs_alone():
        model = peft.get_peft_model(llama(), peft.LoraConfig(ensure_weight_tying=True, **options)).eval()
        tiny.perturb(p for p in model.parameters() if p.requires_grad)
        theirs = output(model)
        model.save_pretrained(str(tmp_path / "theirs"))
    here = llama()
    assert difference(output(here), theirs) > 10 * TOLERANCE
    ingraft.load(here, tmp_path / "theirs")
    assert difference(output(here), theirs) < TOLERANCE
    ingraft.save(here, tmp_path / "ours")
    assert difference(in_peft(llama(), tmp_path / "ours"), theirs) < TOLERANCE


def test_ties_in_a_script(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """A tied embedding that is trained in full stays tied; two adapters on one weight could not, and are refused."""
    from ingraft.peft import LoraConfig, get_peft_model

    model = get_peft_model(
        llama(), LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    )
    tiny.perturb(ingraft.parameters(model, "default").values())
    model.save_pretrained(tmp_path / "a")
    assert difference(in_peft(llama(), tmp_path / "a"), output(model)) < TOLERANCE
    with pytest.raises(
        ingraft.IngraftError, match=r"ensure_weight_tying: lm_head and model\.embed_tokens share a weight"
    ):
        get_peft_model(llama(), LoraConfig(target_modules=["lm_head"], ensure_weight_tying=True))


def test_biases_of_a_base_that_has_none(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """`bias="all"` says nothing on a Llama; on a base with biases it stays refused."""
    with theirs_alone():
        model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], bias="all")).eval()
        tiny.perturb(p for p in model.parameters() if p.requires_grad)
        model.save_pretrained(str(tmp_path))
    here = llama()
    ingraft.load(here, tmp_path)
    assert difference(output(here), output(model)) < TOLERANCE


def test_a_copy_of_the_head_may_be_coarser_than_the_base(tmp_path: Path, tiny: SimpleNamespace) -> None:
    """The copy of the base's head beside a soft prompt is this base's if it is so in the coarser dtype of the two."""
    model = bert()
    ingraft.attach(model, make_config("prompt", SOFT), seed=3)
    ingraft.save(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    (tmp_path / "a" / "ingraft.json").unlink()
    save_file({name: value.bfloat16() for name, value in tensors.items()}, file, metadata={"format": "pt"})
    ingraft.load(bert(), tmp_path / "a")
    tensors["base_model.classifier.weight"] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text()) | {"task_type": None}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ingraft.IngraftError, match=r"classifier\.weight is a copy of the base's"):
        ingraft.load(bert(), tmp_path / "a")


def test_a_float64_base_gets_a_file_that_loads(tmp_path: Path) -> None:
    model = bert().double()
    ingraft.attach(model, make_config("lora", R))
    ingraft.save(model, tmp_path / "a")
    ingraft.load(bert().double(), tmp_path / "a")
    with pytest.raises(
        ingraft.IngraftError, match=r"dtype must be one of float32, float16, bfloat16, got torch.float64"
    ):
        ingraft.save(model, tmp_path / "b", dtype=torch.float64)


def test_the_class_is_found_without_a_task(tmp_path: Path) -> None:
    """A classifier's adapter without its head has no task; the class stands beside it, for both libraries."""
    from ingraft.peft import AutoPeftModel

    bert().save_pretrained(str(tmp_path / "base"))
    base = BertForSequenceClassification.from_pretrained(str(tmp_path / "base"))
    ingraft.attach(base, make_config("lora", R))
    ingraft.save(base, tmp_path / "a")
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["task_type"] is None
    assert isinstance(AutoPeftModel.from_pretrained(tmp_path / "a"), BertForSequenceClassification)
    with theirs_alone():
        theirs = peft.AutoPeftModel.from_pretrained(str(tmp_path / "a"))
    assert isinstance(theirs.get_base_model(), BertForSequenceClassification)


@pytest.mark.parametrize("method", ["lora", "prompt"])
def test_another_number_of_labels_is_refused_with_what_to_do(method: str, tmp_path: Path) -> None:
    model = bert()
    options = METHODS[method][0] | {"modules_to_save": ["classifier"]}
    ingraft.attach(model, make_config(method, options))
    ingraft.save(model, tmp_path / "a")
    other = bert(labels=5)
    with pytest.raises(ingraft.IngraftError) as caught:
        ingraft.load(other, tmp_path / "a")
    (text,) = caught.value.problems
    assert "classifier was trained in full with 3 outputs, and this base's has 5" in text and "num_labels=3" in text
    ingraft.load(bert(labels=3), tmp_path / "a")


def test_what_cannot_be_read_says_what_to_do(tmp_path: Path) -> None:
    with theirs_alone():
        peft.get_peft_model(bert(), peft.LoraConfig(**R, bias="all")).save_pretrained(str(tmp_path))
    with pytest.raises(ingraft.IngraftError, match=r"bias = 'all' is not supported.*Merge it into its base"):
        ingraft.load(bert(), tmp_path)
