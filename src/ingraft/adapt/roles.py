"""Finds the places of a transformer that methods speak of (the attention's output, the MLP, the block) by its structure.

A *block* is an element of a `ModuleList` whose elements share one class and each hold an *attention core*: a module that knows how many heads
it has (in a block where none does, how wide they are). From there on it is counting linear layers in the order in which the model registers
them, an output projection that is named so last:

* A core with four linears (q, k, v, out) or two (fused, out) ends in its output projection; with three or one, or where the last is named for a query, a
  key or a value (Longformer), the projection is the next linear of the block (BERT keeps it in a module of its own).
* torch's own `nn.MultiheadAttention` is one module whose output is the projection's.
* Which of them make keys and values, their names say (`_keys_values`).
* What remains is the MLP: its first linear is where it begins, its last linear back to the block's width is where it ends. They need not
  lie in one module (OPT has them loose in the block), which is why the MLP is a span and not a module. A mixture of experts is the child
  of the block that holds the experts.
* Post-norm blocks end in a norm that follows the last projection inside a module smaller than the block (BERT), or in one that
  `POST_NORM` names, where only the code tells.

The first core of a block is its self-attention; further ones are cross-attentions, which roles leave alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ingraft.adapt import models
from ingraft.adapt.stacked import reads
from ingraft.adapt.swap import original_class
from ingraft.adapt.weights import kind_of
from ingraft.errors import IngraftError

ROLES = ("attention-out", "attention-kv", "mlp-out", "mlp", "block", "attention", "input")
"""Names that may stand in `target_modules` beside module names; no module can be called so."""

HEAD_COUNTS = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "num_key_value_groups",
    "n_head",
    "num_key_value_heads",
    "heads",
)

HEAD_WIDTHS = ("head_dim", "head_size", "attention_head_size")
"""What an attention knows that leaves the number of its heads to its config (GPT-NeoX)."""

OUTPUT_PROJECTIONS = ("o", "o_proj", "wo", "out", "out_proj", "out_lin")
"""Names that only an attention's output projection has."""

POST_NORM = {"distilbert": "output_layer_norm", "bart": "final_layer_norm", "marian": "final_layer_norm"}
"""Norms at the end of a block that structure alone does not show, by `config.model_type`."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Paths of one block's places; None or empty where it has none."""

    path: str
    attention: str
    attention_kv: tuple[str, ...]
    attention_out: str
    mlp_in: str | None
    mlp_out: str | None
    norm: str | None


def blocks(model: nn.Module) -> list[Block]:
    """The transformer blocks of a model, in order.

    Raises:
        IngraftError: if none is found, naming what to give instead.
    """
    found: list[Block] = []
    for name, module in model.named_modules():
        if (
            not isinstance(module, nn.ModuleList)
            or len(module) == 0
            or any(name.startswith(block.path + ".") for block in found)
        ):
            continue
        if not _repeats(module) or any(_is_stage(child) for child in module):
            continue
        model_type = str(getattr(getattr(model, "config", None), "model_type", ""))
        found += [
            _block(f"{name}.{index}" if name else str(index), child, model_type) for index, child in enumerate(module)
        ]
    if not found:
        raise IngraftError(
            f"{original_class(model).__name__}: no transformer blocks were found (a ModuleList of modules that each hold an attention with a "
            "head count). This method needs them; choose a weight method such as lora, or name the modules in target_modules."
        )
    return found


def _repeats(module: nn.ModuleList) -> bool:
    """Whether all elements are of one class and hold an attention."""
    return len({original_class(child) for child in module}) == 1 and all(_cores(child) for child in module)


def _is_stage(module: nn.Module) -> bool:
    """Whether a module holds blocks of its own: a stage of a Swin, a transformer within a UNet."""
    return any(isinstance(inner, nn.ModuleList) and len(inner) and _repeats(inner) for inner in module.modules())


def _cores(block: nn.Module) -> list[str]:
    """Paths, within the block, of the innermost modules that know their number of heads (where none does, their width) and hold linear
    layers."""
    for known in (HEAD_COUNTS, HEAD_WIDTHS):
        knows = [
            name
            for name, module in block.named_modules()
            if name and any(attribute in module.__dict__ for attribute in known) and _linears(module)
        ]
        if knows:
            return [name for name in knows if not any(other.startswith(name + ".") for other in knows)]
    return []


def _linears(module: nn.Module) -> list[str]:
    """Paths of the linear layers within a module, in the order in which it registers them."""
    return [
        name
        for name, layer in module.named_modules()
        if (kind := kind_of(layer)) and kind.name in ("linear", "conv1d-transposed")
    ]


def _projections(attention: nn.Module) -> list[str]:
    """Paths of an attention's linear layers, the output projection last: where names tell it, it need not be registered so (Phi-3)."""
    names = _linears(attention)
    return sorted(names, key=lambda name: name.rpartition(".")[2].lower() in OUTPUT_PROJECTIONS)


def _width_out(layer: nn.Module) -> int:
    kind = kind_of(layer)
    assert kind is not None
    return kind.shape_of(layer)[0]


