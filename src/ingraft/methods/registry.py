"""The catalogue as data: a frozen record for each method, importable without torch.

A record names the file that holds the method (`module:attribute`); the file is imported when the method is used. A package of the user's
adds methods through the entry point group `ingraft.methods`: each entry point is named like the method and points at a `MethodRecord`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ingraft.errors import IngraftError, nearest

if TYPE_CHECKING:
    from ingraft.methods.contract import Method, MethodConfig


@dataclass(frozen=True, kw_only=True)
class MethodRecord:
    """One line of the catalogue.

    Attributes:
        name: as in recipes and on the command line.
        target: "module:attribute" of the `Method`.
        config: name of the config class in that module, which is also its public name.
        family: weight, selective, bottleneck, prefix or prompt.
        summary: what it trains, in a line.
        equation: in plain text.
        paper: authors, year, identifier.
        mergeable: whether it can be written into the base's weights.
        learning_rate: peak rate that trains it well with AdamW, found on real data (docs/lab-notes.md); what a recipe that names none gets.
    """

    name: str
    target: str
    config: str
    family: str
    summary: str
    equation: str
    paper: str
    mergeable: bool
    learning_rate: float


WHOLE = "full"
"""The method that `modules_to_save` stands for."""

_HERE = "ingraft.methods"

_RECORDS = (
    MethodRecord(
        name="lora",
        target=f"{_HERE}.lora:METHOD",
        config="LoraConfig",
        family="weight",
        summary="a low-rank change beside every chosen weight",
        equation="W' = W + (alpha / r) B A",
        paper="Hu et al. 2022, arXiv:2106.09685",
        mergeable=True,
        learning_rate=0.0005,
    ),
    MethodRecord(
        name="dora",
        target=f"{_HERE}.dora:METHOD",
        config="DoraConfig",
        family="weight",
        summary="LoRA's direction with a trained magnitude for every output",
        equation="W' = m (W + s B A) / ||W + s B A||",
        paper="Liu et al. 2024, arXiv:2402.09353",
        mergeable=True,
        learning_rate=0.0005,
    ),
    MethodRecord(
        name="ia3",
        target=f"{_HERE}.ia3:METHOD",
        config="IA3Config",
        family="weight",
        summary="one trained factor for every key, value and feed-forward activation",
        equation="y' = l * y  (feed-forward: y' = W (l * x))",
        paper="Liu et al. 2022, arXiv:2205.05638",
        mergeable=True,
        learning_rate=0.01,
    ),
    MethodRecord(
        name="bitfit",
        target=f"{_HERE}.bitfit:METHOD",
        config="BitFitConfig",
        family="selective",
        summary="the biases alone",
        equation="b' = b + d",
        paper="Ben Zaken et al. 2022, arXiv:2106.10199",
        mergeable=True,
        learning_rate=0.002,
    ),
    MethodRecord(
        name="full",
        target=f"{_HERE}.full:METHOD",
        config="FullConfig",
        family="selective",
        summary="every parameter of the chosen modules (by default the whole base)",
        equation="P' = a float32 copy of P, trained",
        paper="ordinary fine-tuning",
        mergeable=True,
        learning_rate=3e-05,
    ),
    MethodRecord(
        name="houlsby",
        target=f"{_HERE}.houlsby:METHOD",
        config="HoulsbyConfig",
        family="bottleneck",
        summary="a bottleneck behind the attention and behind the MLP of every block",
        equation="y' = y + U f(D y)",
        paper="Houlsby et al. 2019, arXiv:1902.00751",
        mergeable=False,
        learning_rate=0.001,
    ),
    MethodRecord(
        name="pfeiffer",
        target=f"{_HERE}.pfeiffer:METHOD",
        config="PfeifferConfig",
        family="bottleneck",
        summary="one bottleneck at the output of every block",
        equation="y' = y + U f(D y), inside the norm on post-norm models",
        paper="Pfeiffer et al. 2021, arXiv:2005.00247",
        mergeable=False,
        learning_rate=0.001,
    ),
    MethodRecord(
        name="parallel",
        target=f"{_HERE}.parallel:METHOD",
        config="ParallelConfig",
        family="bottleneck",
        summary="a bottleneck beside the MLP of every block",
        equation="y' = MLP(x) + s U f(D x)",
        paper="He et al. 2022, arXiv:2110.04366",
        mergeable=False,
        learning_rate=0.0005,
    ),
    MethodRecord(
        name="prefix",
        target=f"{_HERE}.prefix:METHOD",
        config="PrefixTuningConfig",
        family="prefix",
        summary="learned keys and values ahead of the real ones in every attention",
        equation="softmax(q [K_p; K]') [V_p; V]",
        paper="Li and Liang 2021, arXiv:2101.00190",
        mergeable=False,
        learning_rate=0.01,
    ),
    MethodRecord(
        name="prompt",
        target=f"{_HERE}.prompt:METHOD",
        config="PromptTuningConfig",
        family="prompt",
        summary="learned embeddings in front of the input",
        equation="x' = [p_1 ... p_n; x]",
        paper="Lester et al. 2021, arXiv:2104.08691",
        mergeable=False,
        learning_rate=0.1,
    ),
)


@functools.cache
def records() -> Mapping[str, MethodRecord]:
    """Every method known here, by name: the package's own, then those of installed packages."""
    found = {record.name: record for record in _RECORDS}
    for entry in importlib.metadata.entry_points(group="ingraft.methods"):
        record = entry.load()
        if not isinstance(record, MethodRecord):
            raise IngraftError(
                f"The entry point {entry.name!r} of group 'ingraft.methods' is no MethodRecord but {type(record).__name__}."
            )
        found.setdefault(record.name, record)
    return found


def record(name: str) -> MethodRecord:
    """The record of a method.

    Raises:
        IngraftError: with the nearest names, if there is none.
    """
    known = records()
    if name not in known:
        raise IngraftError(f"There is no method named {name!r}{nearest(name, known)}. Known: {', '.join(known)}.")
    return known[name]


@functools.cache
def load(name: str) -> Method:
    """Import a method's file (which needs torch) and return its record of facts."""
    module, _, attribute = record(name).target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def make_config(name: str, options: Mapping[str, Any]) -> MethodConfig:
    """A method's config from plain data, every wrong key and value reported at once.

    Raises:
        IngraftError: one problem for each unknown key (with the nearest), each value of a wrong type and each impossible value.
    """
    from pydantic import TypeAdapter, ValidationError

    config = load(name).config
    known = [f.name for f in fields(config)]
    problems = [
        f"method_config: {name} has no option {key!r}{nearest(key, known)}." for key in options if key not in known
    ]
    plain = {key: tuple(value) if isinstance(value, list) else value for key, value in options.items() if key in known}
    try:
        made = TypeAdapter(config).validate_python(plain)
    except ValidationError as error:
        for item in error.errors():
            where = ".".join(str(part) for part in item["loc"][:1])
            text = f"method_config.{where}: {item['msg']}, got {item['input']!r}." if where else str(item["msg"])
            if text not in problems:
                problems.append(text)
        raise IngraftError(*problems) from None
    except IngraftError as error:
        raise IngraftError(*problems, *(f"method_config: {text}" for text in error.problems)) from None
    if problems:
        raise IngraftError(*problems)
    return made
