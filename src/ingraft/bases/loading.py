"""From a name to a model that is ready to be adapted.

Whatever the name was (`naming`), what comes out is a model in evaluation mode with its tokenizer: plain and dense, or its frozen weights packed
in blocks where that is asked for (`ingraft.quant`).

torch and transformers are imported by the functions that load, so `ingraft models` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ingraft.bases import dense_gguf
from ingraft.bases.dtypes import as_dtype, default_device
from ingraft.bases.generic import saved_class
from ingraft.bases.heads import HEADS, IMAGES
from ingraft.bases.hush import quiet
from ingraft.bases.images import PROCESSOR, load_images
from ingraft.bases.naming import find, gguf_of
from ingraft.bases.places import places
from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from ingraft.bases.reading import Reader

log = logging.getLogger(__name__)

QUANTIZATIONS = ("none", "nf4", "int8", "keep")
"""How the weights of a base may be held."""


@dataclass(kw_only=True)
class Base:
    """A loaded base.

    Attributes:
        model: in evaluation mode, on its device, in one dtype.
        tokenizer: with a padding token; of a base that looks at images its image processor.
        name: what the user called it; also the model's `config.name_or_path`, hence in the adapters saved from it.
        source: the folder or hub id it was read from.
        seconds: what loading took.
        fresh: modules whose weights the files did not hold (a classifier's head, perhaps a pooler), which began at random. Whoever adapts
            the base must train and save them.
    """

    model: PreTrainedModel
    tokenizer: Reader
    name: str
    source: str
    seconds: float
    fresh: tuple[str, ...] = ()


def load_base(
    name: str,
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
    task: str | None = None,
    num_labels: int | None = None,
    labels: list[str] | None = None,
    device: str | torch.device | None = None,
    quantization: str = "none",
    scale: tuple[float, float] | None = None,
) -> Base:
    """Load a base and its tokenizer, or image processor.

    Args:
        name: a catalogue name, a folder, a `.gguf` file or a hub id.
        dtype: "auto" (see `fast_dtype`), "float32", "bfloat16", "float16", or a torch dtype.
        trust_remote_code: let the model's own Python code run. Only a person at the keyboard may grant that.
        task: what the base is for, a name of `bases.heads.HEADS`, or None (as the model was saved).
        num_labels, labels: for a task whose outputs have names: how many they are, or the names in order.
        device: where to put it; None picks CUDA if there is one, else the CPU.
        quantization: how its linear layers are held: "none" (dense), "nf4" or "int8" (quantised while loading), or "keep" (a GGUF file's own
            blocks, those of the embedding and the head included).
        scale: for a task whose output is a number: mean and standard deviation of the labels.

    Raises:
        IngraftError: unknown name (with near ones), package not installed (with the command), broken files, a model unfit for the task, or a
            quantization that it cannot have.
    """
    import torch

    began = time.perf_counter()
    check_base(name, quantization, task)
    wanted = as_dtype(dtype, device)
    if quantization == "keep":
        from ingraft.bases.kept_gguf import load_kept

        gguf, fresh = gguf_of(name), ()
        assert gguf is not None
        with quiet(), _explained(name, str(gguf)):
            model, folder = load_kept(gguf, name, wanted)
            tokenizer = _load_tokenizer(str(folder), {})
        source = str(gguf)
    else:
        source, options = find(name)
        options["trust_remote_code"] = trust_remote_code
        with quiet(), _explained(name, source):
            model, fresh = _load_model(
                name, source, options, wanted, task, num_labels, labels, quantization, scale=scale
            )
            reads_images = model.main_input_name == "pixel_values"
            tokenizer = load_images(name, source, options) if reads_images else _load_tokenizer(source, options)
    if tokenizer.pad_token_id is not None and model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    model.config._name_or_path = name
    place = torch.device(device) if device is not None else default_device()
    torch.nn.Module.to(model.eval(), place)
    if quantization != "none":
        from ingraft.bases.packing import let_go

        let_go(model)
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
    gguf = gguf_of(name) if quantization == "keep" else None
    if gguf is None:
        find(name)
    if quantization == "keep":
        from ingraft.bases.kept_gguf import check

        check(gguf, name, task)


def load_tokenizer(name: str, trust_remote_code: bool = False, quantization: str = "none") -> PreTrainedTokenizerBase:
    """Only the tokenizer of a base, with a padding token; it declares no more tokens than the base has places for.

    Args:
        quantization: as the base is going to be loaded; with "keep" its weights are not unpacked for the tokenizer's sake.

    Raises:
        IngraftError: as `load_base`.
    """
    if quantization == "keep" and (gguf := gguf_of(name)) is not None:
        with quiet(), _explained(name, str(gguf)):
            return _load_tokenizer(str(dense_gguf.skeleton_folder(gguf)), {})
    source, options = find(name)
    with quiet(), _explained(name, source):
        return _load_tokenizer(source, {**options, "trust_remote_code": trust_remote_code})


def load_reader(name: str, task: str, trust_remote_code: bool = False, quantization: str = "none") -> Reader:
    """What a base reads the rows of a task with: its tokenizer (`load_tokenizer`) or its image processor (`load_images`).

    Raises:
        IngraftError: as these two; a base that cannot look at images.
    """
    from transformers import AutoConfig

    head = HEADS[task]
    if head.reads != IMAGES:
        try:
            return load_tokenizer(name, trust_remote_code, quantization)
        except IngraftError as error:
            if not (Path(find(name)[0]) / PROCESSOR).is_file():
                raise
            text = f"{name}: looks at images, and the task {task!r} reads text; use --task image-classify, or another base."
            raise IngraftError(text) from error
    source, options = find(name)
    options["trust_remote_code"] = trust_remote_code
    with quiet(), _explained(name, source):
        head.loads(name, AutoConfig.from_pretrained(source, **options), task)
        return load_images(name, source, options)


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
    scale: tuple[float, float] | None = None,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    import transformers
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source, **options)
    head = None
    if task is not None:
        if task not in HEADS:
            raise IngraftError(f"task: no head is known for {task!r}{nearest(task, HEADS)}; known: {', '.join(HEADS)}.")
        head = HEADS[task]
        loader: Any = head.loads(name, config, task)
        head.prepare(config, labels, num_labels, scale)
    else:
        saved_as = next(iter(getattr(config, "architectures", None) or ()), "")
        loader = saved_class(config, saved_as) or getattr(transformers, saved_as, transformers.AutoModel)
    fresh = head is not None and head.fresh
    extra: dict[str, Any] = {"ignore_mismatched_sizes": True} if fresh else {}
    if quantization != "none":
        from ingraft.bases.packing import BlockConfig

        if getattr(config, "quantization_config", None) is not None:
            raise IngraftError(
                f"{name}: is stored quantised already, so it cannot be quantised again; leave quantization out."
            )
        extra["quantization_config"] = BlockConfig(form=quantization, skip=skip)
    model, info = loader.from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, **extra, **options
    )
    unused = head.unused if head is not None else ()
    for part in unused:
        if part in dict(model.named_children()):
            setattr(model, part, None)
    missing = sorted(key for key in info["missing_keys"] if key.partition(".")[0] not in unused)
    inside = f"{model.base_model_prefix}."
    held = sum(key.startswith(inside) for key in model.state_dict())
    if (
        fresh and 2 * sum(key.startswith(inside) for key in missing) > held
    ):  # a head begins at random, its base does not
        raise IngraftError(
            f"{name}: transformers finds next to nothing of a {type(model).__name__} in the files of {source}; it would begin at random. Use another base."
        )
    if missing and not fresh:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise IngraftError(f"{name}: the files of {source} lack weights that a {type(model).__name__} needs: {shown}.")
    if quantization != "none":
        from ingraft.bases.packing import unmark, unread

        unmark(model)
        if (left := tuple(unread(model, missing))) and not skip:  # begins at random, is trained, and so stays dense
            return _load_model(name, source, options, dtype, task, num_labels, labels, quantization, left, scale)
    if hasattr(model.config, "quantization_config"):
        log.warning("%s: is stored quantised (%s).", name, model.config.quantization_config)
    return model, tuple(sorted({key.rpartition(".")[0] for key in missing}))


def _load_tokenizer(source: str, options: dict[str, Any]) -> PreTrainedTokenizerBase:
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    with contextlib.suppress(OSError, ValueError, KeyError):  # a config that cannot be read is told of with the model
        found = places(AutoConfig.from_pretrained(source, **options))
        tokenizer.model_max_length = min(tokenizer.model_max_length, found)
    if tokenizer.pad_token is None:  # GPT-2 and others were never batched; any token will do, padding is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer


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