def _block(path: str, block: nn.Module, model_type: str) -> Block:
    cores = _cores(block)
    inside = {core: [f"{core}.{name}" for name in _projections(block.get_submodule(core))] for core in cores}
    taken = {name for names in inside.values() for name in names}
    loose = [name for name in _linears(block) if name not in taken]
    outs: dict[str, str] = {}
    for core, names in inside.items():
        if reads(block.get_submodule(core)):
            outs[core] = (
                core  # torch's own attention reads its last projection; what the attention returns is that projection's output
            )
        elif len(names) in (1, 3) or any(word in names[-1].rpartition(".")[2] for word in ("query", "key", "value")):
            order = [name for name, _ in block.named_modules()]
            behind = [name for name in loose if order.index(name) > order.index(names[-1])]
            outs[core] = behind[0] if behind else names[-1]
        else:
            outs[core] = names[-1]
    loose = [name for name in loose if name not in outs.values()]
    last = inside[cores[0]][-1] if outs[cores[0]] == cores[0] else outs[cores[0]]
    width = _width_out(block.get_submodule(last))
    ends = [name for name in loose if _width_out(block.get_submodule(name)) == width]
    mlp_out = ends[-1] if ends else None
    if mixtures := _mixtures(block):
        loose, mlp_out = mixtures, mixtures[-1]
    first = [name for name in inside[cores[0]] if name != outs[cores[0]]]
    keys_values = [] if outs[cores[0]] == cores[0] else _keys_values(first)

    def full(name: str) -> str:
        return f"{path}.{name}"

    return Block(
        path=path,
        attention=full(cores[0]),
        attention_kv=tuple(full(name) for name in keys_values),
        attention_out=full(outs[cores[0]]),
        mlp_in=full(loose[0]) if mlp_out else None,
        mlp_out=full(mlp_out) if mlp_out else None,
        norm=_post_norm(path, block, mlp_out, model_type),
    )


def _mixtures(block: nn.Module) -> list[str]:
    """Children that hold a mixture's experts in stacked tensors: one expert is no MLP, the child is."""
    return [
        name
        for name, child in block.named_children()
        if any(
            p is not None and p.dim() == 3
            for path, inner in child.named_modules(prefix=name)
            if "adapter:" not in path  # an adapter's own tensors are no experts
            for p in inner._parameters.values()
        )
        and not _cores_in(child)
    ]


def _cores_in(module: nn.Module) -> bool:
    return any(attribute in inner.__dict__ for inner in module.modules() for attribute in (*HEAD_COUNTS, *HEAD_WIDTHS))


def _keys_values(projections: list[str]) -> list[str]:
    """Which of an attention's input projections make keys and values: by name where names tell (OPT registers k, v, q), else by place."""
    if len(projections) < 3:
        return projections  # fused
    leaves = {name: name.rpartition(".")[2].lower() for name in projections}
    named = [name for name, leaf in leaves.items() if leaf[0] in "kv" or "key" in leaf or "value" in leaf]
    return named if len(named) == 2 else projections[1:3]


FUSED = ("gpt2", "phi3")
"""Types of models whose attention has one projection in which query, key and value stand behind one another."""


def key_value_layers(attention: nn.Module) -> tuple[str, ...]:
    """Names of the layers within an attention that make its keys and its values, or of the one that makes them behind the query; () where
    that is not known."""
    linears = [name for name in _projections(attention) if "adapter:" not in name]
    made = _keys_values(linears[:-1] if len(linears) in (2, 4) else linears)
    if len(made) == 1:
        kind = getattr(getattr(attention, "config", None), "model_type", "")
        return tuple(made) if kind in FUSED else ()
    if len(made) != 2:
        return ()
    leaves = [name.rpartition(".")[2].lower() for name in made]
    return (made[1], made[0]) if leaves[0][0] == "v" else (made[0], made[1])


def projects(attention: nn.Module, width: int) -> bool:
    """Whether `key_value_layers` are known, and make keys and values of this width."""
    names = key_value_layers(attention)
    return len(names) == 1 or (bool(names) and all(_width_out(attention.get_submodule(n)) == width for n in names))


def _post_norm(path: str, block: nn.Module, mlp_out: str | None, model_type: str) -> str | None:
    if isinstance(block, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        last = "norm2" if isinstance(block, nn.TransformerEncoderLayer) else "norm3"
        return None if block.norm_first else f"{path}.{last}"
    if model_type in POST_NORM:
        return f"{path}.{POST_NORM[model_type]}"
    parent, _, _ = (mlp_out or "").rpartition(".")
    if not parent:
        return None
    small = block.get_submodule(parent)
    norms = [name for name, child in small.named_children() if (kind := kind_of(child)) and kind.name == "norm"]
    if len(_linears(small)) == 1 and norms:
        return f"{path}.{parent}.{norms[-1]}"
    return None


def sites_of_role(model: nn.Module, role: str) -> dict[str, str]:
    """Paths of the modules that have a role in this model, each with the role its part is told.

    Raises:
        IngraftError: if the model has no such place.
    """
    found: dict[str, str] = {}
    text = models.text_path(model)  # a prefix is one of the text's, also where the model sees
    for block in blocks(model):
        if role == "block":
            found[block.norm or block.path] = "norm" if block.norm else "block"
        elif role == "attention":
            if models.lies_in(block.attention, text):
                found[block.attention] = role
        elif role == "attention-out":
            found[block.attention_out] = role
        elif role == "attention-kv" and not block.attention_kv:
            raise IngraftError(
                f"{block.attention} (MultiheadAttention): its keys and values are no layers of their own; name modules in target_modules."
            )
        elif role == "attention-kv":
            found.update(dict.fromkeys(block.attention_kv, role))
        elif block.mlp_out is not None:
            found[block.mlp_out] = role
    if not found:
        raise IngraftError(
            f"{original_class(model).__name__}: no place with the role {role!r} was found; name modules in target_modules."
        )
    return found
